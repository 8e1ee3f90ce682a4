"""The default: hooked where every attributed parameter is covered, functional otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trak.gradients.base import Consume, Gradients, Outputs
from trak.gradients.functional import Functional
from trak.gradients.hooked import Hooked
from trak.tasks.base import Task


@dataclass(frozen=True)
class Auto(Gradients):
    """`Hooked()` where it covers every attributed parameter, `Functional()` otherwise.

    `check_first_batch` also falls back from the first to the second if its gradients fail the check.
    """

    def candidates(self, model: nn.Module, names: Sequence[str]) -> tuple[Gradients, ...]:
        """Hooked, if it covers all, and functional."""
        hooked = Hooked()
        return (Functional(),) if hooked.covers(model, names) else (hooked, Functional())

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
