"""The caller's training function, called with kept rows and its outputs checked.

Legend: N training rows, T targets, R training seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trak.errors import InputError, NonFiniteError
from trak.evaluation._kept import Kept
from trak.evaluation._reading import Rows
from trak.evaluation._values import Floats, as_array
from trak.progress import Bar

Train = Callable[[Tensor, int], Any]
"""(indices [n] int64, rising; seed) -> the model outputs of all T targets after training on these rows."""


@dataclass(frozen=True, eq=False)
class Retraining:
    """Trains without some rows, with each of R seeds.

    Attributes:
        train: the caller's function.
        num_rows: N.
        num_targets: T, outputs that it must return.
        shown: a progress bar of trainings.
        kept: outputs of models that were trained before; None to train every one.
    """

    train: Train
    num_rows: int
    num_targets: int
    shown: Bar
    kept: Kept | None = None

    def without(self, removed: Rows, seed: int) -> Floats:
        """Outputs [T] after training without `removed`, or from the folder where they are there.

        Raises:
            InputError: `train` returns something else than T numbers.
            NonFiniteError: it returns NaN or infinity.
        """
        kept = np.ones(self.num_rows, dtype=np.bool_)
        kept[removed] = False
        indices = torch.from_numpy(np.flatnonzero(kept))
        floats = None if self.kept is None else self.kept.get(indices, seed)
        if floats is None:
            floats = self._train(indices, seed)
            if self.kept is not None:
                self.kept.put(indices, seed, floats)
        self.shown.update(1)
        return floats

    def _train(self, indices: Tensor, seed: int) -> Floats:
        outputs = as_array(self.train(indices, seed))
        where = f"train(indices of {len(indices)} rows, seed={seed})"
        if outputs.shape != (self.num_targets,) or outputs.dtype.kind not in "biuf":
            raise InputError(
                f"{where} must return one output for each of the {self.num_targets} targets that are scored, "
                f"got dtype {outputs.dtype} of shape {list(outputs.shape)}."
            )
        floats = outputs.astype(np.float64)
        if not np.isfinite(floats).all():
            target = int(np.flatnonzero(~np.isfinite(floats))[0])
            raise NonFiniteError(
                f"{where} returned {floats[target]} for target {target}. Training diverged, or the output "
                "overflows (of a probability of exactly 1, say)."
            )
        return floats

    def without_by_seed(self, removed: Rows, seeds: range) -> Floats:
        """Outputs [R, T] after training without `removed` with each seed."""
        return np.stack([self.without(removed, seed) for seed in seeds])


def keep_in(
    folder: str | Path | None, train: Train, *, num_rows: int, num_targets: int, version: str | None
) -> Kept | None:
    """Where outputs are kept, if anywhere.

    Raises:
        InputError: a version that is no string, or one without a folder.
        FingerprintError: the folder is of other data or another version.
    """
    if version is not None and not isinstance(version, str):
        raise InputError(f"version must be a string, got {version!r}.")
    if folder is None:
        if version is not None:
            raise InputError("version= says which models in a folder fit; pass folder= too.")
        return None
    # Functions cannot be compared, but one that returns something else mostly has another name.
    name = getattr(train, "__qualname__", type(train).__qualname__)
    return Kept(folder, num_rows=num_rows, num_targets=num_targets, train=name, version=version)


def check_train(train: Any) -> None:
    """Raise InputError unless `train` can be called."""
    if not callable(train):
        raise InputError(
            "train must be a function (indices, seed) -> outputs [T] that trains on those rows, "
            f"got {type(train).__name__}."
        )
