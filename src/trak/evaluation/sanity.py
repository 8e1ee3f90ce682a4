"""Cheap checks that need no retraining: classes, agreement between sketches, randomised models.

Legend: N training rows, T targets, t targets read at once, k rows with the highest scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trak.errors import InputError
from trak.evaluation._reading import CheckedScores, as_scores, check_k, check_same_shape, top_rows
from trak.evaluation._values import Floats, as_array, check_axis, check_count
from trak.evaluation.estimates import Estimate, mean_of_targets
from trak.evaluation.ranks import spearman

COLUMN_SCORES = 1 << 22
"""Scores of whole columns in memory at once, for correlations over all rows."""


@dataclass(frozen=True, eq=False)
class ClassAgreementResult:
    """What `class_agreement` found.

    Attributes:
        agreement: mean over targets of the share of the top k with the target's class.
        chance: what rows in random order reach: mean over targets of the share of all rows of its class.
        per_target: share of each target, [T] float64.
        chance_per_target: [T] float64.
        k: rows looked at for each target.
        num_targets: T.
        num_unseen: targets whose class no training row has; they count with share 0.
    """

    agreement: Estimate
    chance: float
    per_target: Floats
    chance_per_target: Floats
    k: int
    num_targets: int
    num_unseen: int

    def __str__(self) -> str:
        """One line: share, chance and sizes."""
        return (
            f"class agreement of the top {self.k}: {self.agreement}, chance {self.chance:.3f} "
            f"({self.num_targets} targets)"
        )


@dataclass(frozen=True, eq=False)
class OverlapResult:
    """What `overlap` found.

    Attributes:
        jaccard: mean over targets of |A ∩ B| / |A ∪ B| for the two sets of top k rows.
        chance_jaccard: its expectation for two random rankings.
        average_overlap: mean over targets of the average overlap, which looks at the order too.
        chance_average_overlap: its expectation for two random rankings, (k + 1) / (2N).
        jaccard_per_target: [T] float64.
        average_overlap_per_target: [T] float64.
        k: rows looked at for each target.
        num_targets: T.
    """

    jaccard: Estimate
    chance_jaccard: float
    average_overlap: Estimate
    chance_average_overlap: float
    jaccard_per_target: Floats
    average_overlap_per_target: Floats
    k: int
    num_targets: int

    def __str__(self) -> str:
        """One line: both measures with their chance levels."""
        return (
            f"overlap of the top {self.k}: Jaccard {self.jaccard}, chance {self.chance_jaccard:.3f}; average "
            f"overlap {self.average_overlap}, chance {self.chance_average_overlap:.3f} "
            f"({self.num_targets} targets)"
        )


@dataclass(frozen=True, eq=False)
class ScoreCorrelationResult:
    """What `score_correlation` found.

    Attributes:
        correlation: mean over targets of Spearman's correlation over all rows.
        per_target: [T] float64; NaN for the targets left out.
        num_rows: N.
        num_targets: T, the left-out ones included.
        num_constant: targets that have the same score for all rows in one of the two; left out.
    """

    correlation: Estimate
    per_target: Floats
    num_rows: int
    num_targets: int
    num_constant: int

    def __str__(self) -> str:
        """One line: correlation and sizes."""
        left_out = f", {self.num_constant} constant targets left out" if self.num_constant else ""
        return (
            f"score correlation {self.correlation} "
            f"({self.num_targets} targets, {self.num_rows} rows{left_out})"
        )


def class_agreement(
    scores: Any,
    train_labels: Any,
    target_labels: Any,
    k: int = 10,
    *,
    num_bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> ClassAgreementResult:
    """Share of each target's top k rows that have its class, beside the share in random order.

    The identical-class test of Hanawa et al. (2021): scores that fail it are hardly an explanation of a
    classifier. Passing it proves little, since a score by class alone passes perfectly. Equal scores are
    taken in row order.

    Args:
        scores: [N, T]: an array, a tensor or lazy scores.
        train_labels: [N]; compared with `==`.
        target_labels: [T], the class whose output was attributed.
        k: rows looked at for each target.
        num_bootstrap: resamples of targets for the interval.
        seed: of the bootstrap.
        confidence: level of the interval.

    Returns:
        Shares and chance levels.

    Raises:
        InputError: lengths that disagree, k out of range, or classes of which the training set has none.
        NonFiniteError: NaN or infinity in the scores.
    """
    check_count(num_bootstrap, "num_bootstrap", 1)
    checked = as_scores(scores)
    k = check_k(k, checked.num_train)
    train_N, target_T = as_array(train_labels), as_array(target_labels)
    for labels, name, size in (
        (train_N, "train_labels", checked.num_train),
        (target_T, "target_labels", checked.num_targets),
    ):
        if labels.ndim != 1:
            raise InputError(f"{name} must have one dimension, got shape {list(labels.shape)}.")
        check_axis(len(labels), size, what=name, axis="0", other="scores")
    chance_T = np.array([np.mean(train_N == label) for label in target_T])
    if not chance_T.any():
        raise InputError(
            f"No training row has the class of any of the {len(target_T)} targets: train_labels holds such as "
            f"{train_N[0]!r}, target_labels such as {target_T[0]!r}. Use one coding for both."
        )
    share_T = (train_N[top_rows(checked, k)] == target_T[:, None]).mean(axis=1)
    return ClassAgreementResult(
        agreement=mean_of_targets(share_T, num_bootstrap=num_bootstrap, seed=seed, confidence=confidence),
        chance=float(chance_T.mean()),
        per_target=share_T,
        chance_per_target=chance_T,
        k=k,
        num_targets=len(target_T),
        num_unseen=int((chance_T == 0).sum()),
    )


def overlap(
    scores_a: Any,
    scores_b: Any,
    k: int = 10,
    *,
    num_bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> OverlapResult:
    """Agreement of the top k rows of two scores of the same rows and targets.

    With A_d and B_d the top d rows of each: Jaccard index |A_k ∩ B_k| / |A_k ∪ B_k|, and average overlap
    (1/k) Σ_{d≤k} |A_d ∩ B_d| / d (Fagin, Kumar and Sivakumar, 2003; Webber, Moffat and Zobel, 2010), which
    weighs the first places most. Between attributions with the same checkpoints that differ in the
    projection's seed alone it says how much of a top-k list is the sketch's own: no finding about single rows
    can be more reliable. Equal scores are taken in row order, so constant scores agree perfectly.

    Args:
        scores_a: [N, T]: an array, a tensor or lazy scores.
        scores_b: [N, T].
        k: rows looked at for each target.
        num_bootstrap: resamples of targets for the intervals.
        seed: of the bootstrap.
        confidence: level of the intervals.

    Returns:
        Both measures with their chance levels.

    Raises:
        InputError: shapes that disagree, or k out of range.
        NonFiniteError: NaN or infinity in the scores.
    """
    check_count(num_bootstrap, "num_bootstrap", 1)
    first, second = as_scores(scores_a, "scores_a"), as_scores(scores_b, "scores_b")
    check_same_shape(first, second)
    k = check_k(k, first.num_train)
    shared_Tk = _shared_by_depth(top_rows(first, k), top_rows(second, k))
    jaccard_T = shared_Tk[:, -1] / (2 * k - shared_Tk[:, -1])
    average_T = (shared_Tk / np.arange(1, k + 1)).mean(axis=1)

    def mean(values_T: Floats) -> Estimate:
        return mean_of_targets(values_T, num_bootstrap=num_bootstrap, seed=seed, confidence=confidence)

    return OverlapResult(
        jaccard=mean(jaccard_T),
        chance_jaccard=_chance_jaccard(first.num_train, k),
        average_overlap=mean(average_T),
        chance_average_overlap=(k + 1) / (2 * first.num_train),
        jaccard_per_target=jaccard_T,
        average_overlap_per_target=average_T,
        k=k,
        num_targets=first.num_targets,
    )


def score_correlation(
    scores_a: Any,
    scores_b: Any,
    *,
    num_bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> ScoreCorrelationResult:
    """Spearman's correlation over all rows of two scores, target by target.

    The model-randomisation test of Adebayo et al. (2018): scores of a trained model and of one with random
    weights should be nearly uncorrelated, or they say more about the data than about the model. Between
    checkpoints or projection seeds the correlation should be high. Lazy scores are read a few columns at a
    time; the interval resamples targets.

    Args:
        scores_a: [N, T]: an array, a tensor or lazy scores.
        scores_b: [N, T].
        num_bootstrap: resamples of targets for the interval.
        seed: of the bootstrap.
        confidence: level of the interval.

    Returns:
        Correlations and their mean.

    Raises:
        InputError: shapes that disagree, fewer than two rows, or no target that varies in both.
        NonFiniteError: NaN or infinity in the scores.
    """
    check_count(num_bootstrap, "num_bootstrap", 1)
    first, second = as_scores(scores_a, "scores_a"), as_scores(scores_b, "scores_b")
    check_same_shape(first, second)
    num_rows, num_targets = first.shape
    width = max(1, COLUMN_SCORES // num_rows)
    parts = []
    for start in range(0, num_targets, width):
        targets = torch.arange(start, min(start + width, num_targets))
        parts.append(spearman(_columns(first, targets), _columns(second, targets)))
    per_target = np.concatenate(parts)
    if np.isnan(per_target).all():
        raise InputError(
            f"None of the {num_targets} targets has a rank correlation: its scores are the same for all "
            f"{num_rows} rows in scores_a or in scores_b."
        )
    return ScoreCorrelationResult(
        correlation=mean_of_targets(
            per_target, num_bootstrap=num_bootstrap, seed=seed, confidence=confidence
        ),
        per_target=per_target,
        num_rows=num_rows,
        num_targets=num_targets,
        num_constant=int(np.isnan(per_target).sum()),
    )


def _columns(scores: CheckedScores, targets: torch.Tensor) -> Floats:
    """Whole columns, [N, t]."""
    return torch.cat([block for _, block in scores.select_targets(targets).blocks()]).numpy()


def _shared_by_depth(first_Tk: np.ndarray, second_Tk: np.ndarray) -> np.ndarray:
    """|A_d ∩ B_d| for d = 1 … k, [T, k]: a row is shared from the deeper of its two places on."""
    num_targets, k = first_Tk.shape
    shared_Tk = np.zeros((num_targets, k), dtype=np.int64)
    for target in range(num_targets):
        _, in_first, in_second = np.intersect1d(
            first_Tk[target], second_Tk[target], assume_unique=True, return_indices=True
        )
        shared_Tk[target] = np.bincount(np.maximum(in_first, in_second), minlength=k).cumsum()
    return shared_Tk


def _chance_jaccard(num_rows: int, k: int) -> float:
    """Σ_x P(x) · x / (2k − x), with x = |A ∩ B| hypergeometric: k drawn from N of which k are marked."""

    def log_binomial(n: int, m: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(m + 1) - math.lgamma(n - m + 1)

    total = log_binomial(num_rows, k)
    return sum(
        math.exp(log_binomial(k, x) + log_binomial(num_rows - k, k - x) - total) * x / (2 * k - x)
        for x in range(max(1, 2 * k - num_rows), k + 1)
    )
