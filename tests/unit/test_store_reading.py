"""Reading whole shards in a row: what comes next is announced, and checksums are for what comes from outside."""

import threading

import pytest
import torch

from trak.errors import CorruptShardError
from trak.store import Header, open_store, verify
from trak.store.disk import DiskFolder
from trak.store.files import CheckedFile


def stored(folder, num_rows=40, feature_dtype="float32"):
    header = Header(
        num_rows=num_rows,
        dim=3,
        columns=[("all", 0, 3)],
        parameters={"w": (3,)},
        projection={"kind": "none"},
        task={"task": "none"},
        feature_dtype=feature_dtype,
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


@pytest.mark.parametrize("feature_dtype", ["float16", "bfloat16", "float32", "float64"])
def test_stored_parts_outlive_their_file_and_are_not_copied(tmp_path, feature_dtype):
    _, rows = stored(tmp_path, feature_dtype=feature_dtype)
    expected = rows.read(0, 40).features
    parts = rows.read_stored(0, 40)
    again = rows.read_stored(3, 5)
    rows.delete_features()
    assert not list(tmp_path.rglob("rows-*"))
    found = [part.decode(0, len(part), torch.empty(len(part), 3, dtype=part.dtype)) for part in parts]
    assert torch.equal(torch.cat(found), expected)
    # A part of a shard is copied: its pages would otherwise be read where it is used.
    assert again[0].features.untyped_storage().nbytes() == again[0].features.nbytes
    _, near = stored(None, feature_dtype=feature_dtype)
    first, second = near.read_stored(0, 8)[0], near.read_stored(2, 4)[0]
    assert first.features[2:].data_ptr() == second.features.data_ptr()


def test_damage_is_found_in_stored_parts_that_are_whole_shards(tmp_path):
    _, rows = stored(tmp_path, feature_dtype="float16")
    path = sorted(tmp_path.rglob("rows-*"))[2]
    intact = path.read_bytes()
    size = 8 + int.from_bytes(intact[:8], "little")
    found = 0
    for position in range(size, len(intact)):
        path.write_bytes(intact[:position] + bytes([intact[position] ^ 4]) + intact[position + 1 :])
        try:
            rows.read_stored(8, 32)
        except CorruptShardError:
            found += 1
    # Features and scales; outputs and weights were not asked for.
    assert found == 8 * 3 * 2 + 8 * 4
    path.write_bytes(intact[:-1])
    with pytest.raises(CorruptShardError):
        rows.read_stored(16, 17)


def test_blocks_are_read_ahead_from_disk_only(tmp_path, monkeypatch):
    threads = []
    for folder in (tmp_path, None):
        _, rows = stored(folder)
        plain = type(rows).read
        monkeypatch.setattr(
            type(rows),
            "read",
            lambda self, start, stop, plain=plain: (
                threads.append(threading.current_thread()) or plain(self, start, stop)
            ),
        )
        whole = plain(rows, 0, 40).features
        assert torch.equal(torch.cat([block.features for block in rows.blocks(16)]), whole)
        monkeypatch.undo()
    here = threading.current_thread()
    assert len(threads) == 6 and here not in threads[:3] and threads[3:] == [here] * 3
    assert not threads[0].is_alive()


def test_damage_comes_up_at_its_block_and_leaving_early_ends_the_reading(tmp_path):
    _, rows = stored(tmp_path)
    path = sorted(tmp_path.rglob("rows-*"))[3]
    path.write_bytes(path.read_bytes()[:-1])
    blocks = rows.blocks()
    assert [next(blocks).start for _ in range(3)] == [0, 8, 16]
    with pytest.raises(CorruptShardError, match="rows-000000024"):
        next(blocks)
    blocks = rows.blocks()
    next(blocks)
    blocks.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("trak-reading")]
