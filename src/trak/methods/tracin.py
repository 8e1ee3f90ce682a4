"""TracIn (Pruthi, Liu, Kale, Sundararajan: "Estimating Training Data Influence by Tracing Gradient Descent", NeurIPS 2020).

With `normalise=True` it is GAS, gradient aggregated similarity (Hammoudeh, Lowd: "Identifying a Training-Set Attack's Target Using
Renormalized Influence Estimation", CCS 2022).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trak.datasets import as_rows
from trak.errors import InputError
from trak.methods.base import Attributor, FittedAttributor
from trak.methods.dot_scores import DotScores, Part, loss_gradients, squared_norms, unit_rows
from trak.methods.runs import Run, RunOptions, checkpoint_list, featurize_targets, start_run
from trak.results import Attribution


@dataclass(frozen=True, eq=False, kw_only=True)
class TracIn(RunOptions, Attributor):
    """TracInCP: inner products of loss gradients along the training trajectory; other arguments as in `trak.attribute`.

    τ(z_i, z) = Σ_m η_m ∇L_m(z_i)ᵀ∇L_m(z)

    over checkpoints m of one training run. The authors choose checkpoints at even distances between which the loss falls steadily,
    rather than converged ones, and η_m is the learning rate that was in force. Positive: a gradient step on z_i lowers the loss of z,
    which for the classification tasks is the same as raising its model output f.

    GAS (`normalise=True`) divides each gradient by its length, checkpoint by checkpoint: otherwise a few checkpoints early in
    training and examples with large losses have all the say.

        τ(z_i, z) = Σ_m η_m (∇L_m(z_i)/‖∇L_m(z_i)‖)ᵀ(∇L_m(z)/‖∇L_m(z)‖)

    Gradients are projected as TRAK's are; `trak.Identity()` leaves them as they are. With a `save_dir`, features are shared with
    TRAK's.

    Attributes:
        learning_rates: η_m > 0, one for each checkpoint, in their order; None for 1 throughout.
        normalise: GAS in place of TracIn.
        target: "loss" for ∇L_m(z) of the target as above, "output" for −∇f_m(z) in its place: positive then raises f for every
            task, and targets of which the models are sure have scores of the same size as others.
    """

    learning_rates: Sequence[float] | None = None
    normalise: bool = False
    target: str = "loss"

    def fit(self, train_set: Any, checkpoints: Sequence[Any] | None = None) -> FittedTracIn:
        """Featurize the training set at every checkpoint.

        Raises:
            InputError: another number of learning rates than checkpoints, or one that is no positive number.
            TrakError: anything wrong with the other arguments, the checkpoints, the gradients or the store.
        """
        if self.target not in ("loss", "output"):
            raise InputError(f'target must be "loss" or "output"; got {self.target!r}')
        rates = _check_rates(self.learning_rates, len(checkpoint_list(self.model, checkpoints)))
        return FittedTracIn(start_run(self, train_set, checkpoints), rates, self.normalise, self.target)


@dataclass(frozen=True, eq=False)
class FittedTracIn(FittedAttributor):
    """See `TracIn`."""

    run: Run
    learning_rates: tuple[float, ...]
    normalise: bool
    target: str

    def attribute(self, targets: Any) -> Attribution:
        """Σ_m η_m ∇L_m(z_i)ᵀ∇L_m(z), [N, T], computed where it is read; its self-influence is the paper's, for TracIn only.

        Raises:
            TrakError: anything wrong with the targets.
        """
        run, store = self.run, self.run.store
        target_rows = as_rows(targets, batch_size=run.options.batch_size, what="targets")
        experiment = featurize_targets(run, target_rows, as_training=self.target == "loss")
        parts, outputs = [], []
        for model_id, rate in zip(run.model_ids, self.learning_rates):
            rows = store.rows(model_id, experiment)
            block = rows.read(0, rows.num_rows)
            parts.append(Part(store.rows(model_id), self._vectors(block), rate))
            outputs.append(block.outputs)
        return Attribution(
            scores=DotScores(tuple(parts), run.setting.device, self.normalise, run.setting.progress),
            weights=torch.stack([part.rows.weights() for part in parts]).mean(0),
            outputs=torch.stack(outputs).mean(0),
            info={
                "method": "GAS" if self.normalise else "TracIn",
                "learning_rates": list(self.learning_rates),
                "target": self.target,
                "checkpoints": [store.checkpoint_fingerprint(model_id) for model_id in run.model_ids],
                "projection": dict(store.header.projection),
                "task": dict(store.header.task),
            },
            train_rows=run.train,
            target_rows=target_rows,
            # Of unit vectors it would be the same for every example.
            _self_influence=None if self.normalise else self._self_influence,
        )

    def _vectors(self, block: Any) -> Tensor:
        if self.target == "loss":
            return loss_gradients(block.features, block.weights, normalise=self.normalise)
        return unit_rows(block.features) if self.normalise else block.features

    def _self_influence(self) -> Tensor:
        """Σ_m η_m ‖∇L_m(z_i)‖², or with f for the target's loss Σ_m η_m q ‖∇f_m(z_i)‖², [N]."""
        power = 2 if self.target == "loss" else 1
        parts = [
            rate * squared_norms(self.run.store.rows(model_id), lambda q: q**power)
            for model_id, rate in zip(self.run.model_ids, self.learning_rates)
        ]
        return torch.stack(parts).sum(0)


def _check_rates(learning_rates: Sequence[float] | None, count: int) -> tuple[float, ...]:
    if learning_rates is None:
        return (1.0,) * count
    if isinstance(learning_rates, (int, float)):
        raise InputError(
            f"learning_rates must be a list, one for each checkpoint; got the number {learning_rates!r}: write [{learning_rates!r}] * {count}"
        )
    rates = tuple(float(rate) for rate in learning_rates)
    if len(rates) != count:
        raise InputError(
            f"learning_rates must have one entry for each checkpoint; got {len(rates)} for {count} checkpoints"
        )
    bad = [rate for rate in rates if not (rate > 0 and math.isfinite(rate))]
    if bad:
        raise InputError(
            f"learning rates must be positive numbers; got {bad[0]!r}. Leave out checkpoints at which nothing was learned"
        )
    return rates
