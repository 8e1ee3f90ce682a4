"""Finding corrupted labels: inspect rows from the most to the least suspicious, and count what is found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trak.errors import InputError
from trak.evaluation._values import Bools, Floats, as_array, as_floats, check_axis, check_count
from trak.evaluation.bootstrap import make_generator, percentile_interval, resample_counts
from trak.evaluation.ranks import average_ranks


@dataclass(frozen=True, eq=False)
class MislabelResult:
    """What `mislabel_curve` found.

    Attributes:
        auc: area under the ROC curve: the probability that a corrupted row is more suspicious than a clean
            one.
        low: lower end of the bootstrap interval of `auc`.
        high: upper end.
        confidence: level of the interval.
        fraction_inspected: share of the rows inspected, most suspicious first, [N] float64: 1/N, 2/N, …, 1.
        fraction_found: expected share of the corrupted rows among them, [N] float64, ending at 1.
        num_rows: N.
        num_corrupted: number of corrupted rows.
    """

    auc: float
    low: float
    high: float
    confidence: float
    fraction_inspected: Floats
    fraction_found: Floats
    num_rows: int
    num_corrupted: int

    def found_at(self, fraction: float) -> float:
        """Share of the corrupted rows found after inspecting this share of all rows (at least one row).

        Raises:
            InputError: `fraction` is not in (0, 1].
        """
        if not 0 < fraction <= 1:
            raise InputError(f"fraction must be in (0, 1], got {fraction}. For the first tenth pass 0.1.")
        rows = max(1, int(np.floor(round(fraction * self.num_rows, 9))))
        return float(self.fraction_found[rows - 1])

    def __str__(self) -> str:
        """One line: AUC, interval and sizes."""
        return (
            f"AUC {self.auc:.3f} [{self.low:.3f}, {self.high:.3f}] "
            f"({self.num_corrupted} corrupted of {self.num_rows} rows)"
        )


def mislabel_curve(
    suspicion: Any,
    corrupted: Any,
    *,
    num_bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> MislabelResult:
    """How early corrupted rows turn up when rows are inspected by falling suspicion.

    Rows of equal suspicion are inspected in random order, and the curve gives the expectation over these
    orders; so a constant suspicion gives the diagonal and AUC ½, whatever the order of rows. The interval is
    a percentile bootstrap over corrupted and clean rows apart, so that every resample has as many of each as
    the data.

    Args:
        suspicion: [N], finite; higher means inspected earlier (self-influence, a loss, a negated margin).
        corrupted: [N] bool, the truth.
        num_bootstrap: resamples for the interval.
        seed: of the bootstrap.
        confidence: level of the interval.

    Returns:
        AUC with its interval, and the curve.

    Raises:
        InputError: lengths that disagree, `corrupted` that is not boolean, or rows that are all (or none)
            corrupted.
        NonFiniteError: NaN or infinity in `suspicion`.
    """
    check_count(num_bootstrap, "num_bootstrap", 1)
    suspicion_N = as_floats(suspicion, "suspicion", ("N",))
    corrupted_N = _as_flags(corrupted)
    check_axis(len(corrupted_N), len(suspicion_N), what="corrupted", axis="N (rows)", other="suspicion")
    num_rows, num_corrupted = len(corrupted_N), int(corrupted_N.sum())
    if num_corrupted in (0, num_rows):
        raise InputError(
            f"{num_corrupted} of {num_rows} rows are corrupted: a curve needs at least one corrupted and one "
            "clean row."
        )
    auc, samples_B = _auc(suspicion_N, corrupted_N, num_bootstrap, seed)
    interval = percentile_interval(samples_B, confidence=confidence)
    return MislabelResult(
        auc=auc,
        low=interval.low,
        high=interval.high,
        confidence=confidence,
        fraction_inspected=np.arange(1, num_rows + 1) / num_rows,
        fraction_found=_expected_found(suspicion_N, corrupted_N) / num_corrupted,
        num_rows=num_rows,
        num_corrupted=num_corrupted,
    )


def _as_flags(corrupted: Any) -> Bools:
    """`corrupted` as [N] booleans; 0 and 1 are taken as well."""
    array = as_array(corrupted)
    if array.ndim != 1:
        raise InputError(f"corrupted must be [N], one flag per row, got shape {list(array.shape)}.")
    if array.dtype != np.bool_ and not np.isin(array, (0, 1)).all():
        raise InputError(
            f"corrupted must hold booleans (or 0 and 1), got dtype {array.dtype} with other values. "
            "Row numbers are turned into flags by `flags[rows] = True`."
        )
    return array.astype(np.bool_)


def _expected_found(suspicion_N: Floats, corrupted_N: Bools) -> Floats:
    """Expected number of corrupted rows among the first 1, 2, …, N: linear within a group of ties."""
    _, group_N = np.unique(-suspicion_N, return_inverse=True)
    sizes = np.bincount(group_N)
    rate_per_group = np.bincount(group_N, weights=corrupted_N) / sizes
    return np.cumsum(np.repeat(rate_per_group, sizes))


def _auc(suspicion_N: Floats, corrupted_N: Bools, num_bootstrap: int, seed: int) -> tuple[float, Floats]:
    """(AUC, AUC of each resample [B]).

    AUC = mean over corrupted i and clean j of [s_i > s_j] + ½ [s_i = s_j] (Mann–Whitney). In a resample each
    row counts as often as it was drawn: sums of clean counts below and at each group of ties give all pairs
    at once.
    """
    generator = make_generator(seed)
    group_N = average_ranks(suspicion_N[:, None])[:, 0]
    order = np.argsort(group_N, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(group_N[order]) != 0]))
    position_of_corrupted = corrupted_N[order]

    def area(counts_BC: NDArray[np.int64], counts_BL: NDArray[np.int64]) -> Floats:
        """From counts of the corrupted and of the clean rows, each in order of suspicion."""
        weights_BN = np.zeros((2, len(counts_BC), len(order)))
        weights_BN[0][:, position_of_corrupted] = counts_BC
        weights_BN[1][:, ~position_of_corrupted] = counts_BL
        corrupted_BG, clean_BG = np.add.reduceat(weights_BN, starts, axis=2)
        below_BG = np.cumsum(clean_BG, axis=1) - clean_BG
        pairs_B = (corrupted_BG * (below_BG + 0.5 * clean_BG)).sum(axis=1)
        return pairs_B / (corrupted_BG.sum(axis=1) * clean_BG.sum(axis=1))

    num_corrupted = int(corrupted_N.sum())
    num_clean = len(corrupted_N) - num_corrupted
    once = area(np.ones((1, num_corrupted), dtype=np.int64), np.ones((1, num_clean), dtype=np.int64))
    block = max(1, 2_000_000 // len(order))
    parts = []
    for start in range(0, num_bootstrap, block):
        size = min(block, num_bootstrap - start)
        parts.append(
            area(resample_counts(num_corrupted, size, generator), resample_counts(num_clean, size, generator))
        )
    return float(once[0]), np.concatenate(parts)
