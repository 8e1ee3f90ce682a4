"""Do scores rank the rows that are known to be relevant above the others?

Legend: N training rows, R rows of one block, T targets, k rows retrieved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from trak.errors import InputError
from trak.evaluation._reading import CheckedScores, Rows, as_scores, check_ks
from trak.evaluation._values import Floats, as_array, check_axis, check_count
from trak.evaluation.estimates import Estimate, mean_of_targets


@dataclass(frozen=True, eq=False)
class RetrievalResult:
    """What `retrieval` found; every mean is over the targets that have relevant rows.

    Attributes:
        mrr: mean reciprocal rank: of 1 / (rank of the first relevant row).
        average_precision: mean average precision (MAP).
        recall_any: for each k, the share of targets with at least one relevant row in the top k ("hit rate").
        recall_all: for each k, the mean share of the relevant rows that are in the top k.
        precision: for each k, the mean share of the top k that is relevant.
        ranks: for each target, the ranks of its relevant rows, rising from 1; empty where it has none.
        num_rows: N.
        num_targets: T, the left-out ones included.
        num_empty: targets without relevant rows, left out.
    """

    mrr: Estimate
    average_precision: Estimate
    recall_any: Mapping[int, Estimate]
    recall_all: Mapping[int, Estimate]
    precision: Mapping[int, Estimate]
    ranks: tuple[Rows, ...]
    num_rows: int
    num_targets: int
    num_empty: int

    @property
    def reciprocal_ranks(self) -> Floats:
        """1 / (rank of the first relevant row), [T]; NaN for the targets left out."""
        return np.array([1 / ranks[0] if len(ranks) else np.nan for ranks in self.ranks])

    @property
    def average_precisions(self) -> Floats:
        """Average precision of each target, [T]; NaN for the targets left out."""
        return np.array([_average_precision(ranks) for ranks in self.ranks])

    def __str__(self) -> str:
        """One line: MRR, MAP and sizes."""
        left_out = f", {self.num_empty} without relevant rows left out" if self.num_empty else ""
        return (
            f"MRR {self.mrr}, MAP {self.average_precision} "
            f"({self.num_targets} targets, {self.num_rows} rows{left_out})"
        )


def retrieval(
    scores: Any,
    relevant: Any,
    *,
    k: Any = (1, 5, 10),
    allow_empty: bool = False,
    num_bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> RetrievalResult:
    """Ranked retrieval of known relevant rows: sources of a fact, copies, poisoned examples.

    With ranks r_1 < … < r_m of a target's m relevant rows among all rows by falling score: reciprocal rank
    1 / r_1; recall@k in its two usual meanings, "any" = [r_1 ≤ k] and "all" = #{j : r_j ≤ k} / m;
    precision@k = #{j : r_j ≤ k} / k; average precision = (1/m) Σ_j j / r_j (Manning, Raghavan and Schütze,
    Introduction to Information Retrieval, 2008, section 8.4; for attribution: Akyürek et al., 2022).

    Rows of equal scores are ranked in row order, as `Scores.top` does. So constant scores do not give chance
    level where relevant rows come first (or last) in the training set: permute the rows for that.

    Lazy scores are read twice, block by block: the scores of the relevant rows first, then for each of them
    the number of rows above it. Memory holds one block and one number per relevant pair, never [N, T].
    Intervals are percentile bootstraps that resample targets.

    Args:
        scores: [N, T]: an array, a tensor or lazy scores.
        relevant: for each target the numbers of its relevant rows (a sequence of T sets, lists or arrays), or
            a boolean array [N, T].
        k: one number of retrieved rows, or several.
        allow_empty: leave targets without relevant rows out (and count them) instead of refusing them.
        num_bootstrap: resamples for the intervals.
        seed: of the bootstrap.
        confidence: level of the intervals.

    Returns:
        The measures with intervals, and the ranks they are made of.

    Raises:
        InputError: shapes that disagree, rows out of range, k out of range, a target without relevant rows
            (unless `allow_empty`), or none with any.
        NonFiniteError: NaN or infinity in the scores.
    """
    check_count(num_bootstrap, "num_bootstrap", 1)
    checked = as_scores(scores)
    ks = check_ks(k, checked.num_train)
    rows = _relevant_rows(relevant, checked.num_train, checked.num_targets)
    num_empty = _count_empty(rows, allow_empty)
    ranks = relevant_ranks(checked, rows)

    def mean(values: list[float]) -> Estimate:
        return mean_of_targets(
            np.array(values), num_bootstrap=num_bootstrap, seed=seed, confidence=confidence
        )

    kept = [one for one in ranks if len(one)]
    found = {one: [int((ranks_m <= one).sum()) for ranks_m in kept] for one in ks}
    return RetrievalResult(
        mrr=mean([1 / ranks_m[0] for ranks_m in kept]),
        average_precision=mean([_average_precision(ranks_m) for ranks_m in kept]),
        recall_any={one: mean([float(count > 0) for count in found[one]]) for one in ks},
        recall_all={one: mean([count / len(r) for count, r in zip(found[one], kept)]) for one in ks},
        precision={one: mean([count / one for count in found[one]]) for one in ks},
        ranks=tuple(ranks),
        num_rows=checked.num_train,
        num_targets=checked.num_targets,
        num_empty=num_empty,
    )


def relevant_ranks(scores: CheckedScores, rows: list[Rows]) -> list[Rows]:
    """Rank from 1 of each given row among all rows of its target by falling score, equal scores by row.

    rank(i) = 1 + #{j : τ_j > τ_i} + #{j < i : τ_j = τ_i}, summed over blocks of rows.

    Args:
        scores: [N, T].
        rows: for each target, rising row numbers.

    Returns:
        For each target its rows' ranks, rising.
    """
    values = [np.empty(len(rows_m)) for rows_m in rows]
    for start, block_RT in scores.blocks():
        block = block_RT.numpy()
        for target, rows_m in enumerate(rows):
            low, high = np.searchsorted(rows_m, (start, start + len(block)))
            values[target][low:high] = block[rows_m[low:high] - start, target]
    above = [np.zeros(len(rows_m), dtype=np.int64) for rows_m in rows]
    for start, block_RT in scores.blocks():
        block = block_RT.numpy()
        for target, rows_m in enumerate(rows):
            if len(rows_m):
                above[target] += _above_in_block(block[:, target], start, rows_m, values[target])
    return [np.sort(counts) + 1 for counts in above]


def _above_in_block(column_R: Floats, start: int, rows_m: Rows, values_m: Floats) -> Rows:
    """How many rows of one block rank above each given row."""
    order = np.argsort(-column_R, kind="stable")
    falling = -column_R[order]
    low, high = np.searchsorted(rows_m, (start, start + len(column_R)))
    out = np.empty(len(rows_m), dtype=np.int64)
    # Rows before this block win ties against it, rows after it lose them, rows in it have their place.
    out[:low] = np.searchsorted(falling, -values_m[:low], side="left")
    out[high:] = np.searchsorted(falling, -values_m[high:], side="right")
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    out[low:high] = place[rows_m[low:high] - start]
    return out


def _average_precision(ranks_m: Rows) -> float:
    if len(ranks_m) == 0:
        return float("nan")
    return float((np.arange(1, len(ranks_m) + 1) / ranks_m).mean())


def _relevant_rows(relevant: Any, num_rows: int, num_targets: int) -> list[Rows]:
    """For each target its relevant rows, rising and distinct."""
    if hasattr(relevant, "dtype"):
        array = as_array(relevant)
        if array.dtype == np.bool_ and array.ndim == 2:
            check_axis(array.shape[0], num_rows, what="relevant", axis="N (rows)", other="scores")
            check_axis(array.shape[1], num_targets, what="relevant", axis="T (targets)", other="scores")
            return [np.flatnonzero(array[:, target]) for target in range(num_targets)]
    sets = list(relevant)
    check_axis(len(sets), num_targets, what="relevant", axis="T (targets)", other="scores")
    return [_one_set(one, target, num_rows) for target, one in enumerate(sets)]


def _one_set(rows: Any, target: int, num_rows: int) -> Rows:
    array = as_array(sorted(rows) if isinstance(rows, (set, frozenset)) else rows)
    if array.size == 0:
        return np.zeros(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(
            f"relevant rows of target {target} must be row numbers, got dtype {array.dtype} of shape "
            f"{list(array.shape)}. Pass T sets of row numbers, or a boolean array [N, T]."
        )
    numbers = np.unique(array.astype(np.int64))
    if numbers[0] < 0 or numbers[-1] >= num_rows:
        raise InputError(
            f"relevant rows of target {target} must lie in [0, {num_rows}), got numbers from {numbers[0]} to "
            f"{numbers[-1]}."
        )
    return numbers


def _count_empty(rows: list[Rows], allow_empty: bool) -> int:
    empty = [target for target, rows_m in enumerate(rows) if len(rows_m) == 0]
    if len(empty) == len(rows):
        raise InputError(
            f"None of the {len(rows)} targets has relevant rows: nothing can be retrieved. Pass T sets of row numbers, or a boolean array [N, T]."
        )
    if empty and not allow_empty:
        raise InputError(
            f"{len(empty)} of {len(rows)} targets have no relevant rows, the first is target {empty[0]}. Drop "
            "them, or pass allow_empty=True to leave them out and have them counted in `num_empty`."
        )
    return len(empty)
