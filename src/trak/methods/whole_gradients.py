"""Batches of whole per-example gradients, P numbers each, for methods in the parameters themselves.

The same as a `Projector` with the projection `Identity`, which is the reference, where memory and its traffic decide: a batch is
gigabytes for a model with millions of parameters, so the array is used again, and read once to see that it is finite.

Shape legend: B examples of a batch, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trak import batches
from trak.blocks import Block
from trak.gradients import Outputs
from trak.projector import Projector, refuse_nonfinite
from trak.setting import Setting


class WholeGradients:
    """(prepared batch) -> (∇f [B, P] on the device, outputs on the CPU) at one checkpoint.

    The gradients are valid until the next call, which writes into the same memory.
    """

    def __init__(self, setting: Setting, state: Mapping[str, Tensor]) -> None:
        self._setting, self._state = setting, state
        self._projector = Projector(setting, state, 0)
        self._memory: Tensor | None = None

    def __call__(self, batch: Any, *, label: str) -> tuple[Tensor, Outputs]:
        """Gradients and outputs.

        Raises:
            NonFiniteError: an output, a weight or a gradient is NaN or infinite.
        """
        projector, setting = self._projector, self._setting
        features_BP = self._zeros(batches.batch_size(batch))

        def add(block: Block) -> None:
            setting.projection.add(projector.drawn, block, features_BP)

        outputs = projector.gradients.compute(
            setting.model, self._state, projector.task, batch, projector.names, add
        )
        outputs = Outputs(outputs.f.cpu(), outputs.q.cpu())
        refuse_nonfinite(features_BP, outputs, where=label, what="gradients")
        return features_BP, outputs

    def _zeros(self, size: int) -> Tensor:
        if self._memory is None or len(self._memory) < size:
            self._memory = None  # before there is a second one
            self._memory = self._projector.drawn.zeros(size)
            return self._memory
        return self._memory[:size].zero_()
