"""Scores of any kind as checked float64 blocks of rows, so that lazy ones are never whole in memory.

Legend: N training rows, R rows of one block, T targets, k rows kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trak.errors import InputError
from trak.evaluation._values import as_array, check_count, check_finite
from trak.scores import ArrayScores, Scores

Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False, repr=False)
class CheckedScores(Scores):
    """Other scores in float64, where NaN and infinity are an error wherever they are read."""

    base: Scores
    name: str = "scores"

    @property
    def shape(self) -> tuple[int, int]:
        """(N, T)."""
        return self.base.shape

    @property
    def progress(self) -> bool | None:
        """What the scores themselves say about progress bars."""
        return getattr(self.base, "progress", None)

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start to stop, [stop − start, T] float64.

        Raises:
            NonFiniteError: NaN or infinity in them.
        """
        block_RT = self.base.read(start, stop).double()
        check_finite(block_RT.numpy(), f"{self.name} (rows {start} to {stop})")
        return block_RT

    def select_targets(self, targets: Tensor) -> Scores:
        """Some of the columns."""
        return CheckedScores(self.base.select_targets(targets), self.name)


def as_scores(values: Any, name: str = "scores") -> CheckedScores:
    """`values` (lazy scores, an array, a memory-mapped file, a tensor, nested lists) as checked scores.

    Raises:
        InputError: not a matrix of numbers [N, T], or an empty one.
    """
    if isinstance(values, Scores):
        base: Scores = values
    else:
        array = values.detach() if isinstance(values, Tensor) else as_array(values)
        if array.ndim != 2 or (isinstance(array, np.ndarray) and array.dtype.kind not in "biuf"):
            raise InputError(
                f"{name} must be numbers [N, T], one row per training example and one column per target, "
                f"got {type(values).__name__} of shape {list(array.shape)}. Of an attribution pass `.scores`."
            )
        base = ArrayScores(array)
    if 0 in base.shape:
        raise InputError(f"{name} is empty: shape {list(base.shape)}. Both axes, [N, T], need an entry.")
    return CheckedScores(base, name)


def check_same_shape(first: Scores, second: Scores) -> None:
    """Raise InputError unless two score matrices agree in both axes."""
    if first.shape != second.shape:
        raise InputError(
            f"scores_a is {list(first.shape)} and scores_b {list(second.shape)}: both must score the same "
            "training rows for the same targets."
        )


def check_k(k: Any, num_rows: int) -> int:
    """`k` as an int in [1, N].

    Raises:
        InputError: it is not.
    """
    check_count(k, "k", 1)
    if k > num_rows:
        raise InputError(f"k is {k}, but there are only {num_rows} training rows: take a smaller one.")
    return int(k)


def check_ks(k: Any, num_rows: int) -> tuple[int, ...]:
    """`k`, one number or several, as rising ints in [1, N] without repetitions.

    Raises:
        InputError: one of them is not, or there is none.
    """
    several = [k] if isinstance(k, (int, np.integer)) else list(k)
    if not several:
        raise InputError("k is empty: pass one number of rows or several, such as k=(1, 5, 10).")
    return tuple(sorted({check_k(one, num_rows) for one in several}))


def check_removals(k: Any, num_rows: int) -> tuple[int, ...]:
    """As `check_ks`, for rows to remove: something must be left to train on.

    Raises:
        InputError: see there; or k is N.
    """
    ks = check_ks(k, num_rows)
    if ks[-1] == num_rows:
        raise InputError(f"k is {ks[-1]}: nothing would be left of the {num_rows} training rows to train on.")
    return ks


def top_rows(scores: Scores, k: int) -> Rows:
    """The k rows with the highest scores of each target, [T, k] int64, highest first; equal scores by row."""
    return scores.top(k).rows.numpy()


def as_row_numbers(rows: Any, size: int, name: str, what: str) -> Rows:
    """`rows` as distinct positions [n] int64 below `size`, in the given order.

    Raises:
        InputError: not whole numbers, out of range, repeated, or none.
    """
    array = as_array(rows)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
        raise InputError(
            f"{name} must be a list of {what} numbers, got dtype {array.dtype} of shape {list(array.shape)}. "
            "A mask is turned into numbers by `mask.nonzero()`."
        )
    numbers = array.astype(np.int64)
    if numbers.min() < 0 or numbers.max() >= size:
        raise InputError(
            f"{name} must lie in [0, {size}), got numbers from {numbers.min()} to {numbers.max()}."
        )
    if len(np.unique(numbers)) != len(numbers):
        values, counts = np.unique(numbers, return_counts=True)
        raise InputError(
            f"{name} holds a {what} more than once: {values[counts > 1][0]}, {counts.max()} times. Give each one once."
        )
    return numbers


def as_tensor_positions(numbers: Rows) -> Tensor:
    """Row or target numbers as the int64 tensor that scores are indexed with."""
    return torch.from_numpy(numbers)
