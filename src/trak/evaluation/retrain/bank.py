"""Outputs of models retrained on subsets: what the linear datamodeling score compares predictions with.

Legend: N training rows, S subsets, R models per subset, T targets.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trak.errors import InputError, StoreError
from trak.evaluation._values import as_array, as_masks, check_axis, check_count, check_finite
from trak.evaluation.lds import LdsResult, lds
from trak.evaluation.retrain.files import make_folder, read_tensors, write_tensors

BANK_FILE = "bank.safetensors"
PACKED_FILE = "bank.npz"
SETTINGS_FILE = "retrain.json"
FORMAT = "trak bank 1"


@dataclass(frozen=True, eq=False, kw_only=True)
class Bank:
    """Subsets of the training rows, and the outputs of models trained on each.

    Arrays and lists are taken too, and converted.

    Attributes:
        masks: [S, N] bool, the rows that the models of each subset saw.
        outputs: [S, R, T] float64, the model output f of each target for each model; finite.
        target_rows: [T] int64, which rows of the target data the columns are; 0 to T − 1 unless given.
        models: files of the kept models, S·R of them in order of subset, then repeat; empty if none were kept.

    Raises:
        InputError: shapes that disagree, or that are empty.
        NonFiniteError: NaN or infinity in the outputs.
    """

    masks: Tensor
    outputs: Tensor
    target_rows: Tensor = None  # type: ignore[assignment]  # __post_init__ puts the default
    models: Sequence[Path] = ()

    def __post_init__(self) -> None:
        masks = torch.from_numpy(np.ascontiguousarray(as_masks(self.masks)))
        array = as_array(self.outputs).astype(np.float64)
        if array.ndim != 3 or 0 in array.shape:
            raise InputError(
                "outputs must be [S, R, T] (subsets, models per subset, targets) and not empty, "
                f"got shape {list(array.shape)}. For one model per subset pass outputs[:, None]."
            )
        check_axis(array.shape[0], len(masks), what="outputs", axis="S (subsets)", other="masks")
        check_finite(array, "outputs")
        rows = as_target_rows(self.target_rows, array.shape[2])
        models = tuple(Path(path) for path in self.models)
        if len(models) not in (0, array.shape[0] * array.shape[1]):
            raise InputError(
                f"models must be one file per model, {array.shape[0] * array.shape[1]}, or none; got {len(models)}."
            )
        for name, value in (("masks", masks), ("outputs", torch.from_numpy(array)), ("target_rows", rows)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "models", models)

    @property
    def num_train(self) -> int:
        """N, number of training rows."""
        return self.masks.shape[1]

    @property
    def mean_outputs(self) -> Tensor:
        """[S, T] float64, mean over the models of each subset."""
        return self.outputs.mean(dim=1)

    @property
    def model_masks(self) -> Tensor:
        """[S·R, N] bool, the rows that each model saw, in the order of `models`."""
        return self.masks.repeat_interleave(self.outputs.shape[1], dim=0)

    def lds(
        self, scores: Any, *, num_bootstrap: int = 1000, seed: int = 0, confidence: float = 0.95
    ) -> LdsResult:
        """The linear datamodeling score of some scores over this bank: `trak.evaluation.lds`.

        Args:
            scores: [N, T], columns in the order of the bank's targets. For scores of all target rows pass
                `scores[:, bank.target_rows]`.
            num_bootstrap: resamples for the interval.
            seed: of the bootstrap.
            confidence: level of the interval.

        Returns:
            Mean, interval, and correlation per target.

        Raises:
            InputError: shapes that disagree, or fewer than three subsets.
            NonFiniteError: NaN or infinity in the scores.
        """
        return lds(
            scores,
            self.masks,
            self.outputs,
            num_bootstrap=num_bootstrap,
            seed=seed,
            confidence=confidence,
        )

    def subset(self, *, subsets: Any = None, targets: Any = None) -> Bank:
        """The bank of some subsets or targets, e.g. to tune on one half and report the other.

        Args:
            subsets: positions [s] (integers or a slice) or a mask [S] of the subsets to keep; None keeps all.
            targets: the same of the targets: positions in `target_rows`, not the rows themselves.

        Returns:
            A new bank, in the order asked for.

        Raises:
            InputError: positions out of range, repeated, or none.
        """
        num_subsets, num_models, num_targets = self.outputs.shape
        kept = _positions(subsets, num_subsets, "subsets")
        columns = _positions(targets, num_targets, "targets")
        models = [
            self.models[s * num_models + r] for s in kept.tolist() for r in range(num_models) if self.models
        ]
        return Bank(
            masks=self.masks[kept],
            outputs=self.outputs[kept][:, :, columns],
            target_rows=self.target_rows[columns],
            models=models,
        )

    def save(self, folder: str | Path) -> Path:
        """Write the bank to `folder`/bank.safetensors, atomically, in place of one that may be there.

        Kept models are not copied: their paths are written, relative to the folder if they lie in it.

        Args:
            folder: created if it is not there.

        Returns:
            The file.
        """
        folder = Path(folder)
        make_folder(folder)
        tensors = {
            "masks": torch.from_numpy(np.packbits(self.masks.numpy(), axis=1)),
            "outputs": self.outputs,
            "target_rows": self.target_rows,
        }
        metadata = {
            "format": FORMAT,
            "num_train": str(self.num_train),
            "models": json.dumps([_portable(path, folder) for path in self.models]),
        }
        write_tensors(folder / BANK_FILE, tensors, metadata)
        return folder / BANK_FILE

    @classmethod
    def load(cls, path: str | Path, *, num_train: int | None = None) -> Bank:
        """Read what `save` or a finished `retrain` wrote, or a bank in the packed format.

        Args:
            path: a folder with bank.safetensors or bank.npz, or one of these files.
            num_train: N; needed only for a packed bank that does not tell (`load_packed_bank`), checked otherwise.

        Returns:
            The bank. Whether the files of kept models are still there is not looked at.

        Raises:
            StoreError: no bank there, an unfinished one, or one of an unknown format.
            CorruptShardError: a damaged file.
            InputError: another number of training rows than `num_train`.
        """
        path = Path(path)
        if path.is_file() and path.suffix not in (".npz", ".safetensors"):
            raise StoreError(
                f"{path} is no bank: give a folder with {BANK_FILE} or {PACKED_FILE}, or one of these files."
            )
        if path.suffix == ".npz" or (not (path / BANK_FILE).is_file() and (path / PACKED_FILE).is_file()):
            return load_packed_bank(path, num_train)
        file = path if path.is_file() else path / BANK_FILE
        if not file.is_file():
            raise StoreError(_why_not_there(path))
        tensors, metadata = read_tensors(file)
        if metadata.get("format") != FORMAT:
            raise StoreError(
                f"{file} is no bank that this version reads: its format is {metadata.get('format')!r}, "
                f"expected {FORMAT!r}."
            )
        stored = int(metadata["num_train"])
        if num_train is not None and num_train != stored:
            raise InputError(f"{file} is a bank of {stored} training rows, not of num_train = {num_train}.")
        return cls(
            masks=torch.from_numpy(unpack_masks(tensors["masks"].numpy(), stored)),
            outputs=tensors["outputs"],
            target_rows=tensors["target_rows"],
            models=[file.parent / name for name in json.loads(metadata["models"])],
        )


def load_packed_bank(path: str | Path, num_train: int | None = None) -> Bank:
    """Read a bank from an npz file with masks packed to bits.

    The file holds `masks` [S, ⌈N/8⌉] uint8 (`numpy.packbits` along the rows), `margins` [S, T] or [S, R, T]
    floats, and, if the targets are a choice, `target_rows` [T] integers; `num_train` if it tells.

    Args:
        path: the file, or the folder with bank.npz.
        num_train: N. The packed length leaves eight possibilities; None takes what the file says, or 8·⌈N/8⌉
            if some subset holds the last row of that many (then it is no other), and refuses otherwise.

    Returns:
        The bank, with no kept models.

    Raises:
        StoreError: no such file, or arrays that are missing.
        InputError: N is not given and cannot be told, or does not fit the masks.
        NonFiniteError: NaN or infinity in the margins.
    """
    path = Path(path)
    file = path / PACKED_FILE if path.is_dir() else path
    try:
        with np.load(file) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise StoreError(
            f"There is no bank at {file}: give the .npz file, or the folder of a bank to Bank.load."
        ) from error
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise StoreError(f"{file} is no readable npz file: {error}. Copy or make it again.") from error
    absent = {"masks", "margins"} - set(arrays)
    if absent:
        raise StoreError(f"{file} must hold the arrays masks and margins; {sorted(absent)} are not there.")
    packed, margins = arrays["masks"], arrays["margins"]
    if packed.ndim != 2 or packed.dtype != np.uint8 or 0 in packed.shape:
        raise InputError(
            f"masks in {file} must be packed bits, [S, N/8] uint8, got {packed.dtype} {list(packed.shape)}."
        )
    if margins.ndim not in (2, 3):
        raise InputError(f"margins in {file} must be [S, T] or [S, R, T], got shape {list(margins.shape)}.")
    if num_train is None and "num_train" in arrays:
        num_train = int(arrays["num_train"])
    return Bank(
        masks=torch.from_numpy(unpack_masks(packed, num_train)),
        outputs=margins[:, None] if margins.ndim == 2 else margins,
        target_rows=as_target_rows(arrays.get("target_rows"), margins.shape[-1]),
    )


def unpack_masks(packed: np.ndarray, num_train: int | None) -> np.ndarray:
    """[S, N] bool from [S, ⌈N/8⌉] packed bits, with N given or, where the bits tell, found.

    Raises:
        InputError: N is not given and cannot be told, or does not fit.
    """
    bits = np.unpackbits(packed, axis=1).astype(np.bool_)
    most = bits.shape[1]
    if num_train is None:
        if not bits[:, -1].any():
            raise InputError(
                f"The packed masks are of {most - 7} to {most} training rows; pass num_train to say how many."
            )
        num_train = most
    check_count(num_train, "num_train", 1)
    if not most - 8 < num_train <= most or bits[:, num_train:].any():
        least = int(np.flatnonzero(bits.any(axis=0)).max(initial=0)) + 1
        raise InputError(
            f"num_train = {num_train} does not fit the packed masks, which are of {max(most - 7, least)} to {most} "
            "training rows."
        )
    return np.ascontiguousarray(bits[:, :num_train])


def as_target_rows(rows: Any, num_targets: int) -> Tensor:
    """`rows` as [T] int64, 0 to T − 1 if None.

    Raises:
        InputError: other shapes or dtypes than [T] integers.
    """
    if rows is None:
        return torch.arange(num_targets)
    array = as_array(rows)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(f"target_rows must be [T] integers, got {array.dtype} of shape {list(array.shape)}.")
    check_axis(len(array), num_targets, what="target_rows", axis="T (targets)", other="outputs")
    return torch.from_numpy(array.astype(np.int64))


def _positions(which: Any, size: int, name: str) -> Tensor:
    """Positions [n] int64 out of None, a slice, a mask or positions."""
    if which is None or isinstance(which, slice):
        array = np.arange(size)[which or slice(None)]
    else:
        array = as_array(which)
        if array.dtype == np.bool_:
            if array.shape != (size,):
                raise InputError(f"{name}: a mask must be [{size}], got shape {list(array.shape)}.")
            array = np.flatnonzero(array)
    if array.ndim != 1 or len(array) == 0 or array.dtype.kind not in "iu":
        raise InputError(
            f"{name} must be at least one position, as integers [n], a mask [{size}] or a slice; "
            f"got {array.dtype} of shape {list(array.shape)}."
        )
    if array.min() < 0 or array.max() >= size or len(np.unique(array)) < len(array):
        raise InputError(
            f"{name} must be different positions from 0 to {size - 1}; got {array.tolist()[:10]}."
        )
    return torch.from_numpy(array.astype(np.int64))


def _portable(path: Path, folder: Path) -> str:
    """The path relative to the folder if it lies in it, else absolute."""
    absolute, base = path.resolve(), folder.resolve()
    return absolute.relative_to(base).as_posix() if absolute.is_relative_to(base) else str(absolute)


def _why_not_there(path: Path) -> str:
    if (path / SETTINGS_FILE).is_file():
        return (
            f"The bank in {path} is not finished. Call retrain (or retrain_stacked) with the same arguments "
            "again: it trains the models that are missing."
        )
    return f"There is no bank at {path}: neither {BANK_FILE} nor {PACKED_FILE}."
