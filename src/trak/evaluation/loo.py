"""Correlation of scores with true leave-one-out changes.

Legend: N training rows, n rows left out in turn, T targets, B bootstrap resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from trak.errors import InputError
from trak.evaluation._reading import as_row_numbers, as_scores, as_tensor_positions
from trak.evaluation._values import Floats, as_floats, check_axis, check_count
from trak.evaluation.estimates import Estimate, crossed_counts, crossed_estimate
from trak.evaluation.ranks import as_observations, average_ranks, resampled_correlation, spearman


@dataclass(frozen=True, eq=False)
class LooResult:
    """What `loo_correlation` found.

    Attributes:
        pearson: mean over targets of Pearson's correlation.
        spearman: mean over targets of Spearman's rank correlation.
        pearson_per_target: [T] float64; NaN for the targets left out.
        spearman_per_target: [T] float64; NaN for the targets left out.
        num_rows: n, rows left out in turn.
        num_targets: T, the left-out ones included.
        num_constant: targets whose scores or changes are the same for all rows; in no mean.
    """

    pearson: Estimate
    spearman: Estimate
    pearson_per_target: Floats
    spearman_per_target: Floats
    num_rows: int
    num_targets: int
    num_constant: int

    def __str__(self) -> str:
        """One line: both correlations and sizes."""
        left_out = f", {self.num_constant} constant targets left out" if self.num_constant else ""
        return (
            f"leave-one-out: Pearson {self.pearson}, Spearman {self.spearman} "
            f"({self.num_targets} targets, {self.num_rows} rows{left_out})"
        )


def loo_correlation(
    scores: Any,
    changes: Any,
    *,
    rows: Any = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> LooResult:
    """Correlation, over training rows, of scores τ_it with true leave-one-out changes of the output.

    changes_it = f_t(all rows) − f_t(all rows but i): what the presence of row i adds, so that a right score
    has its sign (Koh and Liang, 2017, section 4.1 compare so). A single row moves a large network less than
    another training seed does: average the outputs over enough seeds, or use `lds`.

    The interval is a percentile bootstrap that resamples rows and targets together.

    Args:
        scores: [N, T]: an array, a tensor or lazy scores, of which only `rows` are read.
        changes: [n, T], with the minus sign as above.
        rows: the n row numbers that the changes belong to; None if they are all N in order.
        num_bootstrap: resamples for the intervals.
        seed: of the bootstrap.
        confidence: level of the intervals.

    Returns:
        Both correlations, their means over targets and intervals.

    Raises:
        InputError: shapes that disagree, fewer than three rows, repeated rows, or no target that varies.
        NonFiniteError: NaN or infinity.
    """
    check_count(num_bootstrap, "num_bootstrap", 1)
    checked = as_scores(scores)
    changes_nT = as_floats(changes, "changes", ("rows", "T"))
    numbers = (
        np.arange(checked.num_train)
        if rows is None
        else as_row_numbers(rows, checked.num_train, "rows", "row")
    )
    other = "scores (pass rows= where only some rows were left out)" if rows is None else "rows"
    check_axis(len(changes_nT), len(numbers), what="changes", axis="rows", other=other)
    check_axis(changes_nT.shape[1], checked.num_targets, what="changes", axis="T (targets)", other="scores")
    if len(numbers) < 3:
        raise InputError(
            f"A correlation over rows needs at least 3 of them (a few dozen to say much), got {len(numbers)}."
        )
    scores_nT = checked[as_tensor_positions(numbers)].numpy()
    spearman_T = spearman(scores_nT, changes_nT)
    if np.isnan(spearman_T).all():
        raise InputError(
            f"None of the {checked.num_targets} targets has a correlation: over the {len(numbers)} rows either "
            "its scores or its changes are all the same."
        )
    pearson_T = np.where(np.isnan(spearman_T), np.nan, pearson(scores_nT, changes_nT))
    counts_Bn, counts_BT = crossed_counts(*scores_nT.shape, num_bootstrap=num_bootstrap, seed=seed)
    ranks = average_ranks(scores_nT), average_ranks(changes_nT)
    samples = (
        resampled_correlation(scores_nT, changes_nT, counts_Bn),
        resampled_correlation(*ranks, counts_Bn),
    )
    return LooResult(
        pearson=crossed_estimate(pearson_T, samples[0], counts_BT, confidence),
        spearman=crossed_estimate(spearman_T, samples[1], counts_BT, confidence),
        pearson_per_target=pearson_T,
        spearman_per_target=spearman_T,
        num_rows=len(numbers),
        num_targets=checked.num_targets,
        num_constant=int(np.isnan(spearman_T).sum()),
    )


def pearson(first: Any, second: Any) -> Floats:
    """Pearson's correlation of each pair of columns.

    Args:
        first: [S, T], finite.
        second: [S, T], finite.

    Returns:
        r [T], float64 in [−1, 1]; NaN where a column is constant.

    Raises:
        InputError: shapes that are not two-dimensional or disagree, or fewer than two observations.
        NonFiniteError: NaN or infinity.
    """
    first_ST, second_ST = (_standardized(values_ST) for values_ST in as_observations(first, second))
    return np.clip((first_ST * second_ST).sum(axis=0), -1.0, 1.0)


def _standardized(values_ST: Floats) -> Floats:
    """Columns of mean 0 and length 1; NaN where they are constant. Scaled first: squares of 1e-200 vanish."""
    spread_T = np.ptp(values_ST, axis=0)
    varies_T = spread_T > 0
    centred_ST = (values_ST - values_ST.mean(axis=0)) / np.where(varies_T, spread_T, 1.0)
    length_T = np.sqrt((centred_ST**2).sum(axis=0))
    return np.where(varies_T, centred_ST / np.where(varies_T, length_T, 1.0), np.nan)
