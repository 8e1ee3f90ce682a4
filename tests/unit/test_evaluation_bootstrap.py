"""Percentile bootstrap intervals."""

import numpy as np
import pytest

from trak import InputError, NonFiniteError
from trak.evaluation import bootstrap_mean, percentile_interval


def test_percentiles_leave_undefined_resamples_out() -> None:
    interval = percentile_interval([*range(101), np.nan], confidence=0.9)
    assert (interval.low, interval.high, interval.confidence) == (pytest.approx(5), pytest.approx(95), 0.9)
    nothing = percentile_interval([np.nan])
    assert np.isnan(nothing.low)
    assert np.isnan(nothing.high)


def test_the_mean_of_a_normal_sample_has_the_textbook_interval() -> None:
    values = np.random.default_rng(0).normal(size=400)
    interval = bootstrap_mean(values, num_bootstrap=4000, seed=1)
    half = 1.96 * values.std() / np.sqrt(400)
    assert interval.low == pytest.approx(values.mean() - half, abs=0.01)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.01)
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(InputError, match="confidence must be between 0 and 1"):
        percentile_interval([1.0], confidence=95)
    with pytest.raises(InputError, match=r"samples must be \[B\]"):
        percentile_interval([[1.0]])
    with pytest.raises(InputError, match="at least one value"):
        bootstrap_mean([])
    with pytest.raises(InputError, match="num_bootstrap"):
        bootstrap_mean([1.0], num_bootstrap=0)
    with pytest.raises(InputError, match="seed"):
        bootstrap_mean([1.0], seed=-1)
    with pytest.raises(NonFiniteError, match="values"):
        bootstrap_mean([np.inf])
