"""Retrieval of relevant rows: against full sorting and scikit-learn, lazily, with ties."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from torch import Tensor

from trak import ArrayScores, InputError, NonFiniteError
from trak.evaluation import retrieval
from trak.evaluation._reading import CheckedScores
from trak.evaluation.retrieval import relevant_ranks
from trak.scores import Scores


@dataclass(frozen=True, eq=False, repr=False)
class BlockScores(Scores):
    """Lazy scores that remember how many rows were read at once, and are never whole."""

    values: np.ndarray
    sizes: list[int] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape

    def read(self, start: int, stop: int) -> Tensor:
        self.sizes.append(stop - start)
        return torch.from_numpy(self.values[start:stop].copy())

    def select_targets(self, targets: Tensor) -> Scores:
        raise AssertionError("not needed")

    def tensor(self) -> Tensor:
        raise AssertionError("the whole matrix must not be asked for")


@dataclass(frozen=True, eq=False, repr=False)
class InBlocks(CheckedScores):
    """Checked scores that come in blocks of the given size."""

    rows: int = 1

    def blocks(self, block_rows: int | None = None) -> Iterator[tuple[int, Tensor]]:
        return super().blocks(self.rows)


def by_sorting(scores: np.ndarray, relevant: list[set[int]], k: int) -> dict[str, float]:
    """All measures from a full sort of each column, equal scores by row."""
    out: dict[str, list[float]] = {name: [] for name in ("mrr", "map", "any", "all", "precision")}
    for target, rows in enumerate(relevant):
        order = np.lexsort((np.arange(len(scores)), -scores[:, target]))
        hits = np.isin(order, list(rows))
        out["mrr"].append(1 / (1 + int(np.argmax(hits))))
        out["map"].append(float(np.mean([hits[: i + 1].mean() for i in np.flatnonzero(hits)])))
        out["any"].append(float(hits[:k].any()))
        out["all"].append(hits[:k].sum() / len(rows))
        out["precision"].append(hits[:k].mean())
    return {name: float(np.mean(values)) for name, values in out.items()}


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 12))
def test_it_equals_a_full_sort_whatever_the_ties_and_blocks(seed: int, block_rows: int, k: int) -> None:
    generator = np.random.default_rng(seed)
    scores = generator.integers(-2, 3, size=(12, 4)).astype(np.float64)
    relevant = [set(generator.choice(12, size=generator.integers(1, 6), replace=False)) for _ in range(4)]

    result = retrieval(scores, relevant, k=k, num_bootstrap=5)
    expected = by_sorting(scores, relevant, k)
    assert result.mrr.mean == pytest.approx(expected["mrr"])
    assert result.average_precision.mean == pytest.approx(expected["map"])
    assert result.recall_any[k].mean == pytest.approx(expected["any"])
    assert result.recall_all[k].mean == pytest.approx(expected["all"])
    assert result.precision[k].mean == pytest.approx(expected["precision"])

    ranks = relevant_ranks(
        InBlocks(ArrayScores(scores), rows=block_rows), [np.array(sorted(rows)) for rows in relevant]
    )
    for one, other in zip(ranks, result.ranks):
        np.testing.assert_array_equal(one, other)


def test_average_precision_is_scikit_learns() -> None:
    generator = np.random.default_rng(0)
    scores, relevant = generator.normal(size=(80, 5)), generator.random((80, 5)) < 0.2
    result = retrieval(scores, relevant)
    expected = [average_precision_score(relevant[:, t], scores[:, t]) for t in range(5)]
    np.testing.assert_allclose(result.average_precisions, expected, rtol=1e-12)
    np.testing.assert_allclose(result.reciprocal_ranks, [1 / ranks[0] for ranks in result.ranks])
    assert result.mrr.low <= result.mrr.mean <= result.mrr.high
    assert "MRR" in str(result)


def test_a_case_by_hand() -> None:
    scores = np.array([[5.0, 1.0], [4.0, 1.0], [3.0, 1.0], [2.0, 1.0]])
    result = retrieval(scores, [[1, 3], [2]], k=[1, 2, 3])
    assert [ranks.tolist() for ranks in result.ranks] == [[2, 4], [3]]
    assert result.mrr.mean == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert result.average_precision.mean == pytest.approx(((1 / 2 + 2 / 4) / 2 + 1 / 3) / 2)
    assert [result.recall_any[k].mean for k in (1, 2, 3)] == [0.0, 0.5, 1.0]
    assert [result.recall_all[k].mean for k in (1, 2, 3)] == [0.0, 0.25, 0.75]
    assert [result.precision[k].mean for k in (1, 2, 3)] == pytest.approx([0.0, 0.25, 1 / 3])


def test_lazy_scores_are_read_in_blocks_and_agree() -> None:
    generator = np.random.default_rng(1)
    scores = generator.normal(size=(9000, 3)).astype(np.float32)
    relevant = [generator.choice(9000, size=7, replace=False) for _ in range(3)]
    lazy = BlockScores(scores)
    result, expected = retrieval(lazy, relevant), retrieval(scores, relevant)
    assert result.mrr == expected.mrr
    assert max(lazy.sizes) < 9000
    assert sum(lazy.sizes) == 2 * 9000


def test_every_way_to_say_what_is_relevant_gives_the_same() -> None:
    scores = np.random.default_rng(2).normal(size=(10, 3))
    mask = np.zeros((10, 3), dtype=bool)
    mask[[1, 4], 0] = mask[[0, 9], 1] = mask[[5, 6], 2] = True
    expected = retrieval(scores, mask).mrr
    rows = [[4, 1], [9, 0], [5, 6, 5]]
    for same in (
        torch.from_numpy(mask),
        rows,
        [set(one) for one in rows],
        np.array([[1, 4], [0, 9], [5, 6]]),
    ):
        assert retrieval(torch.from_numpy(scores), same).mrr == expected


def test_targets_without_relevant_rows_are_refused_or_counted() -> None:
    scores = np.random.default_rng(3).normal(size=(10, 3))
    with pytest.raises(InputError, match=r"1 of 3 targets have no relevant rows, the first is target 1"):
        retrieval(scores, [[1], [], [2]])
    result = retrieval(scores, [[1], [], [2]], allow_empty=True)
    assert result.num_empty == 1
    assert result.mrr == retrieval(scores[:, [0, 2]], [[1], [2]]).mrr
    assert np.isnan(result.reciprocal_ranks).tolist() == [False, True, False]
    assert np.isnan(result.average_precisions).tolist() == [False, True, False]
    with pytest.raises(InputError, match="None of the 3 targets has relevant rows"):
        retrieval(scores, [[], [], []], allow_empty=True)


def test_what_is_refused() -> None:
    scores = np.random.default_rng(4).normal(size=(10, 2))
    for relevant, message in (
        ([[1]], r"relevant has 1 along axis T \(targets\), but scores has 2"),
        ([[1], [10]], r"target 1 must lie in \[0, 10\)"),
        ([[1], [-1]], "target 1 must lie in"),
        ([[1.5], [1]], "must be row numbers, got dtype float64"),
        (np.zeros((9, 2), dtype=bool), r"relevant has 9 along axis N \(rows\)"),
    ):
        with pytest.raises(InputError, match=message):
            retrieval(scores, relevant)
    with pytest.raises(InputError, match="k is 11, but there are only 10 training rows"):
        retrieval(scores, [[1], [1]], k=11)
    with pytest.raises(InputError, match="k is empty"):
        retrieval(scores, [[1], [1]], k=[])
    with pytest.raises(InputError, match=r"scores must be numbers \[N, T\]"):
        retrieval(scores[:, 0], [[1], [1]])
    scores[7, 1] = np.nan
    with pytest.raises(NonFiniteError, match=r"scores \(rows 0 to 10\) holds 1 values"):
        retrieval(scores, [[1], [1]])
