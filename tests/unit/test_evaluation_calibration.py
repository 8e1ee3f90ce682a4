"""The slope of actual changes on predicted ones."""

import numpy as np
import pytest
from scipy import stats

from trak import ArrayScores, InputError, NonFiniteError
from trak.evaluation import calibration_slope, random_subsets
from trak.evaluation.calibration import _pooled
from trak.evaluation.estimates import crossed_counts

N, T, S = 50, 6, 40


def make_case(factor: float = 1.0, noise: float = 1.0, seed: int = 0):
    """(scores, masks, outputs) where outputs change by `factor` times what the scores predict."""
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(N, T)) * np.array([1, 1, 1, 1, 3, 0.1])
    masks = random_subsets(N, S, seed=seed).numpy()
    intercepts = 10 * generator.normal(size=T)
    return scores, masks, factor * (masks @ scores) + intercepts + noise * generator.normal(size=(S, T))


def test_slopes_per_target_are_those_of_scipys_linear_regression() -> None:
    scores, masks, outputs = make_case()
    result = calibration_slope(scores, masks, outputs)
    predicted = masks @ scores
    expected = [stats.linregress(predicted[:, t], outputs[:, t]).slope for t in range(T)]
    np.testing.assert_allclose(result.per_target, expected, rtol=1e-10)


def test_the_pooled_slope_is_a_regression_with_an_intercept_for_each_target() -> None:
    scores, masks, outputs = make_case()
    predicted = (masks @ scores).T.reshape(-1)
    design = np.column_stack([predicted, np.kron(np.eye(T), np.ones((S, 1)))])
    expected = np.linalg.lstsq(design, outputs.T.reshape(-1), rcond=None)[0][0]
    result = calibration_slope(scores, masks, outputs)
    assert result.slope == pytest.approx(expected, rel=1e-10)
    assert result.low < result.slope < result.high
    assert "slope 0.9" in str(result) or "slope 1.0" in str(result)


@pytest.mark.parametrize("factor", [-1.0, 0.25, 1.0, 4.0])
def test_without_noise_the_slope_is_the_real_factor(factor: float) -> None:
    scores, masks, outputs = make_case(factor, noise=0.0)
    result = calibration_slope(ArrayScores(scores), masks, outputs)
    np.testing.assert_allclose(result.per_target, factor, rtol=1e-9)
    assert (result.slope, result.low, result.high) == pytest.approx((factor,) * 3, rel=1e-6)


def test_a_resample_is_the_slope_of_repeated_subsets_and_targets() -> None:
    scores, masks, outputs = make_case()
    predicted = masks @ scores
    predicted -= predicted.mean(axis=0)
    actual = outputs - outputs.mean(axis=0)
    counts = crossed_counts(S, T, num_bootstrap=10, seed=3)
    for slope, rows, targets in zip(_pooled(predicted, actual, *counts), *counts):
        p, f = (np.repeat(np.repeat(x, rows, axis=0), targets, axis=1) for x in (predicted, actual))
        p, f = p - p.mean(axis=0), f - f.mean(axis=0)
        assert slope == pytest.approx((p * f).sum() / (p * p).sum(), rel=1e-9)


def test_the_interval_covers_the_real_factor() -> None:
    held = []
    for seed in range(60):
        result = calibration_slope(*make_case(1.0, noise=3.0, seed=seed), num_bootstrap=200)
        held.append(result.low <= 1.0 <= result.high)
    # 95% nominal: below 50 of 60 would be far outside binomial chance.
    assert sum(held) >= 50


def test_constant_predictions_are_left_out_and_constant_outputs_are_slope_zero() -> None:
    scores, masks, outputs = make_case()
    expected = calibration_slope(scores[:, 1:], masks, outputs[:, 1:])
    scores[:, 0] = 0.1
    result = calibration_slope(scores, masks, outputs)
    assert np.isnan(result.per_target).tolist() == [True] + [False] * 5
    assert result.num_constant == 1
    assert result.slope == pytest.approx(expected.slope, rel=1e-12)
    outputs[:, 2] = 7.0
    assert calibration_slope(scores, masks, outputs).per_target[2] == 0


def test_models_of_one_subset_are_averaged_and_the_seed_decides_the_interval() -> None:
    scores, masks, outputs = make_case()
    pair = np.stack([outputs - 1, outputs + 1], axis=1)
    first, again = (
        calibration_slope(scores, masks, pair, seed=2),
        calibration_slope(scores, masks, pair, seed=2),
    )
    assert first.num_models == 2
    assert (first.low, first.high) == (again.low, again.high)
    assert first.slope == pytest.approx(calibration_slope(scores, masks, outputs).slope)


def test_what_is_refused() -> None:
    scores, masks, outputs = make_case()
    with pytest.raises(InputError, match="none of the 6 targets vary"):
        calibration_slope(np.zeros((N, T)), masks, outputs)
    with pytest.raises(InputError, match="at least 3 subsets"):
        calibration_slope(scores, masks[:2], outputs[:2])
    with pytest.raises(InputError, match=r"scores has 5 along axis T \(targets\), but outputs has 6"):
        calibration_slope(scores[:, :5], masks, outputs)
    outputs[3, 1] = np.nan
    with pytest.raises(NonFiniteError, match=r"outputs .* the first at \[3, 1\]"):
        calibration_slope(scores, masks, outputs)
