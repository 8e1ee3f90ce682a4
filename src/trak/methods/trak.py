"""TRAK (Park, Georgiev, Ilyas, Leclerc, Madry: "TRAK: Attributing Model Behavior at Scale", ICML 2023, arXiv 2303.14186)."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trak._version import __version__
from trak.datasets import as_rows
from trak.errors import InputError
from trak.methods.base import Attributor, FittedAttributor
from trak.methods.runs import Run, RunOptions, featurize_targets, start_run
from trak.pipeline import fit, score
from trak.precondition import Damping, Preconditioner, resolve_damping
from trak.progress import bar
from trak.results import Attribution


@dataclass(frozen=True, eq=False, kw_only=True)
class TRAK(RunOptions, Attributor):
    """TRAK with its settings; arguments as in `trak.attribute`."""

    damping: float | str | Damping = "auto"
    preconditioner: str = "whole"

    def fit(self, train_set: Any, checkpoints: Sequence[Any] | None = None) -> FittedTRAK:
        """Featurize the training set at every checkpoint and factorise the Gram matrices.

        Raises:
            TrakError: anything wrong with the arguments, the checkpoints, the gradients or the store.
        """
        damping = resolve_damping(self.damping)
        if self.preconditioner not in ("whole", "per_layer"):
            raise InputError(f'preconditioner must be "whole" or "per_layer"; got {self.preconditioner!r}')
        run = start_run(self, train_set, checkpoints)
        groups = column_groups(run, self.preconditioner)
        preconditioners = []
        for index, model_id in enumerate(run.model_ids):
            where = f"checkpoint {index + 1} of {len(run.model_ids)}"
            rows = run.store.rows(model_id)
            preconditioners.append(
                fit(rows, damping, groups, device=run.setting.device, where=where, progress=self.progress)
            )
        return FittedTRAK(run, damping, tuple(preconditioners), self.preconditioner)


@dataclass(frozen=True, eq=False)
class FittedTRAK(FittedAttributor):
    """TRAK's training side, done: attribute as many sets of targets as you like."""

    run: Run
    damping: Damping
    preconditioners: tuple[Preconditioner, ...]
    preconditioner: str

    def attribute(self, targets: Any) -> Attribution:
        """τ of every training example for every target, [N, T]; computed where it is read.

        Raises:
            TrakError: anything wrong with the targets.
        """
        run = self.run
        target_rows = as_rows(targets, batch_size=run.options.batch_size, what="targets")
        experiment = featurize_targets(run, target_rows)
        device = run.setting.device
        scores = score(
            run.store, run.model_ids, experiment, self.preconditioners, device=device, progress=run.setting.progress
        )
        weights = [run.store.rows(model_id).weights() for model_id in run.model_ids]
        outputs = torch.stack(
            [run.store.rows(model_id, experiment).outputs() for model_id in run.model_ids]
        ).mean(0)
        return Attribution(
            scores=scores,
            weights=scores.weights,
            outputs=outputs,
            info=self._info(target_rows.num_rows),
            members=tuple(scores.member(index, weight) for index, weight in enumerate(weights)),
            train_rows=run.train,
            target_rows=target_rows,
            _self_influence=self.self_influence,
        )

    def self_influence(self) -> Tensor:
        """τ(z_i)_i = [1/M Σ_m φ_m(z_i)ᵀ(Φ_mᵀΦ_m + λ_m I)⁻¹φ_m(z_i)] · q̄_i, [N] float64."""
        run = self.run
        total_N = torch.zeros(run.store.header.num_rows, dtype=torch.float64)
        weights_N = torch.zeros_like(total_N)
        with bar(len(total_N) * len(run.model_ids), "Self-influence", enabled=run.setting.progress) as shown:
            for model_id, preconditioner in zip(run.model_ids, self.preconditioners):
                rows = run.store.rows(model_id)
                weights_N += rows.weights().double()
                for block in rows.blocks():
                    stop = block.start + block.features.shape[0]
                    total_N[block.start : stop] += preconditioner.leverage(
                        block.features.to(run.setting.device)
                    ).cpu()
                    shown.update(stop - block.start)
        return total_N * weights_N / len(run.model_ids) ** 2

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
            "preconditioner": self.preconditioner,
            "damping_rule": self.damping.fingerprint(),
            "damping": [list(preconditioner.dampings) for preconditioner in self.preconditioners],
            "compute_dtype": header.compute_dtype,
            "feature_dtype": header.feature_dtype,
            "device": str(self.run.setting.device),
        }


def column_groups(run: Run, preconditioner: str) -> tuple[tuple[int, int], ...]:
    """The column slices to precondition apart from one another.

    Raises:
        InputError: one block per layer is asked for, and the projection sums all layers into the same columns.
    """
    if preconditioner == "whole":
        return ((0, run.store.header.dim),)
    if len(run.groups) == 1 and len(run.setting.shapes) > 1:
        raise InputError(
            f'preconditioner="per_layer" needs a projection that gives each layer its own columns, and {run.setting.projection!r} sums them '
            "together: use trak.Kronecker(dim), or per_layer=True with the other kinds"
        )
    return run.groups
