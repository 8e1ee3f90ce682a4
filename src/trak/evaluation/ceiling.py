"""How high can an LDS be when the retrained models themselves are noisy?

Legend: S subsets, R models per subset, T targets, B bootstrap resamples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from trak.errors import InputError
from trak.evaluation._values import Floats, as_floats, check_count
from trak.evaluation.bootstrap import make_generator
from trak.evaluation.estimates import crossed_counts, crossed_estimate
from trak.evaluation.ranks import average_ranks, resampled_correlation, spearman

Split = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class NoiseCeilingResult:
    """What `noise_ceiling` found.

    Attributes:
        per_target: ceiling of each target's rank correlation, [T] float64 in [0, 1]; 0 where its halves do
            not agree, NaN where its outputs do not vary.
        reliability: of each target's mean over R models, [T]: the square of `per_target`.
        mean: mean of `per_target`; the highest LDS to be expected.
        low: lower end of the bootstrap interval of `mean`.
        high: upper end.
        confidence: level of the interval.
        num_subsets: S.
        num_models: R.
        num_targets: T, the left-out ones included.
        num_splits: splits of the models into halves that were averaged.
        num_unreliable: targets whose halves do not agree at all (correlation ≤ 0): their outputs over subsets
            are noise as far as these models can tell.
        num_constant: targets whose outputs are the same on every subset; left out.
    """

    per_target: Floats
    reliability: Floats
    mean: float
    low: float
    high: float
    confidence: float
    num_subsets: int
    num_models: int
    num_targets: int
    num_splits: int
    num_unreliable: int
    num_constant: int

    def __str__(self) -> str:
        """One line: ceiling, interval and sizes."""
        return (
            f"noise ceiling {self.mean:.3f} [{self.low:.3f}, {self.high:.3f}] "
            f"({self.num_targets} targets, {self.num_subsets} subsets × {self.num_models} models)"
        )


def noise_ceiling(
    outputs: Any,
    *,
    max_splits: int = 50,
    num_bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> NoiseCeilingResult:
    """The highest LDS that any predictor of the subset means could reach with R noisy models per subset.

    The R models of every subset are split into halves of h = ⌊R/2⌋ models; r is the rank correlation, over
    subsets, of the two halves' mean outputs, averaged over splits. Spearman (1910) and Brown (1910) give the
    reliability of the mean of all R = m·h models,

        ρ = m·r / (1 + (m − 1)·r),

    and a predictor that knows the noiseless mean of every subset correlates with the observed one by √ρ, any
    other by less (Spearman's attenuation formula, 1904): √ρ is the ceiling. Compare it with `lds` on the same
    [S, R, T] outputs.

    Assumptions: output = (value of the subset) + (error of the model), with errors independent between models
    and of one variance; models of a subset that share anything random (initialisation, order of data) break
    this and raise the ceiling. The formulas are exact for Pearson's correlation; with ranks, as here, they
    are within about 0.01 for normally distributed outputs. With few subsets r is noisy: negative r counts as
    0, and the root makes the mean over targets somewhat too low.

    Args:
        outputs: [S, R, T], R ≥ 2 models with their own training seeds for each of S subsets.
        max_splits: all splits into halves where there are no more than this, else as many random ones.
        num_bootstrap: resamples (of subsets and targets together, as in `lds`) for the interval.
        seed: of the bootstrap and of random splits.
        confidence: level of the interval.

    Returns:
        Ceilings, and the interval of their mean.

    Raises:
        InputError: another shape, R = 1, fewer than three subsets, or no target that varies.
        NonFiniteError: NaN or infinity.
    """
    check_count(num_bootstrap, "num_bootstrap", 1)
    check_count(max_splits, "max_splits", 1)
    outputs_SRT = as_floats(outputs, "outputs", ("S", "R", "T"))
    _check_sizes(outputs_SRT)
    num_subsets, num_models, num_targets = outputs_SRT.shape
    ratio = num_models / (num_models // 2)
    splits = list(_splits(num_models, max_splits, seed))
    counts_BS, counts_BT = crossed_counts(num_subsets, num_targets, num_bootstrap=num_bootstrap, seed=seed)
    halves_T, halves_BT = np.zeros(num_targets), np.zeros((num_bootstrap, num_targets))
    for first, second in splits:
        means = outputs_SRT[:, list(first)].mean(axis=1), outputs_SRT[:, list(second)].mean(axis=1)
        halves_T += spearman(*means) / len(splits)
        ranks = average_ranks(means[0]), average_ranks(means[1])
        halves_BT += resampled_correlation(*ranks, counts_BS) / len(splits)
    if np.isnan(halves_T).all():
        raise InputError(
            f"The outputs of none of the {num_targets} targets vary over the {num_subsets} subsets: nothing "
            "can be predicted. Check that the models were trained on different subsets."
        )
    reliability_T = _spearman_brown(halves_T, ratio)
    ceiling_T = np.sqrt(reliability_T)
    samples_BT = np.sqrt(_spearman_brown(halves_BT, ratio))
    estimate = crossed_estimate(ceiling_T, samples_BT, counts_BT, confidence)
    return NoiseCeilingResult(
        per_target=ceiling_T,
        reliability=reliability_T,
        mean=estimate.mean,
        low=estimate.low,
        high=estimate.high,
        confidence=confidence,
        num_subsets=num_subsets,
        num_models=num_models,
        num_targets=num_targets,
        num_splits=len(splits),
        num_unreliable=int((halves_T <= 0).sum()),
        num_constant=int(np.isnan(halves_T).sum()),
    )


def _check_sizes(outputs_SRT: Floats) -> None:
    if 0 in outputs_SRT.shape:
        raise InputError(f"outputs is empty: shape {list(outputs_SRT.shape)}.")
    if outputs_SRT.shape[1] < 2:
        raise InputError(
            "A noise ceiling needs at least 2 models per subset (axis R of outputs [S, R, T]), got 1: the "
            "noise of training shows only between models of the same subset. Train every subset again with "
            "other seeds."
        )
    if outputs_SRT.shape[0] < 3:
        raise InputError(
            f"A noise ceiling needs at least 3 subsets (a few dozen to say much), got {len(outputs_SRT)}."
        )


def _spearman_brown(correlation: Floats, ratio: float) -> Floats:
    """Reliability of `ratio` times as many models; negative correlations count as 0, NaN stays."""
    positive = np.maximum(correlation, 0.0)
    return ratio * positive / (1 + (ratio - 1) * positive)


def _splits(num_models: int, max_splits: int, seed: int) -> Iterator[Split]:
    """Pairs of disjoint halves of the models, all of them or `max_splits` random ones; odd R leave one out."""
    half = num_models // 2
    pairs = math.comb(num_models, half) * math.comb(num_models - half, half) // 2
    if pairs <= max_splits:
        for first in itertools.combinations(range(num_models), half):
            rest = [model for model in range(num_models) if model not in first]
            for second in itertools.combinations(rest, half):
                if first < second:
                    yield first, second
        return
    generator = make_generator(seed)
    for _ in range(max_splits):
        order = generator.permutation(num_models).tolist()
        yield tuple(order[:half]), tuple(order[half : 2 * half])
