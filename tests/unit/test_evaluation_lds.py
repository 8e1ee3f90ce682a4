"""The linear datamodeling score: what it is, what it refuses, what it leaves out."""

import numpy as np
import pytest
import torch
from scipy import stats

from trak import ArrayScores, InputError, NonFiniteError
from trak.evaluation import average_ranks, lds, predictions, random_subsets, spearman
from trak.evaluation.bootstrap import make_generator, resample_counts
from trak.evaluation.ranks import resampled_correlation

N, T, S = 60, 7, 40


@pytest.fixture
def case() -> tuple[np.ndarray, torch.Tensor, np.ndarray]:
    """(scores, masks, outputs): outputs follow the scores with noise."""
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(N, T))
    masks = random_subsets(N, S, seed=1)
    outputs = predictions(scores, masks) + 2 * generator.normal(size=(S, T))
    return scores, masks, outputs


def test_predictions_are_sums_over_the_subset(case) -> None:
    scores, masks, _ = case
    by_hand = np.stack([scores[mask.numpy()].sum(axis=0) for mask in masks])
    np.testing.assert_allclose(predictions(scores, masks), by_hand, rtol=1e-12)


def test_ranks_and_spearman_equal_scipys_with_ties() -> None:
    generator = np.random.default_rng(2)
    first, second = generator.integers(0, 5, size=(2, 30, 11))
    np.testing.assert_array_equal(average_ranks(first), stats.rankdata(first, axis=0))
    expected = [stats.spearmanr(first[:, t], second[:, t]).statistic for t in range(11)]
    np.testing.assert_allclose(spearman(first, second), expected, rtol=1e-12)


def test_lds_is_the_mean_of_scipys_spearman(case) -> None:
    scores, masks, outputs = case
    result = lds(scores, masks, outputs)
    predicted = masks.numpy() @ scores
    expected = [stats.spearmanr(predicted[:, t], outputs[:, t]).statistic for t in range(T)]
    np.testing.assert_allclose(result.per_target, expected, rtol=1e-12)
    assert result.mean == pytest.approx(np.mean(expected), rel=1e-12)
    assert result.low < result.mean < result.high
    assert (result.num_subsets, result.num_targets, result.num_models, result.num_constant) == (S, T, 1, 0)
    assert "7 targets, 40 subsets" in str(result)


def test_every_kind_of_scores_gives_the_same(case) -> None:
    scores, masks, outputs = case
    expected = lds(scores, masks, outputs)
    tensors = lds(torch.from_numpy(scores), masks.numpy(), torch.from_numpy(outputs))
    lists = lds(scores.tolist(), masks.tolist(), outputs.tolist())
    lazy = lds(ArrayScores(scores), masks.int(), outputs)
    for other in (tensors, lists, lazy):
        np.testing.assert_array_equal(other.per_target, expected.per_target)
        assert (other.mean, other.low, other.high) == (expected.mean, expected.low, expected.high)


def test_models_of_one_subset_are_averaged(case) -> None:
    scores, masks, outputs = case
    noise = np.random.default_rng(3).normal(size=outputs.shape)
    pair = np.stack([outputs + noise, outputs - noise], axis=1)
    result = lds(scores, masks, pair)
    np.testing.assert_allclose(result.per_target, lds(scores, masks, outputs).per_target, rtol=1e-9)
    assert result.num_models == 2


def test_constant_targets_are_left_out_and_counted(case) -> None:
    scores, masks, outputs = case
    flat_scores, flat_outputs = scores.copy(), outputs.copy()
    flat_scores[:, 1] = 0.1  # predicts 3 for every half, up to the rounding of its sum
    flat_outputs[:, 4] = -2.5
    result = lds(flat_scores, masks, flat_outputs)
    assert np.isnan(result.per_target).tolist() == [False, True, False, False, True, False, False]
    assert result.num_constant == 2
    assert result.num_targets == T
    assert result.mean == pytest.approx(np.delete(result.per_target, [1, 4]).mean())
    assert "2 constant targets left out" in str(result)


