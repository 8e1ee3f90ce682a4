"""Damage, wherever it is, is found and named."""

from __future__ import annotations

import os
import shutil
import time

import pytest
import torch

from trak.errors import CorruptShardError, MissingRowsError
from trak.store import open_store, verify
from trak.testing.store import make_header, make_values, snapshot, write


@pytest.fixture
def store(tmp_path):
    store = open_store(tmp_path / "store", make_header(), shard_rows=8)
    for model_id in (0, 1):
        store.add_checkpoint(model_id, f"hash{model_id}")
    store.add_experiment("val", 5)
    write(store.rows(0), [torch.arange(53)], make_values())
    write(store.rows(0, "val"), [torch.arange(5)], make_values(5))
    write(store.rows(1), [torch.arange(20)], make_values())
    store.rows(0).save_derived("gram", {"gram": torch.eye(2)})
    return store


def shard_of(store, number, model_id=0):
    return sorted((store.folder._path / "checkpoints" / str(model_id) / "train").glob("rows-*"))[number]


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_report_of_an_intact_store(store):
    report = verify(store.where)
    assert report.ok
    assert not report.complete
    assert (report.shards, report.others) == (7 + 1 + 2, 2)
    assert [(gap.label, gap.ranges) for gap in report.missing] == [
        ("checkpoint 1", ((20, 53),)),
        ("checkpoint 1 in experiment 'val'", ((0, 5),)),
    ]
    assert "missing: rows 20 to 52 of checkpoint 1" in str(report)
    write(store.rows(1), [torch.arange(53)], make_values())
    write(store.rows(1, "val"), [torch.arange(5)], make_values(5))
    assert verify(store).complete


def test_memory_store_can_be_verified():
    store = open_store(None, make_header(), shard_rows=8)
    store.add_checkpoint(0, "hash")
    write(store.rows(0), [torch.arange(53)], make_values())
    assert verify(store).complete


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_shard(store, kept):
    path = shard_of(store, 2)
    os.truncate(path, kept if kept >= 0 else path.stat().st_size - 1)
    with pytest.raises(
        CorruptShardError, match=r"rows-000000016-000000024.safetensors .*Remove the file and run again"
    ):
        store.rows(0).read(0, 53)
    for read in (True, False):
        report = verify(store, read=read)
        assert [damage.file for damage in report.corrupt] == [str(path)]
        assert report.shards == 9
    assert store.rows(0).read(0, 16).stop == 16


@pytest.mark.parametrize("back", [1, 30, 60, 100, 200])
def test_flipped_bits_in_tensors_are_found_by_their_checksum(store, back):
    path = shard_of(store, 2)
    flip(path, -back)
    with pytest.raises(CorruptShardError, match=r"the checksum of '(features|outputs|weights)' is wrong"):
        snapshot(store.rows(0))
    assert [damage.file for damage in verify(store).corrupt] == [str(path)]
    assert verify(store, read=False).ok


def test_every_flipped_bit_of_a_header_is_found_or_harmless(store):
    """Flip one bit in each byte before the data: an error, or the same numbers as before."""
    before = snapshot(store.rows(0))
    path = shard_of(store, 0)
    intact = path.read_bytes()
    size = int.from_bytes(intact[:8], "little")
    found = 0
    for position in range(0, 8 + size, 3):
        flip(path, position)
        try:
            assert all(torch.equal(a, b) for a, b in zip(before, snapshot(store.rows(0))))
        except CorruptShardError:
            found += 1
        path.write_bytes(intact)
    assert found > 100


def test_a_shard_from_elsewhere_is_refused(store):
    """Of another checkpoint, another range, another store."""
    target = shard_of(store, 0)
    shutil.copy(shard_of(store, 0, model_id=1), target)
    with pytest.raises(CorruptShardError, match="checkpoints/1/train"):
        store.rows(0).read(0, 8)
    shutil.copy(shard_of(store, 1), target)
    with pytest.raises(CorruptShardError, match="'start': 8"):
        store.rows(0).read(0, 8)
    other = open_store(store.where + "2", make_header(extra={"other": 1}), shard_rows=8)
    other.add_checkpoint(0, "hash0")
    write(other.rows(0), [torch.arange(8)], make_values())
    shutil.copy(shard_of(other, 0), target)
    with pytest.raises(CorruptShardError, match="fingerprint"):
        store.rows(0).read(0, 8)


