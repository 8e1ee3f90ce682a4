"""Ranks with ties, and Spearman's rank correlation, column by column.

Legend: S observations (subsets), T columns (targets), B resamples.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trak.errors import InputError
from trak.evaluation._values import Floats, as_floats, check_axis


def average_ranks(values: Any) -> Floats:
    """Ranks from 1 within each column; equal values share the mean of the ranks they span.

    Args:
        values: [S, T], finite.

    Returns:
        Ranks [S, T], float64.

    Raises:
        InputError: not two-dimensional.
        NonFiniteError: NaN or infinity.
    """
    values_ST = as_floats(values, "values", ("S", "T"))
    num_observations, num_columns = values_ST.shape
    order = np.argsort(values_ST, axis=0, kind="stable")
    sorted_ST = np.take_along_axis(values_ST, order, axis=0)
    differs = sorted_ST[1:] != sorted_ST[:-1]
    edge = np.ones((min(1, num_observations), num_columns), dtype=np.bool_)
    positions = np.arange(num_observations)[:, None]
    starts = np.where(np.concatenate([edge, differs]), positions, 0)
    ends = np.where(np.concatenate([differs, edge]), positions, num_observations)
    first = np.maximum.accumulate(starts, axis=0)
    last = np.minimum.accumulate(ends[::-1], axis=0)[::-1]
    ranks_ST = np.empty_like(values_ST)
    np.put_along_axis(ranks_ST, order, (first + last) / 2.0 + 1.0, axis=0)
    return ranks_ST


def spearman(first: Any, second: Any) -> Floats:
    """Spearman's rank correlation of each pair of columns: the Pearson correlation of their average ranks.

    Args:
        first: [S, T], finite.
        second: [S, T], finite.

    Returns:
        ρ [T], float64 in [−1, 1]; NaN where a column is constant, since its ranks say nothing.

    Raises:
        InputError: shapes that are not two-dimensional or disagree, or fewer than two observations.
        NonFiniteError: NaN or infinity.
    """
    first_ST, second_ST = as_observations(first, second)
    return _correlation(average_ranks(first_ST), average_ranks(second_ST))


def as_observations(first: Any, second: Any) -> tuple[Floats, Floats]:
    """Both as float64 [S, T], for a correlation of each pair of columns.

    Raises:
        InputError: shapes that are not two-dimensional or disagree, or fewer than two observations.
        NonFiniteError: NaN or infinity.
    """
    first_ST = as_floats(first, "first", ("S", "T"))
    second_ST = as_floats(second, "second", ("S", "T"))
    check_axis(second_ST.shape[0], first_ST.shape[0], what="second", axis="S", other="first")
    check_axis(second_ST.shape[1], first_ST.shape[1], what="second", axis="T", other="first")
    if len(first_ST) < 2:
        raise InputError(f"A correlation needs at least 2 observations (axis S), got {len(first_ST)}.")
    return first_ST, second_ST


def resampled_correlation(first_ST: Floats, second_ST: Floats, counts_BS: NDArray[np.int64]) -> Floats:
    """Pearson correlation of every pair of columns in every resample, where row s occurs counts[b, s] times.

    The same as repeating rows, done by matrix products.

    Args:
        first_ST: [S, T], e.g. ranks.
        second_ST: [S, T].
        counts_BS: [B, S], non-negative; each row has the same sum.

    Returns:
        Correlations [B, T], float64; NaN where a column is constant within the resample.
    """
    weights_BS = counts_BS / counts_BS.sum(axis=1, keepdims=True)
    first_ST = first_ST - first_ST.mean(axis=0)
    second_ST = second_ST - second_ST.mean(axis=0)
    first_BT, second_BT = weights_BS @ first_ST, weights_BS @ second_ST
    first_variance_BT = weights_BS @ first_ST**2 - first_BT**2
    second_variance_BT = weights_BS @ second_ST**2 - second_BT**2
    covariance_BT = weights_BS @ (first_ST * second_ST) - first_BT * second_BT
    # A difference of squares: what is left of a constant column is rounding, not variance.
    floor_T = (
        1e-12 * np.maximum(first_ST.var(axis=0), 1e-300),
        1e-12 * np.maximum(second_ST.var(axis=0), 1e-300),
    )
    varies_BT = (first_variance_BT > floor_T[0]) & (second_variance_BT > floor_T[1])
    scale_BT = np.sqrt(np.where(varies_BT, first_variance_BT * second_variance_BT, 1.0))
    return np.where(varies_BT, np.clip(covariance_BT / scale_BT, -1.0, 1.0), np.nan)


def _correlation(first_ST: Floats, second_ST: Floats) -> Floats:
    """Pearson correlation of each pair of columns of ranks, [T]; NaN where a column is constant."""
    # The mean rank is (S + 1) / 2 whatever the ties, and a multiple of one half: deviations are exact.
    mean = (len(first_ST) + 1) / 2
    first_ST, second_ST = first_ST - mean, second_ST - mean
    scale_T = np.sqrt((first_ST**2).sum(axis=0) * (second_ST**2).sum(axis=0))
    covariance_T = (first_ST * second_ST).sum(axis=0)
    varies_T = scale_T > 0
    return np.where(varies_T, np.clip(covariance_T / np.where(varies_T, scale_T, 1.0), -1.0, 1.0), np.nan)
