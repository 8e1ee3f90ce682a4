"""Reading whole shards in a row: what comes next is announced, and checksums are for what comes from outside."""

import pytest
import torch

from trak.errors import CorruptShardError
from trak.store import Header, open_store, verify
from trak.store.disk import DiskFolder
from trak.store.files import CheckedFile


def stored(folder, num_rows=40):
    header = Header(
        num_rows=num_rows,
        dim=3,
        columns=[("all", 0, 3)],
        parameters={"w": (3,)},
        projection={"kind": "none"},
        task={"task": "none"},
    )
    store = open_store(folder, header, shard_rows=8)
    store.add_checkpoint(0, "0" * 64)
    rows = store.rows(0)
    with rows.writer() as writer:
        writer.add(
            torch.arange(num_rows), torch.randn(num_rows, 3), torch.rand(num_rows), torch.rand(num_rows)
        )
    return store, rows


def test_whole_shards_announce_those_after_the_next(tmp_path, monkeypatch):
    _, rows = stored(tmp_path)
    announced = []
    plain = DiskFolder.announce
    monkeypatch.setattr(
        DiskFolder, "announce", lambda self, name: announced.append(name) or plain(self, name)
    )
    assert not rows.in_memory
    rows.read(3, 5)
    rows.outputs()
    assert announced == []
    for _ in rows.blocks():
        pass
    assert [name[:14] for name in announced] == ["rows-000000016", "rows-000000024", "rows-000000032"]
    DiskFolder(tmp_path).announce("not there")


def test_what_is_in_memory_is_compared_on_demand_only(monkeypatch):
    store, rows = stored(None)
    assert rows.in_memory
    calls = []
    monkeypatch.setattr("trak.store.files.checksum", lambda tensor: calls.append(1) or "00000000")
    rows.read(0, 40)
    assert not calls
    assert len(verify(store).corrupt) == 5 and calls


def test_a_file_that_is_not_trusted_is_compared():
    class File:
        def __init__(self):
            self.metadata = {"trak": '{"crc32": {"features": "00000000"}}'}
            self.specs = {"features": ("float32", (2,))}

        def read(self, name, start=None, stop=None):
            return torch.ones(2)

    assert CheckedFile(File(), "here", trusted=True).read("features").sum() == 2
    with pytest.raises(CorruptShardError, match="checksum"):
        CheckedFile(File(), "here").read("features")
