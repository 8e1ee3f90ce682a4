"""Scores that other tools wrote, as scores that every measure takes.

Legend: N training rows, T targets, R rows of one block.
"""

from __future__ import annotations

import fnmatch
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trak.errors import InputError, StoreError
from trak.evaluation._reading import as_scores
from trak.evaluation._values import check_count
from trak.evaluation.score_tables import TABLES, read_table
from trak.scores import ArrayScores, Scores

ORIENTATIONS = {"NT": "[N, T], a row for each training example", "TN": "[T, N], a row for each target"}
SUMMED_MODULES = "all_modules"
"""The name under which kronfluence writes scores summed over modules, [T, N]."""

Arrays = Mapping[str, Any]


def load_scores(
    path: str | Path,
    *,
    orientation: str | None = None,
    num_train: int | None = None,
    num_targets: int | None = None,
    key: str | None = None,
    columns: tuple[str, str, str] = ("train", "target", "score"),
    fill: float | None = None,
    negate: bool = False,
) -> Scores:
    """Scores [N, T] from a file or folder of any tool, for every measure of this package.

    | What | Read |
    |---|---|
    | `.npy` | a matrix; stays on disk, and is read where it is asked for |
    | `.npz`, `.pt` (weights only), `.safetensors` | a matrix, or several that `key` chooses among |
    | a `.safetensors` of kronfluence's pairwise scores | `all_modules` [T, N]; several modules by `key="*"`, which sums them |
    | `.csv`, `.parquet` (pandas) | a long table, a row for each pair of a training row and a target |
    | what `Attribution.save` wrote | its scores |
    | a `save_dir` of the released package `traker`, or a `.mmap` of it | the scores [N, T] of the experiment `key` |

    A file does not say which axis is which. Give the orientation, or the sizes: where only one orientation fits them, it is
    taken.

    No file says which sign its scores have. Here positive means that the training row raises the target's output f. Influence
    on a loss has the other sign unless the tool turns it; `trak.evaluation.class_agreement` far below chance is the symptom, and
    `negate` the cure.

    Args:
        path: the file or folder.
        orientation: "NT" for [N, T], "TN" for [T, N]; None to tell it from the sizes.
        num_train: N, compared with the file.
        num_targets: T, compared with the file.
        key: which array of a file that holds several, or which experiment of a folder; a pattern such as "*" or "layer1.*"
            sums all that match, as scores per module add up to those of the model.
        columns: of a long table, the names of the columns for training row, target and score; rows and targets count from 0.
        fill: the score of pairs that a long table does not have (0.0 for tables of each target's strongest rows); None refuses
            such tables. Needs num_train and num_targets.
        negate: turn the sign of every score.

    Returns:
        The scores, finite, in the file's own dtype.

    Raises:
        StoreError: nothing there, or unreadable.
        InputError: several arrays and no key; sizes that fit no orientation, or both; a table with missing or repeated pairs.
        NonFiniteError: NaN or infinity in the scores.
        MissingDependencyError: a table, and no pandas.
    """
    if orientation is not None and orientation not in ORIENTATIONS:
        raise InputError(f'orientation must be "NT", "TN" or None, got {orientation!r}: {_orientations()}.')
    for name, value in (("num_train", num_train), ("num_targets", num_targets)):
        if value is not None:
            check_count(value, name, 1)
    path = Path(path)
    if not path.exists():
        raise StoreError(f"There are no scores at {path}: no such file or folder.")
    values: Any
    known: str | None
    if path.suffix.lower() in TABLES:
        sizes = (num_train, num_targets)
        values, known = read_table(path, columns=columns, sizes=sizes, fill=fill), "NT"
    else:
        values, known = _read_folder(path, key) if path.is_dir() else _read_file(path, key)
    matrix = _oriented(_as_matrix(values, path), orientation or known, num_train, num_targets, path)
    scores: Scores = ArrayScores(matrix)
    _check(scores, path)
    if not negate:
        return scores
    values = scores.tensor()
    return ArrayScores(-(values if values.is_floating_point() else values.float()))


def _read_folder(folder: Path, key: str | None) -> tuple[Any, str | None]:
    """(matrix, orientation) of a saved attribution or a folder of the released package."""
    if (folder / "attribution.json").is_file():
        return _read_array(folder / "scores.npy"), "NT"
    files = {file.stem: file for file in sorted((folder / "scores").glob("*.mmap"))}
    if not files:
        raise StoreError(
            f"{folder} holds no scores: neither attribution.json and scores.npy, as Attribution.save writes, nor scores/*.mmap, "
            "as the released package does. Give the path of a file."
        )
    name = _only(_matching(files, key, folder), folder, "experiments")
    return _read_released(files[name], folder), "NT"


def _read_file(path: Path, key: str | None) -> tuple[Any, str | None]:
    """(matrix, orientation where the format has one) of a file."""
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return _read_array(path), None
    if suffix == ".mmap":
        return _read_released(path, path.parent.parent), "NT"
    readers: Mapping[str, Callable[[Path], Any]] = {
        ".npz": _read_npz,
        ".pt": _read_pt,
        ".pth": _read_pt,
        ".safetensors": lambda file: load_file(str(file)),
    }
    if suffix not in readers:
        known = ", ".join([".npy", ".mmap", *readers, *TABLES])
        raise InputError(
            f"{path}: scores are read from {known}, got {suffix or 'no ending'!r}. Of other files make an array, and pass that."
        )
    loaded = _reading(path, readers[suffix])
    if not isinstance(loaded, Mapping):
        return loaded, None
    if key is None and SUMMED_MODULES in loaded:
        return loaded[SUMMED_MODULES], "TN"
    chosen = _matching(loaded, key, path)
    if key is None:
        return loaded[_only(chosen, path, "arrays")], None
    return _sum({name: loaded[name] for name in chosen}, path), None


