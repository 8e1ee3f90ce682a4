"""Checks that need no retraining: class agreement, overlap, score correlation."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from trak import ArrayScores, InputError, NonFiniteError
from trak.evaluation import class_agreement, overlap, sanity, score_correlation


def make_scores(num_rows: int = 30, num_targets: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num_rows, num_targets))


def test_class_agreement_by_counting() -> None:
    scores, generator = make_scores(), np.random.default_rng(1)
    train, targets = generator.integers(0, 3, 30), generator.integers(0, 3, 6)
    result = class_agreement(ArrayScores(scores), torch.from_numpy(train), targets, k=5)
    for t in range(6):
        best = sorted(range(30), key=lambda row: -scores[row, t])[:5]
        assert result.per_target[t] == sum(train[row] == targets[t] for row in best) / 5
        assert result.chance_per_target[t] == sum(train == targets[t]) / 30
    assert result.agreement.mean == pytest.approx(result.per_target.mean())
    assert result.chance == pytest.approx(result.chance_per_target.mean())


def test_random_scores_have_chance_agreement_and_scores_by_class_all() -> None:
    generator = np.random.default_rng(2)
    train, targets = generator.choice(3, 300, p=[0.6, 0.3, 0.1]), generator.integers(0, 3, 400)
    chance = class_agreement(generator.normal(size=(300, 400)), train, targets)
    assert chance.agreement.low < chance.chance < chance.agreement.high
    by_class = (train[:, None] == targets).astype(float)
    assert class_agreement(by_class, train, targets, k=20).agreement.mean == 1.0
    assert class_agreement(-by_class, train, targets, k=20).agreement.mean == 0.0


def test_classes_that_no_row_has_are_counted_and_refused_if_they_are_all() -> None:
    result = class_agreement(make_scores(), np.zeros(30), [0, 0, 0, 0, 1, 2], k=5)
    assert result.num_unseen == 2
    assert result.per_target.tolist() == [1, 1, 1, 1, 0, 0]
    with pytest.raises(InputError, match="No training row has the class of any of the 6 targets"):
        class_agreement(make_scores(), np.zeros(30), np.ones(6), k=5)
    words = class_agreement(make_scores(), ["cat"] * 30, ["cat"] * 6, k=5)
    assert words.agreement.mean == 1.0
    with pytest.raises(InputError, match="train_labels has 29 along axis 0"):
        class_agreement(make_scores(), np.zeros(29), np.zeros(6))
    with pytest.raises(InputError, match="target_labels must have one dimension"):
        class_agreement(make_scores(), np.zeros(30), np.zeros((6, 1)))


def test_overlap_by_sets() -> None:
    a, k = make_scores(), 7
    b = a + np.random.default_rng(3).normal(size=a.shape)
    result = overlap(a, ArrayScores(b), k)
    for t in range(6):
        best_a, best_b = np.argsort(-a[:, t])[:k].tolist(), np.argsort(-b[:, t])[:k].tolist()
        both, either = set(best_a) & set(best_b), set(best_a) | set(best_b)
        assert result.jaccard_per_target[t] == pytest.approx(len(both) / len(either))
        depths = [len(set(best_a[:d]) & set(best_b[:d])) / d for d in range(1, k + 1)]
        assert result.average_overlap_per_target[t] == pytest.approx(np.mean(depths))
    assert result.jaccard.mean == pytest.approx(result.jaccard_per_target.mean())
    assert result.average_overlap.low < result.average_overlap.mean < result.average_overlap.high


def test_overlap_of_the_same_and_of_opposite_scores() -> None:
    a = make_scores()
    assert (overlap(a, a, 5).jaccard.mean, overlap(a, a, 5).average_overlap.mean) == (1, 1)
    assert (overlap(a, -a, 5).jaccard.mean, overlap(a, -a, 5).average_overlap.mean) == (0, 0)
    # All rows: the same set in another order.
    assert overlap(a, -a, 30).jaccard.mean == 1
    assert overlap(a, -a, 30).average_overlap.mean < 1


@pytest.mark.parametrize(("num_rows", "k"), [(30, 4), (10, 7), (8, 8), (1, 1)])
def test_chance_of_overlap_is_the_hypergeometric_expectation(num_rows: int, k: int) -> None:
    shared = np.arange(k + 1)
    weights = stats.hypergeom(num_rows, k, k).pmf(shared)
    result = overlap(make_scores(num_rows), make_scores(num_rows, seed=1), k)
    assert result.chance_jaccard == pytest.approx((weights * shared / (2 * k - shared)).sum(), rel=1e-9)
    assert result.chance_average_overlap == pytest.approx(np.mean([d / num_rows for d in range(1, k + 1)]))


def test_random_rankings_overlap_by_chance() -> None:
    result = overlap(make_scores(40, 3000), make_scores(40, 3000, seed=1), 6)
    assert result.jaccard.low < result.chance_jaccard < result.jaccard.high
    assert result.average_overlap.low < result.chance_average_overlap < result.average_overlap.high
    assert math.isclose(result.chance_average_overlap, 7 / 80)


@pytest.mark.parametrize("column_scores", [1, 70, 1 << 22])
def test_score_correlation_is_scipys_however_many_columns_are_read_at_once(
    monkeypatch, column_scores
) -> None:
    monkeypatch.setattr(sanity, "COLUMN_SCORES", column_scores)
    a = np.round(make_scores(), 1)
    b = np.round(a + make_scores(seed=4), 1)
    result = score_correlation(ArrayScores(a), b)
    expected = [stats.spearmanr(a[:, t], b[:, t]).statistic for t in range(6)]
    np.testing.assert_allclose(result.per_target, expected, rtol=1e-10)
    assert result.correlation.mean == pytest.approx(np.mean(expected))
    assert result.correlation.low < result.correlation.mean < result.correlation.high


def test_score_correlation_leaves_constant_targets_out() -> None:
    a, b = make_scores(), make_scores(seed=5)
    a[:, 2] = 0.0
    result = score_correlation(a, b)
    assert result.num_constant == 1
    assert np.isnan(result.per_target[2])
    assert result.correlation.mean == pytest.approx(np.delete(result.per_target, 2).mean())
    assert "1 constant targets left out" in str(result)
    with pytest.raises(InputError, match="None of the 6 targets has a rank correlation"):
        score_correlation(np.zeros((30, 6)), b)


def test_what_is_refused() -> None:
    a = make_scores()
    for measure in (overlap, score_correlation):
        with pytest.raises(InputError, match=r"scores_a is \[30, 6\] and scores_b \[29, 6\]"):
            measure(a, a[:-1])
        spoilt = a.copy()
        spoilt[2, 3] = np.inf
        with pytest.raises(NonFiniteError, match="scores_b"):
            measure(a, spoilt)
        with pytest.raises(InputError, match="scores_a is empty"):
            measure(a[:0], a[:0])
        with pytest.raises(InputError, match=r"scores_b must be numbers \[N, T\]"):
            measure(a, np.full((30, 6), "x"))
    with pytest.raises(InputError, match="k is 31, but there are only 30"):
        overlap(a, a, 31)
    with pytest.raises(InputError, match="k must be an integer of at least 1, got 0"):
        class_agreement(a, np.zeros(30), np.zeros(6), k=0)
