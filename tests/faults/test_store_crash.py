"""Failures at every step of writing: the disk stays valid, resuming gives an uninterrupted run's bits."""

from __future__ import annotations

import errno
import os
import stat

import pytest
import torch

from trak.errors import TrakError
from trak.store import disk, load_store, open_store, verify
from trak.testing.store import NUM_ROWS, make_header, make_values, snapshot, write

SHARD_ROWS = 8


class Killed(BaseException):
    """Stands for the end of the process: nothing after it has any effect on the disk."""


class Switch:
    """Counts the steps that touch the disk and fails at one of them; when `dead`, at all that follow too."""

    def __init__(self, monkeypatch, at: int, error: BaseException, *, dead: bool) -> None:
        self.steps, self.at, self.error, self.dead = 0, at, error, dead
        for module, name in (
            (os, "replace"),
            (os, "link"),
            (os, "fsync"),
            (disk, "save"),
            (disk.Path, "unlink"),
        ):
            monkeypatch.setattr(module, name, self.guard(getattr(module, name)))

    def guard(self, action):
        def guarded(*args, **kwargs):
            self.steps += 1
            if self.steps == self.at or (self.dead and self.steps > self.at):
                raise self.error
            return action(*args, **kwargs)

        return guarded


def life(path, order, feature_dtype="float32"):
    """All that a run writes: store, checkpoint, rows, a derived result."""
    store = open_store(path, make_header(feature_dtype=feature_dtype), shard_rows=SHARD_ROWS)
    store.add_checkpoint(0, "hash")
    rows = store.rows(0)
    write(rows, order.split(6), make_values())
    rows.save_derived("gram", {"gram": torch.eye(2)})
    return [*snapshot(rows), rows.derived("gram")["gram"]], rows.digest()


def orders():
    return {
        "in order": torch.arange(NUM_ROWS),
        "shuffled": torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(3)),
    }


@pytest.mark.parametrize("order", orders())
@pytest.mark.parametrize("dead", [True, False], ids=["killed", "error"])
def test_every_step_may_be_the_last(tmp_path, monkeypatch, order, dead):
    """Stop at every third step that touches the disk, of whatever kind; then look; then resume."""
    rows_in_order = orders()[order]
    expected, digest = life(tmp_path / "whole", rows_in_order)
    with monkeypatch.context() as patch:
        switch = Switch(patch, at=-1, error=Killed(), dead=False)
        life(tmp_path / "counted", rows_in_order)
    assert switch.steps > 30
    for step in range(1, switch.steps + 1, 3):
        path = tmp_path / f"step{step}"
        error = Killed() if dead else OSError(errno.ENOSPC, "no space left")
        with monkeypatch.context() as patch:
            Switch(patch, at=step, error=error, dead=dead)
            with pytest.raises(type(error)):
                life(path, rows_in_order)
        if (path / "manifest.json").exists():
            report = verify(load_store(path))
            assert report.ok
            assert not report.unknown
        resumed, resumed_digest = life(path, rows_in_order)
        assert all(torch.equal(a, b) for a, b in zip(expected, resumed))
        assert resumed_digest == digest
        report = verify(path)
        assert report.complete
        assert not list(path.rglob("fragment-*"))


def test_a_kill_in_order_loses_less_than_a_shard(tmp_path):
    store = open_store(tmp_path, make_header(), shard_rows=SHARD_ROWS)
    store.add_checkpoint(0, "hash")
    writer = store.rows(0).writer()
    values = make_values()
    for batch in torch.arange(30).split(5):
        writer.add(batch, *(value[batch] for value in values))
    del writer
    assert store.rows(0).missing() == [(24, NUM_ROWS)]


def test_an_error_while_closing_does_not_hide_the_first(tmp_path, monkeypatch, caplog):
    store = open_store(tmp_path, make_header(), shard_rows=SHARD_ROWS)
    store.add_checkpoint(0, "hash")
    values = make_values()

    def full(*args):
        raise OSError(errno.ENOSPC, "no space left")

    with pytest.raises(ZeroDivisionError), store.rows(0).writer() as writer:  # noqa: PT012
        writer.add(torch.arange(5), *(value[:5] for value in values))
        monkeypatch.setattr(os, "fsync", full)
        raise ZeroDivisionError
    assert "Rows of checkpoint 0 still in memory could not be kept" in caplog.text
    monkeypatch.undo()
    assert store.rows(0).missing() == [(0, NUM_ROWS)]
    assert verify(store).temporaries == ()