def _read_array(path: Path) -> Any:
    return _reading(path, lambda file: np.load(file, mmap_mode="r", allow_pickle=False))


def _read_npz(path: Path) -> Arrays:
    # NumPy would leave a file open that is no archive.
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _read_pt(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_released(path: Path, folder: Path) -> Any:
    """A score file of the released package, compared with the metadata beside it if they are there."""
    values = _read_array(path)
    metadata = folder / "metadata.json"
    if metadata.is_file():
        stored = _reading(metadata, lambda file: json.loads(file.read_text()))
        expected = stored.get("train set size") if isinstance(stored, dict) else None
        if expected is not None and values.shape[0] != expected:
            raise StoreError(
                f"{path} has {values.shape[0]} rows, but {metadata} says that the training set has {expected}: files of two runs?"
            )
    if not any(bool(values[start : start + 4096].any()) for start in range(0, len(values), 4096)):
        raise StoreError(
            f"{path} holds zeros only: its scores were never computed. Run finalize_scores of the package that made it."
        )
    return values


def _reading(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except pickle.UnpicklingError as error:
        raise StoreError(
            f"{path} holds more than tensors, and is not unpickled: that would run its code. Save the scores as a plain tensor "
            "(torch.save(scores, path)), or as .npy."
        ) from error
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, SafetensorError) as error:
        raise StoreError(f"{path} is not readable: {error}. It may be truncated; write it again.") from error


def _matching(names: Mapping[str, Any], key: str | None, path: Path) -> list[str]:
    """The names that the key means; all of them without one."""
    if key is None:
        return list(names)
    chosen = [key] if key in names else fnmatch.filter(names, key)
    if not chosen:
        raise InputError(f"{path} holds no {key!r}; it holds {_listed(names)}.")
    return chosen


def _only(names: list[str], path: Path, what: str) -> str:
    if len(names) != 1:
        raise InputError(
            f"{path} holds {len(names)} {what}: {_listed(names)}. Say which one by key=…"
            + ("; a pattern such as key='*' sums them." if what == "arrays" else ".")
        )
    return names[0]


def _listed(names: Any) -> str:
    several = sorted(names)
    return ", ".join(several[:8]) + (f" and {len(several) - 8} more" if len(several) > 8 else "")


def _sum(arrays: Arrays, path: Path) -> Any:
    """One array, or the float32 (float64 where one is) sum of several."""
    matrices = {name: _as_matrix(value, path) for name, value in arrays.items()}
    shapes = {name: list(value.shape) for name, value in matrices.items()}
    if len({tuple(shape) for shape in shapes.values()}) > 1:
        raise InputError(f"{path}: only arrays of one shape can be summed, got {shapes}. Give another key.")
    if len(matrices) == 1:
        return next(iter(matrices.values()))
    tensors = [torch.as_tensor(value) for value in matrices.values()]
    exact = any(tensor.dtype == torch.float64 for tensor in tensors)
    total = torch.zeros(tensors[0].shape, dtype=torch.float64 if exact else torch.float32)
    for tensor in tensors:
        total += tensor
    return total


def _as_matrix(values: Any, path: Path) -> Any:
    """An array or tensor of real numbers with two axes.

    Raises:
        InputError: anything else.
    """
    real = (
        not (values.is_complex() or values.dtype == torch.bool)
        if isinstance(values, Tensor)
        else isinstance(values, np.ndarray) and values.dtype.kind in "iuf"
    )
    if not real or values.ndim != 2 or 0 in values.shape:
        got = (
            f"{values.dtype} of shape {list(values.shape)}"
            if hasattr(values, "shape")
            else type(values).__name__
        )
        raise InputError(f"{path} must hold a matrix of real numbers, [N, T] or [T, N], got {got}.")
    return values


def _oriented(
    matrix: Any, orientation: str | None, num_train: int | None, num_targets: int | None, path: Path
) -> Any:
    """The matrix as [N, T].

    Raises:
        InputError: the sizes fit no orientation, not the given one, or both.
    """
    rows, columns = matrix.shape
    sizes = {"NT": (rows, columns), "TN": (columns, rows)}
    fitting = [
        name
        for name, (train, targets) in sizes.items()
        if num_train in (None, train) and num_targets in (None, targets)
    ]
    asked = f"num_train = {num_train}, num_targets = {num_targets}"
    if not fitting or (orientation is not None and orientation not in fitting):
        meant = "in either orientation" if orientation is None else f"as {ORIENTATIONS[orientation]}"
        raise InputError(
            f"{path} holds [{rows}, {columns}], which does not fit {asked} {meant}. Are these scores of other data, or of some "
            "of the targets?"
        )
    if orientation is None and len(fitting) == 2:
        raise InputError(
            f"{path} holds [{rows}, {columns}], and nothing says which axis is the training set ({asked}): {_orientations()}. "
            'Pass orientation="NT" or "TN", or sizes that differ.'
        )
    return matrix if (orientation or fitting[0]) == "NT" else matrix.T


def _orientations() -> str:
    return "; ".join(f'"{name}" is {words}' for name, words in ORIENTATIONS.items())


def _check(scores: Scores, path: Path) -> None:
    """One pass over the scores: NaN and infinity are errors here, with the file's name."""
    for _ in as_scores(scores, f"scores in {path}").blocks():
        pass
