"""Correlation with leave-one-out changes."""

import numpy as np
import pytest
from scipy import stats

from trak import ArrayScores, InputError, NonFiniteError
from trak.evaluation import loo_correlation, pearson

N, T = 40, 5


@pytest.fixture
def case() -> tuple[np.ndarray, np.ndarray]:
    """(scores, changes) that are related."""
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(N, T))
    return scores, scores**3 + generator.normal(size=(N, T))


def test_both_correlations_are_scipys(case) -> None:
    scores, changes = case
    result = loo_correlation(scores, changes)
    expected = [stats.pearsonr(scores[:, t], changes[:, t]).statistic for t in range(T)]
    np.testing.assert_allclose(result.pearson_per_target, expected, rtol=1e-10)
    assert result.pearson.mean == pytest.approx(np.mean(expected))
    expected = [stats.spearmanr(scores[:, t], changes[:, t]).statistic for t in range(T)]
    np.testing.assert_allclose(result.spearman_per_target, expected, rtol=1e-10)
    assert result.spearman.mean == pytest.approx(np.mean(expected))
    for estimate in (result.pearson, result.spearman):
        assert estimate.low < estimate.mean < estimate.high
    assert result.pearson.mean != pytest.approx(result.spearman.mean, abs=0.01)
    assert "5 targets, 40 rows" in str(result)


def test_influence_of_least_squares_has_the_right_sign_and_order() -> None:
    """Retraining for real: the influence x_t'(X'X)⁻¹x_i · residual_i against leave-one-out fits."""
    generator = np.random.default_rng(1)
    x, targets = generator.normal(size=(N, 3)), generator.normal(size=(T, 3))
    y = x @ [1.0, -2.0, 0.5] + generator.normal(size=N)
    fit = np.linalg.lstsq(x, y, rcond=None)[0]
    scores = (x @ np.linalg.inv(x.T @ x) @ targets.T) * (y - x @ fit)[:, None]
    changes = np.empty((N, T))
    for row in range(N):
        rest = np.delete(np.arange(N), row)
        changes[row] = targets @ (fit - np.linalg.lstsq(x[rest], y[rest], rcond=None)[0])
    result = loo_correlation(scores, changes)
    assert result.pearson.low > 0.98
    assert result.spearman.low > 0.98


def test_some_rows_in_any_order(case) -> None:
    scores, changes = case
    rows = np.array([30, 2, 17, 5, 11])
    result = loo_correlation(ArrayScores(scores), changes[rows], rows=rows)
    expected = loo_correlation(scores[rows], changes[rows])
    np.testing.assert_array_equal(result.pearson_per_target, expected.pearson_per_target)
    assert result.spearman == expected.spearman
    assert result.num_rows == 5


def test_constant_targets_are_left_out(case) -> None:
    scores, changes = case
    changes[:, 3] = 0.1
    result = loo_correlation(scores, changes)
    for per_target in (result.pearson_per_target, result.spearman_per_target):
        assert np.isnan(per_target).tolist() == [False, False, False, True, False]
    assert result.num_constant == 1
    assert result.pearson.mean == pytest.approx(result.pearson_per_target[[0, 1, 2, 4]].mean())
    with pytest.raises(InputError, match="None of the 5 targets has a correlation"):
        loo_correlation(np.ones((N, T)), changes)


def test_pearson_of_tiny_and_huge_numbers_and_constants() -> None:
    generator = np.random.default_rng(2)
    first, second = generator.normal(size=(2, 20, 3))
    expected = pearson(first, second)
    np.testing.assert_allclose(pearson(first * [1e-200, 1e200, 1], second), expected, rtol=1e-10)
    assert np.isnan(pearson(np.full((20, 3), 0.1), second)).all()
    with pytest.raises(InputError, match="at least 2 observations"):
        pearson(first[:1], second[:1])


def test_what_is_refused(case) -> None:
    scores, changes = case
    with pytest.raises(InputError, match=r"changes has 39 along axis rows.*pass rows="):
        loo_correlation(scores, changes[:-1])
    with pytest.raises(InputError, match=r"changes has 4 along axis T \(targets\)"):
        loo_correlation(scores, changes[:, :-1])
    with pytest.raises(InputError, match="at least 3 of them"):
        loo_correlation(scores, changes[:2], rows=[0, 1])
    with pytest.raises(InputError, match="holds a row more than once"):
        loo_correlation(scores, changes[:3], rows=[0, 1, 1])
    with pytest.raises(InputError, match=r"rows must lie in \[0, 40\)"):
        loo_correlation(scores, changes[:3], rows=[0, 1, 40])
    with pytest.raises(InputError, match="must be a list of row numbers, got dtype bool"):
        loo_correlation(scores, changes, rows=np.ones(N, dtype=bool))
    changes[4, 2] = np.nan
    with pytest.raises(NonFiniteError, match=r"changes .* the first at \[4, 2\]"):
        loo_correlation(scores, changes)
