"""Similarity of gradients: the dot product or cosine of per-example gradients, averaged over checkpoints.

The cosine is GradCos of Hanawa et al. 2021 ("Evaluation of Similarity-Based Explanations", ICLR); the dot product is one term of TracIn
(Pruthi et al. 2020) without its learning rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trak.datasets import as_rows
from trak.errors import InputError
from trak.methods.base import Attributor, FittedAttributor
from trak.methods.runs import Run, RunOptions, featurize_targets, start_run
from trak.results import Attribution
from trak.scores import Scores


@dataclass(frozen=True, eq=False, kw_only=True)
class GradientSimilarity(RunOptions, Attributor):
    """Cosine (or dot product) of loss gradients; arguments as in `trak.attribute`.

    The gradient of the loss is −q times the gradient of the model output, so the sign is kept as for every method here: a training
    example whose gradient step lowers the target's loss is positive. With a `save_dir`, features are shared with TRAK's.

    Attributes:
        similarity: "cosine" or "dot".
    """

    similarity: str = "cosine"

    def fit(self, train_set: Any, checkpoints: Sequence[Any] | None = None) -> FittedGradientSimilarity:
        """Featurize the training set at every checkpoint."""
        if self.similarity not in ("cosine", "dot"):
            raise InputError(f'similarity must be "cosine" or "dot"; got {self.similarity!r}')
        return FittedGradientSimilarity(start_run(self, train_set, checkpoints), self.similarity)


@dataclass(frozen=True, eq=False)
class FittedGradientSimilarity(FittedAttributor):
    """See `GradientSimilarity`."""

    run: Run
    similarity: str

    def attribute(self, targets: Any) -> Attribution:
        """1/M Σ_m similarity(∇L_m(z_i), ∇f_m(z)), [N, T], computed where it is read."""
        run = self.run
        target_rows = as_rows(targets, batch_size=run.options.batch_size, what="targets")
        experiment = featurize_targets(run, target_rows)
        parts = []
        for model_id in run.model_ids:
            rows = run.store.rows(model_id, experiment)
            parts.append((run.store.rows(model_id), rows.read(0, rows.num_rows).features))
        scores = SimilarityScores(tuple(parts), self.similarity == "cosine")
        info = {"method": f"gradient {self.similarity}", "projection": dict(run.store.header.projection)}
        return Attribution(scores=scores, info=info, train_rows=run.train, target_rows=target_rows)


@dataclass(frozen=True, eq=False, repr=False)
class SimilarityScores(Scores):
    """Mean over checkpoints of the similarity of stored features.

    Attributes:
        parts: (training rows, target features [T, K]) of each checkpoint.
        cosine: divide by both norms; otherwise the dot product of loss gradients, q_i φ(z_i)ᵀφ(z).
    """

    parts: tuple[tuple[Any, Tensor], ...]
    cosine: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(N, T)."""
        return self.parts[0][0].num_rows, self.parts[0][1].shape[0]

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start to stop, [stop − start, T]."""
        return torch.stack([self._part(*part, start, stop) for part in self.parts]).mean(0)

    def select_targets(self, targets: Tensor) -> Scores:
        """Some of the targets."""
        return SimilarityScores(
            tuple((rows, features_TK[targets]) for rows, features_TK in self.parts), self.cosine
        )

    def _part(self, rows: Any, targets_TK: Tensor, start: int, stop: int) -> Tensor:
        block = rows.read(start, stop)
        features_RK = block.features
        if not self.cosine:
            return (features_RK @ targets_TK.T.to(features_RK)) * block.weights.to(features_RK).unsqueeze(1)
        normalise = torch.nn.functional.normalize
        return normalise(features_RK, dim=1) @ normalise(targets_TK.to(features_RK), dim=1).T
