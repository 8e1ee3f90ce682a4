"""The noise ceiling of the LDS."""

import numpy as np
import pytest
from scipy import stats

from trak import InputError, NonFiniteError
from trak.evaluation import noise_ceiling, spearman
from trak.evaluation.ceiling import _splits


def simulate(num_subsets: int, num_models: int, num_targets: int, noise: float, seed: int = 0):
    """(noiseless subset values [S, T], outputs [S, R, T])."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(num_subsets, num_targets))
    errors = noise * generator.normal(size=(num_subsets, num_models, num_targets))
    return values, values[:, None] + errors


def brown(r: float, ratio: float) -> float:
    return ratio * r / (1 + (ratio - 1) * r)


def test_two_models_by_hand() -> None:
    _, outputs = simulate(30, 2, 4, noise=0.7)
    result = noise_ceiling(outputs)
    r = [stats.spearmanr(outputs[:, 0, t], outputs[:, 1, t]).statistic for t in range(4)]
    np.testing.assert_allclose(result.reliability, [brown(one, 2) for one in r], rtol=1e-10)
    np.testing.assert_allclose(result.per_target, np.sqrt([brown(one, 2) for one in r]), rtol=1e-10)
    assert result.mean == pytest.approx(result.per_target.mean())
    assert result.low < result.mean < result.high
    assert (result.num_splits, result.num_models, result.num_subsets) == (1, 2, 30)
    assert "30 subsets × 2 models" in str(result)


def test_three_models_average_their_three_pairs() -> None:
    _, outputs = simulate(30, 3, 1, noise=0.7)
    pairs = [(0, 1), (0, 2), (1, 2)]
    r = np.mean([stats.spearmanr(outputs[:, a, 0], outputs[:, b, 0]).statistic for a, b in pairs])
    result = noise_ceiling(outputs)
    assert result.per_target[0] == pytest.approx(np.sqrt(brown(r, 3)), rel=1e-10)
    assert result.num_splits == 3


@pytest.mark.parametrize(("num_models", "noise"), [(2, 1.0), (4, 1.0), (5, 2.0)])
def test_it_is_what_a_predictor_that_knows_the_truth_reaches(num_models: int, noise: float) -> None:
    values, outputs = simulate(800, num_models, 20, noise)
    reached = spearman(values, outputs.mean(axis=1)).mean()
    result = noise_ceiling(outputs, num_bootstrap=50)
    # Per target the deviation is about 1/sqrt(800); over 20 targets 0.01. No root, or no correction: off by > 0.05.
    assert result.mean == pytest.approx(reached, abs=0.025)
    assert abs(reached**2 - reached) > 0.05


def test_no_noise_is_one_and_noise_alone_near_zero() -> None:
    _, outputs = simulate(25, 4, 3, noise=0.0)
    result = noise_ceiling(outputs)
    np.testing.assert_allclose(result.per_target, 1.0)
    assert (result.low, result.high) == pytest.approx((1.0, 1.0))
    pure = noise_ceiling(np.random.default_rng(0).normal(size=(2000, 4, 20)), num_bootstrap=20)
    assert pure.mean < 0.15
    assert pure.num_unreliable > 0
    assert (pure.per_target[pure.reliability == 0] == 0).all()


def test_splits_are_disjoint_halves_all_of_them_where_they_are_few() -> None:
    for num_models, expected in ((2, 1), (3, 3), (4, 3), (5, 15), (6, 10)):
        splits = list(_splits(num_models, 50, 0))
        assert len({frozenset([first, second]) for first, second in splits}) == len(splits) == expected
    for first, second in _splits(9, 30, 0):
        assert len(first) == len(second) == 4
        assert not set(first) & set(second)
    assert len(list(_splits(9, 30, 0))) == 30


def test_the_seed_decides_and_constant_targets_are_left_out() -> None:
    _, outputs = simulate(20, 8, 3, noise=1.0)
    first, again = noise_ceiling(outputs, max_splits=5, seed=1), noise_ceiling(outputs, max_splits=5, seed=1)
    assert (first.mean, first.low, first.high) == (again.mean, again.low, again.high)
    assert first.mean != noise_ceiling(outputs, max_splits=5, seed=2).mean
    outputs[:, :, 1] = 4.0
    result = noise_ceiling(outputs)
    assert np.isnan(result.per_target).tolist() == [False, True, False]
    assert result.num_constant == 1
    assert result.mean == pytest.approx(result.per_target[[0, 2]].mean())


def test_what_is_refused() -> None:
    _, outputs = simulate(20, 2, 3, noise=1.0)
    with pytest.raises(InputError, match=r"at least 2 models per subset .* Train every subset again"):
        noise_ceiling(outputs[:, :1])
    with pytest.raises(InputError, match=r"outputs must be \[S, R, T\]"):
        noise_ceiling(outputs[:, 0])
    with pytest.raises(InputError, match="at least 3 subsets"):
        noise_ceiling(outputs[:2])
    with pytest.raises(InputError, match="none of the 3 targets vary"):
        noise_ceiling(np.zeros((20, 2, 3)))
    outputs[1, 1, 1] = np.inf
    with pytest.raises(NonFiniteError, match=r"\[1, 1, 1\]"):
        noise_ceiling(outputs)
