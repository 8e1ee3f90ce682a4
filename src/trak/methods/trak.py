"""TRAK (Park, Georgiev, Ilyas, Leclerc, Madry: "TRAK: Attributing Model Behavior at Scale", ICML 2023, arXiv 2303.14186)."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trak._version import __version__
from trak.datasets import as_rows
from trak.errors import InputError
from trak.methods.base import Attributor, FittedAttributor
from trak.methods.damping import damping_for
from trak.methods.runs import Run, RunOptions, featurize_targets, start_run
from trak.methods.weights import member_weights, resolve_curvature, resolve_exponent, trajectory_weights
from trak.pipeline import fit, leverages, score, self_influence
from trak.precondition import Damping, Preconditioner, resolve_damping
from trak.projection.layout import group_by_layer
from trak.results import Attribution
from trak.store import Store
from trak.tasks import resolve_task


@dataclass(frozen=True, eq=False, kw_only=True)
class TRAK(RunOptions, Attributor):
    """TRAK with its settings; arguments as in `trak.attribute`, and alternatives to the estimate that it makes.

    Attributes:
        damping: λ, or the rule for it.
        preconditioner: "whole" or "per_layer".
        weight_exponent: γ in the weights q̄_i = mean over checkpoints of q_i^γ. 1 is the paper's formula, and right for convex models. None: 1/2
            for losses of a probability, because q = 1 − p at the end of training understates the examples that the network has fitted,
            and 1 otherwise. design/defaults.md has the figures.
        trajectories: for each checkpoint, earlier checkpoints of the same run: its weights q are averaged over them as well, at the price of a
            forward pass each. Better than the square root where they were kept; γ is then 1 by default.
        gram: "logistic" for ΦᵀR^γΦ with R = q (1 − q), the second derivative of the log loss, and the γ of the weights; or "uniform" for ΦᵀΦ,
            which the paper puts in its place. None: logistic for losses of a probability, uniform otherwise.
        leverage_correction: divide by 1 − h_i, h_i the leverage of row i: the effect of leaving i out in place of that of weighting it
            infinitesimally less (Pregibon 1981).
    """

    damping: float | str | Damping = "auto"
    preconditioner: str = "whole"
    weight_exponent: float | None = None
    trajectories: Sequence[Sequence[Any]] | None = None
    gram: str | None = None
    leverage_correction: bool = False

    def fit(self, train_set: Any, checkpoints: Sequence[Any] | None = None) -> FittedTRAK:
        """Featurize the training set at every checkpoint and factorise the Gram matrices.

        Raises:
            TrakError: anything wrong with the arguments, the checkpoints, the gradients or the store.
        """
        resolve_damping(self.damping)  # raises before anything is computed
        self._check()
        task = resolve_task(self.task)
        exponent = resolve_exponent(
            self.weight_exponent, task, has_trajectories=self.trajectories is not None
        )
        curvature = resolve_curvature(self.gram, task, exponent)
        run = start_run(self, train_set, checkpoints, is_fitted=True)
        damping = damping_for(self.damping, run.setting.projection, task)
        groups = column_groups(run, self.preconditioner)
        fits: dict[str, Any] = {
            "num_checkpoints": len(run.model_ids),
            "device": run.setting.device,
            "curvature_exponent": curvature,
            "progress": self.progress,
        }
        preconditioners = tuple(
            fit(
                run.store.rows(model_id),
                damping,
                groups,
                where=f"checkpoint {index + 1} of {len(run.model_ids)}",
                **fits,
            )
            for index, model_id in enumerate(run.model_ids)
        )
        weights = member_weights(run.store, run.model_ids, exponent)
        if self.trajectories is not None:
            weights = trajectory_weights(run, self.trajectories, exponent)
        if self.leverage_correction:
            weights = tuple(
                weights_N
                / (1 - leverages(run.store.rows(model_id), preconditioner, curvature_exponent=curvature))
                for weights_N, model_id, preconditioner in zip(weights, run.model_ids, preconditioners)
            )
        return FittedTRAK(run, self, damping, curvature, exponent, preconditioners, weights)

    def _check(self) -> None:
        if self.preconditioner not in ("whole", "per_layer"):
            raise InputError(f'preconditioner must be "whole" or "per_layer"; got {self.preconditioner!r}')


@dataclass(frozen=True, eq=False)
class FittedTRAK(FittedAttributor):
    """TRAK's training side, done: attribute as many sets of targets as you like."""

    run: Run
    method: TRAK
    damping: Damping
    curvature_exponent: float
    weight_exponent: float
    preconditioners: tuple[Preconditioner, ...]
    weights: tuple[Tensor, ...]

    def attribute(self, targets: Any) -> Attribution:
        """τ of every training example for every target, [N, T]; computed where it is read.

        Raises:
            TrakError: anything wrong with the targets.
        """
        run = self.run
        target_rows = as_rows(targets, batch_size=run.options.batch_size, what="targets")
        experiment = featurize_targets(run, target_rows)
        attribution = stored_attribution(
            run.store,
            run.model_ids,
            experiment,
            self.preconditioners,
            self.weights,
            device=run.setting.device,
            progress=run.setting.progress,
            info=self._info(target_rows.num_rows),
        )
        return replace(attribution, train_rows=run.train, target_rows=target_rows)

    def _info(self, num_targets: int) -> dict[str, Any]:
        header = self.run.store.header
        return {
            "method": "TRAK",
            "trak_version": __version__,
            "torch_version": torch.__version__,
            "python_version": platform.python_version(),
            "model": type(self.run.options.model).__name__,
            "task": dict(header.task),
            "num_train": header.num_rows,
            "num_targets": num_targets,
            "num_checkpoints": len(self.run.model_ids),
            "checkpoints": [
                self.run.store.checkpoint_fingerprint(model_id) for model_id in self.run.model_ids
            ],
            "attributed_parameters": sum(
                int(torch.Size(shape).numel()) for shape in header.parameters.values()
            ),
            "projection": dict(header.projection),
            "projection_dimension": header.dim,
            "preconditioner": self.method.preconditioner,
            "gram": "uniform" if self.curvature_exponent == 0 else "logistic",
            "curvature_exponent": self.curvature_exponent,
            "weight_exponent": self.weight_exponent,
            "trajectories": None
            if self.method.trajectories is None
            else [len(run) for run in self.method.trajectories],
            "leverage_correction": self.method.leverage_correction,
            "damping_rule": self.damping.fingerprint(),
            "damping": [list(preconditioner.dampings) for preconditioner in self.preconditioners],
            "compute_dtype": header.compute_dtype,
            "feature_dtype": header.feature_dtype,
            "device": str(self.run.setting.device),
        }


