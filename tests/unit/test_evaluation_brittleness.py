"""The smallest removal that flips a prediction, on models whose answer is known."""

import numpy as np
import pytest
import torch

from trak import ArrayScores, InputError
from trak.evaluation import brittleness

N = 100


class Votes:
    """Rows vote: f_t = (rows of the target's set that are kept) − margin_t, plus what the seed adds."""

    def __init__(self, margins: list[float], by_seed: dict[int, float] | None = None) -> None:
        self.margins = np.array(margins)
        self.by_seed = by_seed or {}
        self.calls: list[tuple[int, int]] = []

    def __call__(self, indices: torch.Tensor, seed: int) -> np.ndarray:
        self.calls.append((len(indices), seed))
        voters = (indices.numpy() < 50).sum()
        return voters - self.margins + self.by_seed.get(seed, 0.0)


def voters_first(num_targets: int) -> np.ndarray:
    return np.tile(-np.arange(N, dtype=float)[:, None], (1, num_targets))


def test_it_is_the_smallest_of_all_sizes() -> None:
    # 50 voters: f = 50 − k − margin is below 0 from k = 51 − margin on, for whole margins.
    margins = [50.0, 49.0, 47.0, 44.5, 38.0, 31.0, 30.0, 29.0, 0.0, 51.0]
    train = Votes(margins)
    result = brittleness(train, voters_first(10), num_seeds=1)
    outputs = [[50 - k - margin for k in range(21)] for margin in margins]
    expected = [next((k for k, f in enumerate(column) if f < 0), None) for column in outputs]
    assert list(result.num_removed) == expected == [1, 2, 4, 6, 13, 20, None, None, None, 0]
    assert result.max_removed == 20
    for flip, margin in zip(result.flips, margins):
        assert all(f == 50 - k - margin for k, f in flip.tried.items())
        if flip.num_removed:
            assert flip.verified
            assert flip.output == flip.verified_output == 50 - flip.num_removed - margin < 0
            assert flip.tried[flip.num_removed - 1] >= 0
        else:
            assert flip.verified is None
            assert flip.verified_output is None
    assert result.num_trainings == len(train.calls)
    # Doubling and bisection: at most about 2·log₂ 20 trials for each target, and verification.
    assert max(len(flip.tried) for flip in result.flips) <= 11
    assert "6 of 10 predictions flipped by removing at most 20 of 100 rows, median 5 rows" in str(result)


def test_candidates_alone_are_tried_and_the_smallest_that_flips_is_found() -> None:
    margins = [50.0, 45.5, 41.0, 40.0, 39.5, 20.5, 9.0, 51.0]
    candidates = (5, 10, 11, 30, 40)
    train = Votes(margins)
    result = brittleness(train, voters_first(8), k=reversed(candidates), num_seeds=1)
    expected = [next((k for k in candidates if 50 - k - margin < 0), None) for margin in margins]
    assert list(result.num_removed) == [*expected[:-1], 0] == [5, 5, 10, 11, 11, 30, None, 0]
    assert result.max_removed == 40
    for flip in result.flips:
        assert set(flip.tried) <= {0, *candidates}
        assert len(flip.tried) <= 1 + 3  # five candidates and "none" are six answers: three questions
    # A prediction that stands was tried at the largest candidate.
    assert result.flips[6].output == result.flips[6].tried[40] == 50 - 40 - 9
    assert brittleness(Votes([45.0]), voters_first(1), k=7, num_seeds=1).num_removed == (7,)


def test_share_flipped_counts_the_predictions_that_stood() -> None:
    result = brittleness(Votes([50.0, 47.0, 0.0, 51.0]), voters_first(4), num_seeds=1)
    assert [result.share_flipped(k) for k in (0, 1, 3, 4, 100)] == [0, 1 / 3, 1 / 3, 2 / 3, 2 / 3]
    assert np.isnan(brittleness(Votes([51.0]), voters_first(1)).share_flipped(5))


def test_scores_that_rank_other_rows_first_do_not_flip() -> None:
    result = brittleness(Votes([47.0]), -voters_first(1), num_seeds=1, max_fraction=0.4)
    assert result.num_removed == (None,)
    assert max(result.flips[0].tried) == 40
    assert brittleness(Votes([47.0]), -voters_first(1), num_seeds=1, max_fraction=0.6).num_removed == (54,)


def test_a_lucky_search_is_not_verified() -> None:
    # Seeds 0 and 1 (the search) give 5 less than seeds 2 and 3 (verification).
    train = Votes([45.0], by_seed={0: -5.0, 1: -5.0})
    flip = brittleness(train, voters_first(1), num_seeds=2).flips[0]
    assert flip.num_removed == 1
    assert flip.output == -1
    assert flip.verified is False
    assert flip.verified_output == 4
    assert {seed for _, seed in train.calls} == {0, 1, 2, 3}


def test_the_mean_over_seeds_decides_and_the_threshold_moves() -> None:
    train = Votes([45.0], by_seed={7: -9.0, 8: 3.0})
    result = brittleness(train, ArrayScores(voters_first(1)), num_seeds=2, seed=7)
    assert result.num_removed == (3,)  # 5 − 3 − k < 0
    assert brittleness(Votes([45.0]), voters_first(1), threshold=4.0, num_seeds=1).num_removed == (2,)


def test_some_targets_keep_their_numbers() -> None:
    result = brittleness(Votes([50.0, 47.0, 49.0]), voters_first(3), targets=[2, 1], num_seeds=1)
    assert [(flip.target, flip.num_removed) for flip in result.flips] == [(2, 2), (1, 4)]


def test_what_is_refused() -> None:
    train, scores = Votes([45.0]), voters_first(1)
    for fraction in (0, 1, -0.5, 2):
        with pytest.raises(InputError, match="max_fraction must be between 0 and 1"):
            brittleness(train, scores, max_fraction=fraction)
    with pytest.raises(InputError, match="of 100 rows is none at all"):
        brittleness(train, scores, max_fraction=0.001)
    with pytest.raises(InputError, match="pass one of them"):
        brittleness(train, scores, k=(1, 2), max_fraction=0.3)
    with pytest.raises(InputError, match="nothing would be left of the 100"):
        brittleness(train, scores, k=(1, 100))
    with pytest.raises(InputError, match="k is empty"):
        brittleness(train, scores, k=())
    with pytest.raises(InputError, match="threshold must be a finite number"):
        brittleness(train, scores, threshold=float("nan"))
    with pytest.raises(InputError, match="train must be a function"):
        brittleness("train.py", scores)
    assert not train.calls
    with pytest.raises(InputError, match="one output for each of the 1 targets"):
        brittleness(lambda indices, seed: np.zeros(2), scores)
