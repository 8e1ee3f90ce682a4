"""One example by itself through batch norm: gradients laid out so that torch reads them rightly.

In evaluation mode torch's batch norm on the CPU takes a gradient for one that is laid out as its input is where it is not, if the
batch has one example and the gradient comes from a transposed tensor (`y.flatten(2).transpose(1, 2)`, as in vision
transformers with a convolutional stem): what it then gives is wrong, by any factor, without a word. Two examples or more are
not affected. Seen from torch 2.4 to 2.15.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_BATCH_NORMS = frozenset({F.batch_norm, torch.batch_norm})


def laid_out(batch_size: int) -> AbstractContextManager[object]:
    """Enter it around the forward pass of a batch: gradients reach every batch norm laid out as its outputs are.

    Args:
        batch_size: where it is not 1 nothing is done.
    """
    return _LaidOut() if batch_size == 1 else nullcontext()


class _LaidOut(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        return _Contiguous.apply(outputs) if func in _BATCH_NORMS else outputs


class _Contiguous(torch.autograd.Function):
    """A copy; the gradient comes back contiguous."""

    generate_vmap_rule = True

    @staticmethod
    def forward(outputs: Tensor) -> Tensor:
        return outputs.clone()  # not a view: what follows may work in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0].contiguous()
