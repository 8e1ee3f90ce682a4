"""What holds for the measures whatever the data."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from sklearn.metrics import roc_auc_score

from trak.evaluation import lds, mislabel_curve, predictions, random_subsets, spearman

modest = settings(deadline=None, max_examples=30)
seeds = st.integers(0, 2**32 - 1)
small_integers = hnp.arrays(
    np.int64, st.tuples(st.integers(2, 20), st.integers(1, 4)), elements=st.integers(-4, 4)
)


def make_case(
    seed: int, *, noise: float = 1.0, num_rows: int = 30, num_targets: int = 3, num_subsets: int = 25
):
    """(scores, masks, outputs) with `noise` times the signal's deviation added to the outputs."""
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(num_rows, num_targets))
    masks = random_subsets(num_rows, num_subsets, seed=seed).numpy()
    signal = predictions(scores, masks)
    return scores, masks, signal + noise * signal.std() * generator.normal(size=signal.shape)


@modest
@given(seeds)
def test_monotone_changes_of_the_outputs_change_nothing(seed: int) -> None:
    scores, masks, outputs = make_case(seed)
    expected = lds(scores, masks, outputs, num_bootstrap=20)
    bent = lds(scores, masks, np.arctan(outputs) * 3 + 1, num_bootstrap=20)
    assert (bent.mean, bent.low, bent.high) == (expected.mean, expected.low, expected.high)


@modest
@given(seeds, st.floats(0.01, 100))
def test_positive_factors_of_the_scores_change_nothing_and_negative_ones_the_sign(
    seed: int, factor: float
) -> None:
    scores, masks, outputs = make_case(seed)
    expected = lds(scores, masks, outputs, num_bootstrap=1).per_target
    np.testing.assert_allclose(lds(factor * scores, masks, outputs, num_bootstrap=1).per_target, expected)
    np.testing.assert_allclose(lds(-factor * scores, masks, outputs, num_bootstrap=1).per_target, -expected)


@modest
@given(seeds)
def test_the_order_of_rows_subsets_and_targets_does_not_matter(seed: int) -> None:
    scores, masks, outputs = make_case(seed)
    generator = np.random.default_rng(seed + 1)
    rows, subsets, targets = (generator.permutation(size) for size in (30, 25, 3))
    expected = lds(scores, masks, outputs, num_bootstrap=1).per_target
    shuffled = lds(
        scores[rows][:, targets],
        masks[subsets][:, rows],
        outputs[subsets][:, targets],
        num_bootstrap=1,
    )
    np.testing.assert_allclose(shuffled.per_target, expected[targets], atol=1e-12)


@modest
@given(seeds)
def test_perfect_predictions_give_one(seed: int) -> None:
    scores, masks, outputs = make_case(seed, noise=0.0)
    result = lds(scores, masks, np.exp(outputs / 10), num_bootstrap=50)
    assert result.mean == pytest.approx(1)
    assert result.low == pytest.approx(1)
    assert result.high == pytest.approx(1)


@modest
@given(seeds)
def test_unrelated_scores_give_about_zero(seed: int) -> None:
    _, masks, outputs = make_case(seed, num_targets=40, num_subsets=50)
    unrelated = np.random.default_rng([seed, 1]).normal(size=(30, 40))
    # ρ of 50 independent pairs has deviation 1/7; the mean over 40 independent targets 0.0226. Six of these.
    assert abs(lds(unrelated, masks, outputs, num_bootstrap=1).mean) < 6 * 0.0226


@modest
@given(small_integers, seeds)
def test_spearman_equals_scipys_or_is_nan_where_a_column_is_constant(first: np.ndarray, seed: int) -> None:
    second = np.random.default_rng(seed).permuted(first, axis=0)
    for column, value in enumerate(spearman(first, second)):
        if np.ptp(first[:, column]) == 0:
            assert np.isnan(value)
        else:
            expected = stats.spearmanr(first[:, column], second[:, column]).statistic
            assert value == pytest.approx(expected, abs=1e-12)


@modest
@given(
    hnp.arrays(np.float64, st.integers(2, 60), elements=st.integers(-5, 5).map(float)),
    st.data(),
)
def test_auc_equals_sklearns_and_the_area_under_the_curve(suspicion: np.ndarray, data: st.DataObject) -> None:
    size = len(suspicion)
    rows = data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=size - 1))
    corrupted = np.isin(np.arange(size), list(rows))
    result = mislabel_curve(suspicion, corrupted, num_bootstrap=5)
    assert result.auc == pytest.approx(roc_auc_score(corrupted, suspicion))
    assert result.fraction_found[-1] == pytest.approx(1)
    assert (np.diff(result.fraction_found) >= -1e-12).all()
    # Mean of the found share at the clean rows' turns = AUC, by trapezoids over the inspected share.
    found = np.concatenate([[0], result.fraction_found])
    area = ((found[1:] + found[:-1]) / 2).mean()
    positive = len(rows) / size
    assert result.auc == pytest.approx((area - positive / 2) / (1 - positive))


@modest
@given(seeds)
def test_monotone_changes_of_suspicion_change_nothing(seed: int) -> None:
    generator = np.random.default_rng(seed)
    suspicion, corrupted = generator.normal(size=40), np.arange(40) < 8
    first = mislabel_curve(suspicion, corrupted, num_bootstrap=20)
    bent = mislabel_curve(suspicion**3 * 5, corrupted, num_bootstrap=20)
    assert (first.auc, first.low, first.high) == (bent.auc, bent.low, bent.high)
    np.testing.assert_array_equal(first.fraction_found, bent.fraction_found)
    turned = mislabel_curve(-suspicion, corrupted, num_bootstrap=20)
    assert turned.auc == pytest.approx(1 - first.auc)