def test_a_removed_corrupt_shard_is_computed_again(store):
    before = snapshot(store.rows(0))
    path = shard_of(store, 3)
    os.truncate(path, 10)
    path.unlink()
    assert store.rows(0).missing() == [(24, 32)]
    assert store.rows(0).derived("gram") is None
    write(store.rows(0), [torch.arange(53)], make_values())
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(store.rows(0))))
    assert store.rows(0).derived("gram") is not None


def test_derived_results_of_other_rows_are_not_given(store):
    rows = store.rows(0)
    shard_of(store, 3).unlink()
    features, outputs, weights = make_values()
    write(rows, [torch.arange(53)], (features + 1, outputs, weights))
    assert rows.is_complete
    assert rows.derived("gram") is None


def test_damaged_derived_result(store):
    path = store.folder._path / "checkpoints" / "0" / "train" / "derived-gram.safetensors"
    flip(path, -1)
    with pytest.raises(CorruptShardError, match="derived-gram"):
        store.rows(0).derived("gram")
    assert [damage.file for damage in verify(store).corrupt] == [str(path)]


def test_damaged_fragment(store):
    folder = store.folder._path / "checkpoints" / "1" / "train"
    (fragment,) = folder.glob("fragment-*")
    flip(fragment, -1)
    with pytest.raises(CorruptShardError, match=fragment.name):
        store.rows(1).read(16, 20)
    with pytest.raises(CorruptShardError, match=fragment.name):
        write(store.rows(1), [torch.arange(53)], make_values())
    report = verify(store)
    assert [damage.file for damage in report.corrupt] == [str(fragment)]
    os.truncate(fragment, 20)
    report = verify(store)
    assert [damage.file for damage in report.corrupt] == [str(fragment)]
    # Nothing is known of the rows it had; rows 20 to 23 were kept when the writer failed.
    assert [gap.ranges for gap in report.missing if gap.label == "checkpoint 1"] == [((16, 20), (24, 53))]
    fragment.unlink()
    write(store.rows(1), [torch.arange(53)], make_values())
    assert torch.equal(store.rows(1).read(0, 53).features, make_values()[0])


def test_other_files_are_reported_and_left_alone(store):
    folder = store.folder._path / "checkpoints" / "0" / "train"
    (folder / "notes.txt").write_text("mine")
    (folder / "rows-000000000-000000009.safetensors").write_bytes(b"")
    report = verify(store)
    assert report.ok
    assert [name.rsplit("/", 1)[1] for name in report.unknown] == [
        "notes.txt",
        "rows-000000000-000000009.safetensors",
    ]
    assert (folder / "notes.txt").exists()


def test_only_stale_temporaries_are_removed(store):
    folder = store.folder._path / "checkpoints" / "1" / "train"
    fresh, stale = folder / ".tmp-1-aa-rows", folder / ".tmp-2-bb-rows"
    for path in (fresh, stale):
        path.write_bytes(b"half a shard")
    os.utime(stale, (time.time() - 7200,) * 2)
    report = verify(store)
    assert len(report.temporaries) == 2
    assert report.removed == ()
    assert stale.exists()
    report = verify(store, remove_stale=True)
    assert report.removed == (str(stale),)
    assert f"{stale} (stale, removed)" in str(report)
    assert fresh.exists()
    os.utime(fresh, (time.time() - 7200,) * 2)
    with store.rows(1).writer():
        assert not fresh.exists()


def test_interrupted_deletion_of_features_is_finished(store, monkeypatch):
    rows = store.rows(0)
    outputs = rows.outputs()
    remove = type(store.folder).remove
    removed = []

    def fail_at_third(self, name):
        removed.append(name)
        if len(removed) == 3:
            raise KeyboardInterrupt
        remove(self, name)

    monkeypatch.setattr(type(store.folder), "remove", fail_at_third)
    with pytest.raises(KeyboardInterrupt):
        rows.delete_features()
    monkeypatch.undo()
    assert not rows.has_features
    assert rows.is_complete
    assert torch.equal(rows.outputs(), outputs)
    with pytest.raises(MissingRowsError, match="deleted"):
        rows.read(40, 53)
    rows.delete_features()
    assert not list((store.folder._path / "checkpoints" / "0" / "train").glob("rows-*"))
    assert verify(store).ok
