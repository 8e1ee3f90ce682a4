"""Random scores: the baseline that every method must beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trak.datasets import RowSource, as_rows
from trak.methods.base import Attributor, FittedAttributor
from trak.results import Attribution
from trak.scores import ArrayScores


@dataclass(frozen=True, kw_only=True)
class RandomScores(Attributor):
    """Independent standard normal scores.

    Attributes:
        seed: of the generator.
    """

    seed: int = 0

    def fit(self, train_set: Any, checkpoints: Sequence[Any] | None = None) -> FittedRandomScores:
        """Counts the training examples; checkpoints are not read."""
        return FittedRandomScores(as_rows(train_set, what="train_set"), self.seed)


@dataclass(frozen=True, eq=False)
class FittedRandomScores(FittedAttributor):
    """See `RandomScores`."""

    train: RowSource
    seed: int

    def attribute(self, targets: Any) -> Attribution:
        """Standard normal scores, [N, T]; the same for the same seed and sizes."""
        target_rows = as_rows(targets, what="targets")
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.train.num_rows, target_rows.num_rows)
        values_NT = torch.randn(shape, generator=generator, dtype=torch.float32)
        info = {"method": "random", "seed": self.seed}
        return Attribution(
            scores=ArrayScores(values_NT), info=info, train_rows=self.train, target_rows=target_rows
        )
