"""Which models a bank needs, and everything that decides them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trak.errors import InputError
from trak.evaluation._values import as_array, as_masks, check_axis, check_count
from trak.evaluation.retrain.randomness import model_seed
from trak.evaluation.subsets import random_subsets

GROWING = ("num_subsets", "models_per_subset", "masks", "rows_per_subset")
"""Settings that change where a bank is made larger."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One model to train.

    Attributes:
        subset: number of the subset, from 0.
        repeat: number of the model among those of its subset, from 0.
        seed: of the model.
    """

    subset: int
    repeat: int
    seed: int

    @property
    def name(self) -> str:
        """Stem of the model's files."""
        return f"subset-{self.subset:05d}-model-{self.repeat}"

    def __str__(self) -> str:
        return f"subset {self.subset}, model {self.repeat} (seed {self.seed})"


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """Everything that decides the models of a bank, apart from the caller's functions.

    Attributes:
        masks: [S, N] bool.
        models_per_subset: R.
        seed: of the bank.
        keep_models: whether the models' parameters are kept.
        target_rows: [T] int64, or None.
        version: the caller's word for the version of their functions and data, or None.
        recipe: further settings, JSON values.
    """

    masks: Tensor
    models_per_subset: int
    seed: int
    keep_models: bool
    target_rows: Tensor | None
    version: str | None
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def jobs(self) -> list[Job]:
        """The S·R models, by subset, then repeat."""
        return [
            Job(subset=s, repeat=r, seed=model_seed(self.seed, s, r))
            for s in range(len(self.masks))
            for r in range(self.models_per_subset)
        ]

    def rows(self, job: Job) -> Tensor:
        """[n] int64, ascending: the rows that the model sees."""
        return self.masks[job.subset].nonzero()[:, 0]

    def settings(self) -> dict[str, Any]:
        """JSON values that must be equal for models to belong to one bank."""
        sizes = self.masks.sum(dim=1)
        rows = self.target_rows
        return {
            "format": 1,
            "num_train": self.masks.shape[1],
            "num_subsets": len(self.masks),
            "models_per_subset": self.models_per_subset,
            "rows_per_subset": [int(sizes.min()), int(sizes.max())],
            "masks": _digest(np.packbits(self.masks.numpy(), axis=1)),
            "seed": self.seed,
            "keep_models": self.keep_models,
            "num_targets": None if rows is None else len(rows),
            "target_rows": None if rows is None else _digest(rows.numpy()),
            "version": self.version,
            **self.recipe,
        }

    def extends(self, stored: Mapping[str, Any]) -> bool:
        """Whether this is the plan of the stored settings with more subsets, more models per subset, or both.

        The models of the smaller plan are then models of this one: a subset and a seed depend on the numbers of subset and
        repeat, not on how many there are.
        """
        asked, sizes = self.settings(), ("num_subsets", "models_per_subset")
        if set(asked) != set(stored) or any(
            asked[name] != stored[name] for name in asked if name not in GROWING
        ):
            return False
        if any(not isinstance(stored[name], int) or stored[name] > asked[name] for name in sizes):
            return False
        prefix = self.masks[: stored["num_subsets"]]
        return bool(_digest(np.packbits(prefix.numpy(), axis=1)) == stored["masks"])


def fingerprint(settings: Mapping[str, Any]) -> str:
    """SHA-256 of settings, in hexadecimal; every file of a model carries it."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def make_plan(
    num_train: int,
    *,
    masks: Any,
    num_subsets: int | None,
    fraction: float,
    models_per_subset: int,
    seed: int,
    keep_models: bool,
    target_rows: Any,
    version: str | None,
    recipe: Mapping[str, Any],
) -> Plan:
    """Check the arguments that `retrain` and `retrain_stacked` share.

    Raises:
        InputError: an impossible one.
    """
    check_count(num_train, "num_train", 1)
    check_count(models_per_subset, "models_per_subset", 1)
    check_count(seed, "seed", 0)
    if version is not None and not isinstance(version, str):
        raise InputError(f"version must be a string, got {version!r}.")
    if (masks is None) == (num_subsets is None):
        raise InputError(
            "Give either masks [S, N] (which rows each model sees) or num_subsets (to have them drawn), "
            f"got {'neither' if masks is None else 'both'}."
        )
    if num_subsets is not None:
        chosen = random_subsets(num_train, num_subsets, fraction, seed=seed)
    else:
        chosen = torch.from_numpy(np.ascontiguousarray(as_masks(masks)))
        check_axis(chosen.shape[1], num_train, what="masks", axis="N (training rows)", other="num_train")
        empty = (~chosen.any(dim=1)).nonzero()[:, 0].tolist()
        if empty:
            raise InputError(
                f"masks: subset {empty[0]} holds no rows; a model cannot be trained on none. Leave it out."
            )
    rows = None
    if target_rows is not None:
        array = as_array(target_rows)
        if array.ndim != 1 or array.dtype.kind not in "iu" or len(array) == 0:
            raise InputError(
                f"target_rows must be [T] integers, got {array.dtype} of shape {list(array.shape)}."
            )
        rows = torch.from_numpy(array.astype(np.int64))
    return Plan(
        masks=chosen,
        models_per_subset=models_per_subset,
        seed=seed,
        keep_models=keep_models,
        target_rows=rows,
        version=version,
        recipe=recipe,
    )


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]
