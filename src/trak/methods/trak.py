"""TRAK (Park, Georgiev, Ilyas, Leclerc, Madry: "TRAK: Attributing Model Behavior at Scale", ICML 2023, arXiv 2303.14186)."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from trak._version import __version__
from trak.datasets import as_rows
from trak.errors import InputError
from trak.methods.base import Attributor, FittedAttributor
from trak.methods.runs import Run, RunOptions, featurize_targets, start_run
from trak.pipeline import fit, score, self_influence
from trak.precondition import Damping, Preconditioner, resolve_damping
from trak.results import Attribution
from trak.store import Store


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
        fits: dict[str, Any] = {
            "num_checkpoints": len(run.model_ids),
            "device": run.setting.device,
            "progress": self.progress,
        }
        preconditioners = [
            fit(
                run.store.rows(model_id),
                damping,
                groups,
                where=f"checkpoint {index + 1} of {len(run.model_ids)}",
                **fits,
            )
            for index, model_id in enumerate(run.model_ids)
        ]
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
        attribution = stored_attribution(
            run.store,
            run.model_ids,
            experiment,
            self.preconditioners,
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
            "preconditioner": self.preconditioner,
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
    *,
    device: torch.device,
    progress: bool | None,
    info: Mapping[str, Any],
) -> Attribution:
    """TRAK's attribution from a store that holds training features and an experiment's targets at every checkpoint.

    Raises:
        MissingRowsError: some rows are not there.
    """
    scores = score(store, model_ids, experiment, preconditioners, device=device, progress=progress)
    weights = [store.rows(model_id).weights() for model_id in model_ids]
    outputs = [store.rows(model_id, experiment).outputs() for model_id in model_ids]
    return Attribution(
        scores=scores,
        weights=scores.weights,
        outputs=torch.stack(outputs).mean(0),
        info=info,
        members=tuple(scores.member(index, weight) for index, weight in enumerate(weights)),
        _self_influence=lambda: self_influence(store, model_ids, preconditioners, progress=progress),
    )


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