def stored_attribution(
    store: Store,
    model_ids: Sequence[int],
    experiment: str,
    preconditioners: Sequence[Preconditioner],
    weights: tuple[Tensor, ...],
    *,
    device: torch.device,
    progress: bool | None,
    info: Mapping[str, Any],
) -> Attribution:
    """TRAK's attribution from a store that holds training features and an experiment's targets at every checkpoint.

    Raises:
        MissingRowsError: some rows are not there.
    """
    scores = score(store, model_ids, experiment, preconditioners, weights, device=device, progress=progress)
    outputs = [store.rows(model_id, experiment).outputs() for model_id in model_ids]
    return Attribution(
        scores=scores,
        weights=scores.weights,
        outputs=torch.stack(outputs).mean(0),
        info=info,
        members=tuple(scores.member(index, weight) for index, weight in enumerate(weights)),
        _self_influence=lambda: self_influence(store, model_ids, preconditioners, weights, progress=progress),
    )


def column_groups(run: Run, preconditioner: str) -> tuple[tuple[int, int], ...]:
    """The column slices to precondition apart from one another.

    Raises:
        InputError: one block per layer is asked for, and the projection sums all layers into the same columns.
    """
    if preconditioner == "whole":
        return ((0, run.store.header.dim),)
    if len(run.groups) == 1 and len(group_by_layer(run.setting.shapes)) > 1:
        raise InputError(
            f'preconditioner="per_layer" needs a projection that gives each layer its own columns, and {run.setting.projection!r} sums them '
            "together: use trak.Kronecker(dim), or per_layer=True with the other kinds"
        )
    return run.groups