def test_a_full_disk_is_an_error_and_leaves_no_half_file(tmp_path, monkeypatch):
    store = open_store(tmp_path, make_header(), shard_rows=SHARD_ROWS)
    store.add_checkpoint(0, "hash")

    def full(*args):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        write(store.rows(0), [torch.arange(NUM_ROWS)], make_values())
    monkeypatch.undo()
    assert verify(store).temporaries == ()
    write(store.rows(0), [torch.arange(NUM_ROWS)], make_values())
    assert verify(store).complete


def test_a_temporary_file_removed_under_a_writer_is_written_again(tmp_path, monkeypatch):
    """The worst that a wrong clock can do."""
    store = open_store(tmp_path, make_header(), shard_rows=SHARD_ROWS)
    store.add_checkpoint(0, "hash")
    replace, lost = os.replace, []

    def lose_first(source, target):
        if not lost:
            lost.append(source)
            os.unlink(source)
        replace(source, target)

    monkeypatch.setattr(os, "replace", lose_first)
    write(store.rows(0), [torch.arange(NUM_ROWS)], make_values())
    assert lost
    assert verify(store).complete


def test_a_fragment_compacted_while_it_is_read(tmp_path, monkeypatch):
    """A reader has listed the folder; another process compacts; the reader looks again."""
    store = open_store(tmp_path, make_header(), shard_rows=SHARD_ROWS)
    store.add_checkpoint(0, "hash")
    values = make_values()
    write(store.rows(0), [torch.arange(5)], values)
    reader = store.rows(0)
    look = reader._files.look

    def look_then_compact():
        contents = look()
        write(store.rows(0), [torch.arange(8)], values)
        return contents

    monkeypatch.setattr(reader._files, "look", look_then_compact)
    assert torch.equal(reader.read(0, 5).features, values[0][:5])
    assert not list(tmp_path.rglob("fragment-*"))


def test_a_store_deleted_while_it_is_read_is_an_error_of_ours(tmp_path, monkeypatch):
    store = open_store(tmp_path, make_header(), shard_rows=SHARD_ROWS)
    store.add_checkpoint(0, "hash")
    write(store.rows(0), [torch.arange(5)], make_values())
    reader = store.rows(0)
    look = reader._files.look
    contents = look()
    monkeypatch.setattr(reader._files, "look", lambda: contents)
    for file in tmp_path.rglob("fragment-*"):
        file.unlink()
    with pytest.raises(TrakError, match="go while they are being read"):
        reader.read(0, 5)


def test_bytes_are_flushed_before_the_name_and_the_name_after(tmp_path, monkeypatch):
    store = open_store(tmp_path, make_header(), shard_rows=NUM_ROWS)
    store.add_checkpoint(0, "hash")
    folder = tmp_path / "checkpoints" / "0" / "train"
    folder.mkdir()
    events = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor):
        file = os.fstat(descriptor)
        events.append(("flush", file.st_ino, file.st_size if stat.S_ISREG(file.st_mode) else "folder"))
        fsync(descriptor)

    def record_replace(source, target):
        events.append(("rename", os.stat(source).st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write(store.rows(0), [torch.arange(NUM_ROWS)], make_values())
    (shard,) = folder.iterdir()
    inode, size = shard.stat().st_ino, shard.stat().st_size
    assert events == [("flush", inode, size), ("rename", inode), ("flush", folder.stat().st_ino, "folder")]


def test_a_shard_that_exists_is_never_written_again(tmp_path):
    """Two writers complete the same shard: the first stays, also if the second computed other numbers."""
    store = open_store(tmp_path, make_header(), shard_rows=SHARD_ROWS)
    store.add_checkpoint(0, "hash")
    values = make_values()
    rows = torch.arange(SHARD_ROWS)
    with store.rows(0).writer() as first, store.rows(0).writer() as second:
        first.add(rows, *(value[rows] for value in values))
        second.add(rows, *(value[rows] + 1 for value in values))
    assert torch.equal(store.rows(0).read(0, SHARD_ROWS).features, values[0][rows])
