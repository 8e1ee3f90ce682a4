"""The store's contract, on disk and in memory."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from trak.store import Header, Store, open_store
from trak.testing.store import MakeStore, StoreContract, make_header, make_values, snapshot, write


class TestDiskStore(StoreContract):
    @pytest.fixture
    def make_store(self, tmp_path: Path) -> MakeStore:
        numbers = itertools.count()

        def make(header: Header, shard_rows: int) -> Store:
            return open_store(tmp_path / f"store{next(numbers)}", header, shard_rows=shard_rows)

        return make


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def make_store(self) -> MakeStore:
        return lambda header, shard_rows: open_store(None, header, shard_rows=shard_rows)


@pytest.mark.parametrize("feature_dtype", ["float64", "float32", "bfloat16", "float16"])
def test_disk_and_memory_agree_bitwise(tmp_path, feature_dtype):
    seen = []
    for path in (tmp_path / "store", None):
        store = open_store(path, make_header(feature_dtype=feature_dtype), shard_rows=8)
        store.add_checkpoint(0, "hash")
        write(
            store.rows(0),
            torch.randperm(53, generator=torch.Generator().manual_seed(0)).split(5),
            make_values(),
        )
        seen.append([*snapshot(store.rows(0)), store.rows(0).digest()])
    assert all(torch.equal(a, b) for a, b in zip(seen[0][:-1], seen[1][:-1]))
    assert seen[0][-1] == seen[1][-1]
