"""Percentile bootstrap intervals with fixed seeds.

Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13: resample with replacement,
recompute, take the quantiles of what comes out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trak.errors import InputError
from trak.evaluation._values import Floats, as_floats, check_count


@dataclass(frozen=True)
class Interval:
    """A confidence interval: `low` to `high` at level `confidence`."""

    low: float
    high: float
    confidence: float


def make_generator(seed: int) -> np.random.Generator:
    """The generator of all draws of this package: PCG64, whose stream numpy keeps stable."""
    check_count(seed, "seed", 0)
    return np.random.Generator(np.random.PCG64(seed))


def resample_counts(num_items: int, num_bootstrap: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """How often each item occurs in each resample with replacement: [num_bootstrap, num_items]."""
    return generator.multinomial(num_items, np.full(num_items, 1 / num_items), size=num_bootstrap)


def percentile_interval(samples: Any, *, confidence: float = 0.95) -> Interval:
    """The central interval that holds `confidence` of bootstrap samples.

    Args:
        samples: the statistic in each resample, [B]; NaN (a resample where it is undefined) is left out.
        confidence: in (0, 1).

    Returns:
        The interval; (NaN, NaN) where no sample is defined.

    Raises:
        InputError: `samples` is not one-dimensional, or `confidence` is not in (0, 1).
    """
    if not 0 < confidence < 1:
        raise InputError(f"confidence must be between 0 and 1, got {confidence}. For 95% pass 0.95.")
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1:
        raise InputError(f"samples must be [B], got shape {list(values.shape)}.")
    values = values[~np.isnan(values)]
    if values.size == 0:
        return Interval(float("nan"), float("nan"), confidence)
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, (tail, 1 - tail))
    return Interval(float(low), float(high), confidence)


def bootstrap_mean(
    values: Any, *, num_bootstrap: int = 1000, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """Percentile interval of a mean, resampling the values.

    Args:
        values: [n], finite.
        num_bootstrap: number of resamples.
        seed: of the resampling; the same seed gives the same interval.
        confidence: in (0, 1).

    Returns:
        The interval.

    Raises:
        InputError: `values` is empty or not one-dimensional, or an option is out of range.
        NonFiniteError: a value is NaN or infinite.
    """
    check_count(num_bootstrap, "num_bootstrap", 1)
    array: Floats = as_floats(values, "values", ("n",))
    if array.size == 0:
        raise InputError("values is empty: a mean needs at least one value.")
    counts = resample_counts(array.size, num_bootstrap, make_generator(seed))
    return percentile_interval(counts @ array / array.size, confidence=confidence)
