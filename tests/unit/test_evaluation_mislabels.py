"""Finding corrupted labels: the curve, its area, ties."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from trak import InputError, NonFiniteError
from trak.evaluation import mislabel_curve


def test_a_small_case_by_hand() -> None:
    result = mislabel_curve([5.0, 1.0, 4.0, 3.0, 2.0], [True, False, False, True, False])
    # Inspected in the order of rows 0, 2, 3, 4, 1: found 1, 1, 2, 2, 2 of 2.
    np.testing.assert_allclose(result.fraction_found, [0.5, 0.5, 1, 1, 1])
    np.testing.assert_allclose(result.fraction_inspected, [0.2, 0.4, 0.6, 0.8, 1.0])
    # Pairs (corrupted, clean) in the right order: 3 for row 0, 2 for row 3, of 6.
    assert result.auc == pytest.approx(5 / 6)
    assert (result.num_rows, result.num_corrupted) == (5, 2)
    assert result.found_at(0.2) == 0.5
    assert result.found_at(0.6) == 1.0


def test_ties_are_inspected_in_random_order_on_average() -> None:
    suspicion = np.array([2, 2, 2, 1, 1, 0])
    corrupted = np.array([True, False, False, True, False, False])
    result = mislabel_curve(suspicion, corrupted)
    np.testing.assert_allclose(result.fraction_found, np.array([1 / 3, 2 / 3, 1, 1.5, 2, 2]) / 2)

    generator, total = np.random.default_rng(0), np.zeros(6)
    for _ in range(4000):
        order = np.lexsort((generator.random(6), -suspicion))
        total += np.cumsum(corrupted[order]) / 2
    # A mean of 4000 values in [0, 1]: deviation below 0.008.
    np.testing.assert_allclose(result.fraction_found, total / 4000, atol=0.04)


def test_constant_suspicion_is_chance() -> None:
    result = mislabel_curve(torch.zeros(10), torch.arange(10) < 3)
    np.testing.assert_allclose(result.fraction_found, result.fraction_inspected)
    assert (result.auc, result.low, result.high) == (0.5, 0.5, 0.5)


def test_the_interval_equals_that_of_sklearn_on_the_same_resamples() -> None:
    generator = np.random.default_rng(1)
    corrupted = generator.random(300) < 0.2
    suspicion = np.round(generator.normal(size=300) + corrupted, 1)
    result = mislabel_curve(suspicion, corrupted, num_bootstrap=2000)
    bad, good = suspicion[corrupted], suspicion[~corrupted]
    areas = [
        roc_auc_score(
            np.repeat([1, 0], [len(bad), len(good)]),
            np.concatenate([generator.choice(bad, len(bad)), generator.choice(good, len(good))]),
        )
        for _ in range(500)
    ]
    low, high = np.quantile(areas, [0.025, 0.975])
    assert result.low < result.auc < result.high
    assert result.low == pytest.approx(low, abs=0.01)
    assert result.high == pytest.approx(high, abs=0.01)
    assert "AUC" in str(result)


def test_the_seed_decides_the_interval() -> None:
    generator = np.random.default_rng(2)
    case = generator.normal(size=50), np.arange(50) < 10
    first, again, other = (mislabel_curve(*case, seed=seed) for seed in (1, 1, 2))
    assert (first.low, first.high) == (again.low, again.high)
    assert (first.low, first.high) != (other.low, other.high)


@pytest.mark.parametrize(
    ("suspicion", "corrupted", "message"),
    [
        ([1.0, 2.0], [True], r"corrupted has 1 along axis N \(rows\), but suspicion has 2"),
        ([1.0, 2.0], [True, True], "2 of 2 rows are corrupted"),
        ([1.0, 2.0], [False, False], "0 of 2 rows are corrupted"),
        ([[1.0, 2.0]], [True, False], r"suspicion must be \[N\]"),
        ([1.0, 2.0], [[True, False]], r"corrupted must be \[N\]"),
        ([1.0, 2.0], [3, 17], "Row numbers are turned into flags"),
    ],
)
def test_bad_arguments_are_refused(suspicion: list, corrupted: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        mislabel_curve(suspicion, corrupted)


def test_a_nan_is_refused() -> None:
    with pytest.raises(NonFiniteError, match="suspicion"):
        mislabel_curve([1.0, float("nan")], [True, False])


@pytest.mark.parametrize("fraction", [0.0, 1.1])
def test_found_at_takes_a_share(fraction: float) -> None:
    with pytest.raises(InputError, match="fraction"):
        mislabel_curve([1.0, 2.0], [True, False]).found_at(fraction)
