"""Similarity of gradients: the dot product or cosine of per-example gradients, averaged over checkpoints.

The cosine is GradCos of Hanawa et al. 2021 ("Evaluation of Similarity-Based Explanations", ICLR); the dot product is one term of TracIn
(Pruthi et al. 2020) without its learning rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trak.datasets import as_rows
from trak.errors import InputError
from trak.methods.base import Attributor, FittedAttributor
from trak.methods.dot_scores import DotScores, Part, unit_rows
from trak.methods.runs import Run, RunOptions, featurize_targets, start_run
from trak.results import Attribution


@dataclass(frozen=True, eq=False, kw_only=True)
class GradientSimilarity(RunOptions, Attributor):
    """Cosine (or dot product) of loss gradients; arguments as in `trak.attribute`.

    The gradient of the loss is −q times the gradient of the model output, so the sign is kept as for every method here: a training
    example whose gradient step lowers the target's loss is positive. With a `save_dir`, features are shared with TRAK's of the same projection.

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
        cosine, share = self.similarity == "cosine", 1 / len(run.model_ids)
        parts = []
        for model_id in run.model_ids:
            rows = run.store.rows(model_id, experiment)
            features_TK = rows.read(0, rows.num_rows).features
            parts.append(
                Part(run.store.rows(model_id), unit_rows(features_TK) if cosine else features_TK, share)
            )
        scores = DotScores(tuple(parts), run.setting.device, cosine, run.setting.progress)
        info = {"method": f"gradient {self.similarity}", "projection": dict(run.store.header.projection)}
        return Attribution(scores=scores, info=info, train_rows=run.train, target_rows=target_rows)
