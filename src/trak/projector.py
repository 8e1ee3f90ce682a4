"""Batches in, projected gradients out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from trak import batches
from trak.errors import NonFiniteError
from trak.gradients import (
    Outputs,
    forward_outputs,
    select_gradients,
)
from trak.projection import Factors, FittedProjection, Leading, ProjectionState
from trak.setting import Setting, bound_task, prepare, refuse_modes
from trak.tasks.looking import values_unseen
from trak.transfer import Leaving


class Projector:
    """Projected gradients of batches at one checkpoint: (batch) -> (φ [B, K], outputs), all on the CPU."""

    def __init__(
        self,
        setting: Setting,
        state: Mapping[str, Tensor],
        model_id: int,
        factors: Mapping[str, Factors | Leading] | None = None,
    ) -> None:
        self.setting, self.state, self.model_id, self.factors = setting, state, model_id, factors
        self.names = list(setting.shapes)
        self.task = bound_task(setting, state)
        self.gradients = select_gradients(setting.gradients, setting.model, self.names)

    @cached_property
    def drawn(self) -> ProjectionState:
        """The projection's state: prepared when the first gradients are to be projected.

        Raises:
            ProjectionError: the projection is fitted, and there are no factors.
        """
        setting = self.setting
        options: dict[str, Any] = {"device": setting.device, "dtype": setting.sum_dtype}
        if isinstance(setting.projection, FittedProjection):
            options["factors"] = self.factors
        return setting.projection.init(setting.shapes, checkpoint=self.model_id, **options)

    def outputs(self, batch: Any) -> Tensor:
        """F [B] of a prepared batch by one forward pass, on the CPU."""
        return forward_outputs(self.setting.model, self.state, self.task, batch).f.cpu()

    def __call__(self, batch: Any, *, label: str = "batch") -> tuple[Tensor, Outputs]:
        """φ [B, K] and outputs (f [B], q [B]) of a prepared batch.

        Raises:
            NonFiniteError: an output, a weight or a feature is NaN or infinite.
            InputError: a batch that the task refuses; or under inference mode or autocast.
        """
        return self.start(batch, label=label)()

    def start(self, batch: Any, *, label: str = "batch") -> Callable[[], tuple[Tensor, Outputs]]:
        """Give a prepared batch to the device; what returns (or raises) what calling this does, once the device is done."""
        setting = self.setting
        refuse_modes(setting.device)
        features_BK = self.drawn.zeros(batches.batch_size(batch))
        with values_unseen() if has_queue(setting.device) else nullcontext():
            outputs = self.gradients.compute(
                setting.model,
                self.state,
                self.task,
                batch,
                self.names,
                lambda block: setting.projection.add(self.drawn, block, features_BK),
            )
        return partial(self._finish, Leaving(features_BK, outputs.f, outputs.q), batch, label)

    def _finish(self, leaving: Leaving, batch: Any, label: str) -> tuple[Tensor, Outputs]:
        features_BK, f_B, q_B = leaving.arrived()
        outputs = Outputs(f_B, q_B)
        where = f"checkpoint {self.model_id}, {label}"
        try:
            refuse_nonfinite(features_BK, outputs, where=where, what="projected gradients")
        except NonFiniteError:
            # The task may know better what is wrong with the batch, where it looks at its values.
            self.outputs(batch)
            raise
        return features_BK, outputs


def projected(
    projector: Projector, numbered: Iterable[tuple[Tensor, Any]], label: str
) -> Iterator[tuple[Tensor, tuple[Tensor, Outputs]]]:
    """(row numbers, what the projector makes of the batch), in order.

    A device with a queue of its own is given the next batch before the results of the last are waited for, so that it has work while they
    are checked and stored and another batch is loaded.
    """
    ahead = 1 if has_queue(projector.setting.device) else 0
    started: deque[tuple[Tensor, Callable[[], tuple[Tensor, Outputs]]]] = deque()
    for row_numbers, batch in numbered:
        where = f"{label}, rows {int(row_numbers[0])} to {int(row_numbers[-1])}"
        started.append((row_numbers, projector.start(prepare(projector.setting, batch), label=where)))
        while len(started) > ahead:
            waiting, finish = started.popleft()
            yield waiting, finish()
    for waiting, finish in started:
        yield waiting, finish()


def has_queue(device: torch.device) -> bool:
    """Whether calls return before the device has done what they ask for."""
    return device.type == "cuda"


def refuse_nonfinite(gradients_BK: Tensor, outputs: Outputs, *, where: str, what: str) -> None:
    """Raise where a row of a batch holds NaN or infinity.

    Args:
        gradients_BK: of the batch, projected or whole.
        outputs: f and q of the same rows.
        where: begins the message.
        what: the gradients' name in it.

    Raises:
        NonFiniteError: the first such rows, by their positions in the batch.
    """
    for named, values in (("model outputs", outputs.f), ("loss weights", outputs.q), (what, gradients_BK)):
        rows = values.reshape(len(values), -1)
        # A sum is finite only if all of its terms are. It may overflow where they are: only such rows are looked at.
        suspects = (~rows.sum(1).isfinite()).nonzero().squeeze(1)
        bad = [int(row) for row in suspects if not bool(rows[row].isfinite().all())]
        if bad:
            raise NonFiniteError(
                f"{where}: {named} are NaN or infinite for {len(bad)} of {len(rows)} examples, first at position {bad[0]} of the batch. "
                "Look at the model's output there; a model in float16 may overflow: try dtype=torch.float32"
            )
