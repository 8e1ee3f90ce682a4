"""The default: hooked, with local passes where no layer rule helps; functional where even that cannot be; one by one as a last resort."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trak.errors import GradientError
from trak.gradients.base import Consume, Gradients, Outputs
from trak.gradients.functional import Functional
from trak.gradients.hooked import Hooked
from trak.gradients.mixed import widened, with_local_passes
from trak.gradients.reference import Reference
from trak.tasks.base import Task


@dataclass(frozen=True)
class Auto(Gradients):
    """`Hooked()`, with local passes through modules whose parameters no layer rule covers; else `Functional()`; else `Reference()`.

    `check_first_batch` also moves parameters whose gradients fail the check from rules to local passes, and
    falls back to `Functional()` if they fail there too, and from that to `Reference()`.
    """

    def candidates(self, model: nn.Module, names: Sequence[str]) -> tuple[Gradients, ...]:
        """Hooked, functional and one by one; not the first where a local pass would be one through the whole model."""
        hooked = with_local_passes(Hooked(), model, names)
        return (*(() if hooked is None else (hooked,)), Functional(), Reference())

    def instead(
        self, model: nn.Module, names: Sequence[str], failed: Gradients, error: GradientError
    ) -> Gradients | None:
        """Hooked with wider local passes for the parameters that failed."""
        return widened(failed, model, names, error) if isinstance(failed, Hooked) else None

    def compute(
        self,
        model: nn.Module,
        state: Mapping[str, Tensor],
        task: Task,
        batch: Any,
        names: Sequence[str],
        consume: Consume,
    ) -> Outputs:
        """As the preferred candidate; see `Gradients.compute`."""
        return select_gradients(self, model, names).compute(model, state, task, batch, names, consume)


def select_gradients(gradients: Gradients, model: nn.Module, names: Sequence[str]) -> Gradients:
    """The source that `gradients` stands for with this model and these parameters, unchecked.

    Raises:
        UnsupportedLayerError: a parameter is not covered, and nothing else was allowed.
    """
    return gradients.candidates(model, names)[0]
