"""Results on their way from the device to the CPU."""

from __future__ import annotations

import torch
from torch import Tensor


class Leaving:
    """Copies on the CPU of tensors that all are on one device.

    From a GPU they are copied behind the work that it was given, into pinned memory, while the caller goes on and gives it more.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if tensors[0].device.type != "cuda":
            self._copies = tuple(tensor.cpu() for tensor in tensors)
            return
        self._copies = tuple(
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
            for tensor in tensors
        )
        with torch.cuda.device(tensors[0].device):
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def arrived(self) -> tuple[Tensor, ...]:
        """The copies, once they are complete."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copies
