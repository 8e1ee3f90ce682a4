"""Random lives of a store, on disk and in memory, against a dictionary."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from trak.errors import MissingRowsError
from trak.store import open_store, verify
from trak.testing.store import make_header

DIM = 2


class StoreLife(RuleBasedStateMachine):
    """Writers open, take rows in any order, close or fail; the process may be killed at any time.

    The model: `stored` maps rows that must be there to the time they were added, `added` those that a writer
    has taken and may still lose.
    """

    on_disk = True

    @initialize(
        num_rows=st.integers(1, 40),
        shard_rows=st.integers(1, 9),
        feature_dtype=st.sampled_from(["float32", "float16"]),
    )
    def create(self, num_rows, shard_rows, feature_dtype):
        self.folder = Path(tempfile.mkdtemp()) if self.on_disk else None
        self.header = make_header(
            num_rows=num_rows, dim=DIM, columns=[("all", 0, DIM)], feature_dtype=feature_dtype
        )
        self.store = open_store(self.folder, self.header, shard_rows=shard_rows)
        self.store.add_checkpoint(0, "hash")
        self.rows = self.store.rows(0)
        self.num_rows, self.shard_rows = num_rows, shard_rows
        self.stored: dict[int, int] = {}
        self.added: dict[int, int] = {}
        self.writer = None
        self.clock = 0

    def teardown(self):
        if getattr(self, "folder", None):
            shutil.rmtree(self.folder)

    def values(self, rows, times):
        """Small integers, so that every dtype holds them exactly; they tell row and time of adding."""
        features = torch.tensor(
            [[row + 1, time] for row, time in zip(rows, times)], dtype=torch.float32
        ).reshape(-1, DIM)
        return features, -features[:, 0], features[:, 1] * 0.5

    @precondition(lambda self: self.writer is None)
    @rule()
    def open_writer(self):
        self.writer = self.rows.writer()

    @precondition(lambda self: self.writer is not None)
    @rule(data=st.data())
    def add(self, data):
        rows = data.draw(st.lists(st.integers(0, self.num_rows - 1), unique=True, max_size=self.num_rows))
        if data.draw(st.booleans()):
            rows = sorted(rows)
        self.clock += 1
        self.writer.add(torch.tensor(rows, dtype=torch.int64), *self.values(rows, [self.clock] * len(rows)))
        for row in rows:
            if row not in self.stored and row not in self.added:
                self.added[row] = self.clock

    @precondition(lambda self: self.writer is not None)
    @rule(fails=st.booleans())
    def close_writer(self, fails):
        if fails:
            with pytest.raises(KeyboardInterrupt), self.writer:
                raise KeyboardInterrupt
        else:
            self.writer.close()
        self.writer = None
        self.stored |= self.added
        self.added = {}

    @precondition(lambda self: self.writer is not None)
    @rule()
    def kill(self):
        """The writer is gone without closing: what it had in memory is lost, at most a few shards' rows."""
        self.writer = None
        self.rows = self.store.rows(0)
        present = self.rows.has(torch.arange(self.num_rows)).tolist()
        kept = {row: time for row, time in self.added.items() if present[row]}
        assert len(self.added) - len(kept) <= 4 * self.shard_rows
        self.stored |= kept
        self.added = {}

    @precondition(lambda self: self.on_disk)
    @rule()
    def reopen(self):
        """Another process looks at the same folder."""
        self.store = open_store(self.folder, self.header, shard_rows=self.shard_rows)
        self.rows = self.store.rows(0)

    @precondition(lambda self: self.writer is None)
    @rule(data=st.data())
    def read(self, data):
        start = data.draw(st.integers(0, self.num_rows))
        stop = data.draw(st.integers(start, self.num_rows))
        wanted = range(start, stop)
        if any(row not in self.stored for row in wanted):
            with pytest.raises(MissingRowsError):
                self.rows.read(start, stop)
            return
        read = self.rows.read(start, stop)
        expected = self.values(wanted, [self.stored[row] for row in wanted])
        assert all(torch.equal(a, b) for a, b in zip((read.features, read.outputs, read.weights), expected))

    @precondition(lambda self: self.writer is None and len(self.stored) == self.num_rows)
    @rule()
    def derive(self):
        assert self.rows.derived("sum") is None or self.rows.derived("sum")["sum"] == sum(
            self.stored.values()
        )
        self.rows.save_derived("sum", {"sum": torch.tensor(sum(self.stored.values()))})
        assert self.rows.derived("sum")["sum"] == sum(self.stored.values())
        assert not [name for name in self.rows._files.folder.files() if name.startswith("fragment")]

    @invariant()
    def what_is_stored_is_known(self):
        present = set(torch.arange(self.num_rows)[self.rows.has(torch.arange(self.num_rows))].tolist())
        assert set(self.stored) <= present <= set(self.stored) | set(self.added)
        missing = {row for start, stop in self.rows.missing() for row in range(start, stop)}
        assert missing == set(range(self.num_rows)) - present
        assert self.rows.is_complete == (not missing)

    @precondition(lambda self: self.writer is None)
    @invariant()
    def files_are_intact(self):
        assert verify(self.store).ok
        assert not verify(self.store).temporaries


class StoreLifeInMemory(StoreLife):
    on_disk = False


@pytest.mark.parametrize("machine", [StoreLife, StoreLifeInMemory])
def test_random_lives(machine):
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
