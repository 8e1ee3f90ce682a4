"""Scores from long tables: a row for each pair of a training row and a target.

Legend: N training rows, T targets, P pairs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trak.errors import InputError, MissingDependencyError, StoreError

TABLES = (".csv", ".parquet")

Sizes = tuple[int | None, int | None]


def read_table(
    path: Path, *, columns: tuple[str, str, str], sizes: Sizes, fill: float | None
) -> NDArray[np.float64]:
    """The matrix [N, T] of a table's pairs.

    Args:
        path: .csv, or .parquet (which also needs pyarrow).
        columns: names of the columns for training row, target and score.
        sizes: (N, T); None for the largest number in the table, plus one.
        fill: score of pairs that are not in the table; None refuses tables that lack some.

    Raises:
        StoreError: not readable.
        InputError: columns that are not there; numbers that are no rows; missing or repeated pairs.
        MissingDependencyError: no pandas, or no pyarrow.
    """
    frame = _read(path)
    if len(columns) != 3 or len(set(columns)) != 3:
        raise InputError(f"columns must be three names, for training row, target and score; got {columns!r}.")
    absent = [name for name in columns if name not in frame.columns]
    if absent:
        raise InputError(
            f"{path} has no column {absent[0]!r}; it has {', '.join(map(str, frame.columns))}. A long table has a row for each "
            "pair: pass columns=(training row, target, score)."
        )
    if fill is not None and None in sizes:
        raise InputError(
            "fill= needs num_train= and num_targets=: rows that are in no pair cannot be counted."
        )
    train_P, target_P = (
        _row_numbers(frame[name], size, path) for name, size in zip(columns[:2], sizes, strict=True)
    )
    score_P = frame[columns[2]].to_numpy()
    if score_P.dtype.kind not in "iuf":
        raise InputError(f"{path}: column {columns[2]!r} must hold numbers, got {score_P.dtype}.")
    num_train = sizes[0] or int(train_P.max()) + 1
    num_targets = sizes[1] or int(target_P.max()) + 1
    pair_P = train_P * num_targets + target_P
    different = len(np.unique(pair_P))
    if different < len(pair_P):
        raise InputError(
            f"{path} has {len(pair_P) - different} rows for pairs of training row and target that it has already."
        )
    missing = num_train * num_targets - different
    if missing and fill is None:
        raise InputError(
            f"{path} has {different} pairs; {num_train} training rows and {num_targets} targets make {num_train * num_targets}. "
            "If absent pairs have a score, say which: fill=0.0, with num_train= and num_targets=."
        )
    out_NT = np.full(num_train * num_targets, 0.0 if fill is None else fill)
    out_NT[pair_P] = score_P
    return out_NT.reshape(num_train, num_targets)


def _read(path: Path) -> Any:
    try:
        import pandas
    except ImportError as error:
        raise MissingDependencyError(
            f"reading {path} needs pandas: pip install 'trak-attribution[pandas]'"
        ) from error
    try:
        return pandas.read_csv(path) if path.suffix.lower() == ".csv" else pandas.read_parquet(path)
    except ImportError as error:
        raise MissingDependencyError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} is not readable: {error}. It may be truncated; write it again.") from error


def _row_numbers(column: Any, size: int | None, path: Path) -> NDArray[np.int64]:
    """A column of row numbers, [P] int64 in [0, size)."""
    values = column.to_numpy()
    if len(values) == 0:
        raise InputError(f"{path} has no rows.")
    if values.dtype.kind not in "iu":
        raise InputError(
            f"{path}: column {column.name!r} must hold row numbers, counted from 0, got {values.dtype}. Names are turned into "
            "numbers by their order in the data."
        )
    if values.min() < 0 or (size is not None and values.max() >= size):
        raise InputError(
            f"{path}: column {column.name!r} must lie in [0, {'…' if size is None else size}), got {values.min()} to {values.max()}."
        )
    return values.astype(np.int64)
