"""What every attribution method has in common, so that evaluation and report never ask which one it was."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from trak.results import Attribution


class FittedAttributor(ABC):
    """A method that has seen the training set and the checkpoints."""

    @abstractmethod
    def attribute(self, targets: Any) -> Attribution:
        """Scores [N, T] of the training examples for the targets (a loader, dataset or tensors, as for `fit`)."""


class Attributor(ABC):
    """A method with its settings: an immutable description.

    fitted = TRAK(model=model, task="image_classification").fit(train_set, checkpoints)
    attribution = fitted.attribute(targets)
    """

    @abstractmethod
    def fit(self, train_set: Any, checkpoints: Sequence[Any] | None = None) -> FittedAttributor:
        """Everything that does not depend on the targets.

        Args:
            train_set: a loader, dataset or tensors; see `trak.datasets.as_rows`.
            checkpoints: what `trak.load_checkpoint` takes, one for each model of the ensemble; None for the model's own state.
        """
