"""A mean with its bootstrap interval, and resampling of two crossed factors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trak.evaluation._values import Floats
from trak.evaluation.bootstrap import bootstrap_mean, make_generator, percentile_interval, resample_counts

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Estimate:
    """A mean and its percentile-bootstrap interval.

    Attributes:
        mean: the mean.
        low: lower end of the interval.
        high: upper end.
        confidence: level of the interval.
    """

    mean: float
    low: float
    high: float
    confidence: float

    def __str__(self) -> str:
        """The mean and the interval."""
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean_of_targets(
    values_T: Floats, *, num_bootstrap: int = 1000, seed: int = 0, confidence: float = 0.95
) -> Estimate:
    """Mean over targets and its interval from resampling targets; NaN (a target left out) is not counted.

    Args:
        values_T: [T].
        num_bootstrap: resamples.
        seed: of the resampling.
        confidence: level of the interval.

    Returns:
        The estimate; all NaN where no target has a value.
    """
    defined = values_T[~np.isnan(values_T)]
    if defined.size == 0:
        return Estimate(float("nan"), float("nan"), float("nan"), confidence)
    interval = bootstrap_mean(defined, num_bootstrap=num_bootstrap, seed=seed, confidence=confidence)
    return Estimate(float(defined.mean()), interval.low, interval.high, confidence)


def crossed_counts(
    num_rows: int, num_targets: int, *, num_bootstrap: int, seed: int
) -> tuple[Counts, Counts]:
    """How often each row and each target occurs in each resample: ([B, num_rows], [B, T])."""
    generator = make_generator(seed)
    rows = resample_counts(num_rows, num_bootstrap, generator)
    return rows, resample_counts(num_targets, num_bootstrap, generator)


def resampled_mean(values_BT: Floats, counts_BT: Counts) -> Floats:
    """Mean over the targets of each resample that have a value there, [B]; NaN where none has one."""
    weights_BT = np.where(np.isnan(values_BT), 0, counts_BT)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nansum(values_BT * weights_BT, axis=1) / weights_BT.sum(axis=1)


def crossed_estimate(values_T: Floats, samples_BT: Floats, counts_BT: Counts, confidence: float) -> Estimate:
    """Mean of a statistic over targets, with the interval from its values in resamples.

    Args:
        values_T: the statistic in the full sample, [T]; NaN for targets left out.
        samples_BT: in each resample of the rows, [B, T].
        counts_BT: how often each target occurs in each resample.
        confidence: level of the interval.
    """
    interval = percentile_interval(resampled_mean(samples_BT, counts_BT), confidence=confidence)
    defined = values_T[~np.isnan(values_T)]
    mean = float(defined.mean()) if defined.size else float("nan")
    return Estimate(mean, interval.low, interval.high, confidence)
