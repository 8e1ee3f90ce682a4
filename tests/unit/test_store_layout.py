"""File names and row ranges."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch

from trak.store import open_store
from trak.store.layout import Grid, clip, false_ranges, ranges_text, subtract
from trak.testing.store import make_header


def test_names_and_shards_agree():
    grid = Grid(num_rows=20, shard_rows=8)
    names = [grid.name(shard) for shard in range(grid.num_shards)]
    assert names[0] == "rows-000000000-000000008.safetensors"
    assert names[2] == "rows-000000016-000000020.safetensors"
    assert [grid.shard(name) for name in names] == [0, 1, 2]


@pytest.mark.parametrize(
    "name",
    [
        "rows-000000000-000000007.safetensors",
        "rows-000000001-000000009.safetensors",
        "rows-000000016-000000024.safetensors",
        "rows-000000024-000000032.safetensors",
        "rows-0-8.safetensors",
        "rows-000000000-000000008.safetensors.tmp",
        "manifest.json",
    ],
)
def test_other_names_are_no_shards(name):
    assert Grid(num_rows=20, shard_rows=8).shard(name) is None


def test_more_rows_than_nine_digits():
    grid = Grid(num_rows=3 * 10**9, shard_rows=1024)
    assert grid.shard(grid.name(grid.num_shards - 1)) == grid.num_shards - 1


@pytest.mark.parametrize("seed", range(30))
def test_ranges_match_a_mask(seed):
    """Against a mask of rows, the readable reference."""
    random = np.random.default_rng(seed)
    grid = Grid(num_rows=int(random.integers(1, 60)), shard_rows=int(random.integers(1, 12)))
    present = random.random(grid.num_shards) < 0.5
    rows = np.flatnonzero(random.random(grid.num_rows) < random.random())
    stored = np.repeat(present, grid.shard_rows)[: grid.num_rows]
    stored[rows] = True
    ranges = subtract(false_ranges(present, grid), rows)
    assert np.array_equal(
        np.concatenate([[], *(np.arange(a, b) for a, b in ranges)]), np.flatnonzero(~stored)
    )
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))


def test_clip():
    assert clip([(0, 4), (6, 9), (12, 20)], 2, 12) == [(2, 4), (6, 9)]


@pytest.mark.parametrize(
    ("ranges", "text"),
    [
        ([(3, 4)], "row 3"),
        ([(1024, 2048), (4096, 5000)], "rows 1024 to 2047 and 4096 to 4999"),
        ([(0, 1), (4, 5), (7, 9)], "rows 0, 4 and 7 to 8"),
        ([(2 * i, 2 * i + 1) for i in range(8)], "rows 0, 2, 4, 6, 8 and 3 more ranges (8 rows in all)"),
    ],
)
def test_text(ranges, text):
    assert ranges_text(ranges) == text


def test_missing_of_ten_million_rows_is_one_listing(tmp_path):
    """Names are enough: the files here are empty, so opening one would fail."""
    store = open_store(tmp_path, make_header(num_rows=10_000_000), shard_rows=1024)
    store.add_checkpoint(0, "hash")
    rows = store.rows(0)
    grid = Grid(10_000_000, 1024)
    folder = tmp_path / "checkpoints" / "0" / "train"
    folder.mkdir()
    absent = {5, 6, 4000, grid.num_shards - 1}
    for shard in set(range(grid.num_shards)) - absent:
        (folder / grid.name(shard)).touch()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        missing = rows.missing()
        seconds.append(time.perf_counter() - start)
    assert missing == [(5120, 7168), (4_096_000, 4_097_024), grid.bounds(grid.num_shards - 1)]
    assert rows.has(torch.tensor([5119, 5120, 9_999_999])).tolist() == [True, False, False]
    assert min(seconds) < 1.0