def test_no_target_that_varies_is_an_error(case) -> None:
    _, masks, outputs = case
    with pytest.raises(InputError, match="None of the 7 targets has a rank correlation"):
        lds(np.zeros((N, T)), masks, outputs)


def test_the_interval_depends_on_the_seed_alone(case) -> None:
    first, again, other = lds(*case, seed=5), lds(*case, seed=5), lds(*case, seed=6)
    assert (first.low, first.high) == (again.low, again.high)
    assert (first.low, first.high) != (other.low, other.high)
    wide = lds(*case, seed=5, confidence=0.99)
    assert wide.low < first.low < first.high < wide.high


def test_resampled_correlation_equals_repeated_rows() -> None:
    generator = np.random.default_rng(4)
    first, second = generator.normal(size=(2, 12, 3))
    counts = resample_counts(12, 20, make_generator(0))
    counts[0] = 0
    counts[0, 3] = 12  # one row only: nothing varies
    result = resampled_correlation(first, second, counts)
    assert np.isnan(result[0]).all()
    for row in range(1, 20):
        repeated = [np.repeat(values, counts[row], axis=0) for values in (first, second)]
        expected = [np.corrcoef(repeated[0][:, t], repeated[1][:, t])[0, 1] for t in range(3)]
        np.testing.assert_allclose(result[row], expected, rtol=1e-9)


@pytest.mark.slow
def test_the_interval_covers_the_population_value() -> None:
    """Intervals of 95% hold the long-run mean about as often as they say, or more."""
    generator = np.random.default_rng(0)

    def draw(num_targets: int = 25, num_subsets: int = 40) -> tuple[np.ndarray, torch.Tensor, np.ndarray]:
        scores = generator.normal(size=(200, num_targets))
        masks = random_subsets(200, num_subsets, seed=int(generator.integers(2**40)))
        signal = predictions(scores, masks)
        noise = generator.normal(size=signal.shape) + generator.normal(size=(num_subsets, 1))
        return scores, masks, signal / signal.std() + 2 * noise

    truth = np.mean([lds(*draw(), num_bootstrap=1).mean for _ in range(400)])
    results = [lds(*draw(), num_bootstrap=200) for _ in range(200)]
    assert np.mean([one.low <= truth <= one.high for one in results]) > 0.92


def test_shapes_that_disagree_name_the_axis(case) -> None:
    scores, masks, outputs = case
    with pytest.raises(InputError, match=r"scores has 59 along axis N \(training rows\), but masks has 60"):
        lds(scores[:-1], masks, outputs)
    with pytest.raises(InputError, match=r"scores has 6 along axis T \(targets\), but outputs has 7"):
        lds(scores[:, :-1], masks, outputs)
    with pytest.raises(InputError, match=r"outputs has 39 along axis S \(subsets\), but masks has 40"):
        lds(scores, masks, outputs[:-1])
    with pytest.raises(InputError, match=r"outputs must be \[S, T\], or \[S, R, T\]"):
        lds(scores, masks, outputs[0])
    with pytest.raises(InputError, match=r"scores must be \[N, T\]"):
        lds(scores[:, 0], masks, outputs)
    with pytest.raises(InputError, match="at least 3 subsets"):
        lds(scores, masks[:2], outputs[:2])


def test_rows_in_place_of_masks_are_refused(case) -> None:
    scores, _, outputs = case
    with pytest.raises(InputError, match="must hold booleans"):
        lds(scores, np.tile(np.arange(N), (S, 1)), outputs)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(case, bad: float) -> None:
    scores, masks, outputs = case
    spoilt_scores, spoilt_outputs = scores.copy(), outputs.copy()
    spoilt_scores[5, 2] = spoilt_outputs[3, 1] = bad
    with pytest.raises(NonFiniteError, match=r"scores .* the first at \[5, 2\]"):
        lds(spoilt_scores, masks, outputs)
    with pytest.raises(NonFiniteError, match=r"outputs .* the first at \[3, 1\]"):
        lds(scores, masks, spoilt_outputs)
