"""Random subsets: sizes, reproducibility, independence."""

import pytest
import torch

from trak import InputError
from trak.evaluation import half_splits, random_subsets


@pytest.mark.parametrize(
    ("num_rows", "fraction", "size"),
    [(10, 0.5, 5), (11, 0.5, 5), (100, 0.29, 29), (7, 0.99, 6), (3, 0.34, 1)],
)
def test_every_subset_holds_the_floor_of_the_fraction(num_rows: int, fraction: float, size: int) -> None:
    masks = random_subsets(num_rows, 20, fraction, seed=3)
    assert masks.shape == (20, num_rows)
    assert masks.dtype == torch.bool
    assert masks.sum(dim=1).tolist() == [size] * 20


def test_the_seed_decides_and_more_subsets_keep_the_first() -> None:
    few, many = random_subsets(50, 4, seed=7), random_subsets(50, 9, seed=7)
    assert torch.equal(few, many[:4])
    assert not torch.equal(few, random_subsets(50, 4, seed=8))
    assert len({tuple(mask.tolist()) for mask in many}) == 9


def test_rows_are_drawn_evenly() -> None:
    counts = random_subsets(40, 2000, 0.25, seed=0).sum(dim=0).double()
    # Each count is binomial(2000, 1/4): mean 500, deviation 19.4; five deviations over 40 rows.
    assert (counts - 500).abs().max() < 5 * 19.4


def test_drawing_leaves_the_global_generators_alone() -> None:
    before = torch.random.get_rng_state()
    random_subsets(10, 2)
    half_splits(10, 2)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("num_rows", [10, 11])
def test_half_splits_come_in_complementary_pairs(num_rows: int) -> None:
    masks = half_splits(num_rows, 6, seed=1)
    assert masks.shape == (12, num_rows)
    assert torch.equal(masks[0::2], ~masks[1::2])
    assert masks[0::2].sum(dim=1).tolist() == [num_rows // 2] * 6
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3, 0.5), "num_rows must be an integer of at least 1, got 0"),
        ((10, 0, 0.5), "num_subsets must be an integer"),
        ((10, 3, 1.0), "fraction must be between 0 and 1"),
        ((10, 3, 0.0), "fraction must be between 0 and 1"),
        ((10, 3, 0.05), "none at all"),
    ],
)
def test_impossible_sizes_are_refused(arguments: tuple[int, int, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        random_subsets(*arguments)
