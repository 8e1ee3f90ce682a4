"""Real processes: killed while writing, and several at once."""

from __future__ import annotations

import random
import subprocess
import sys
import time

import torch

from trak.store import load_store, open_store, verify
from trak.testing.store import make_header, make_values, snapshot, write

NUM_ROWS, DIM, SHARD_ROWS = 4000, 16, 32

SCRIPT = f"""
import sys
import torch
from trak.store import open_store
from trak.testing.store import make_header, make_values
torch.set_num_threads(1)
path, first, step, shuffled = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "shuffled"
header = make_header(num_rows={NUM_ROWS}, dim={DIM}, columns=[("all", 0, {DIM})], feature_dtype="float16")
values = make_values({NUM_ROWS}, {DIM})
print("ready", flush=True)
sys.stdin.readline()
store = open_store(path, header, shard_rows={SHARD_ROWS})
store.add_checkpoint(0, "hash")
rows = torch.arange(first, {NUM_ROWS}, step)
if shuffled:
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(first))]
with store.rows(0).writer() as writer:
    for batch in rows.split(7):
        writer.add(batch, *(value[batch] for value in values))
"""


def start(path, first=0, step=1, order="in order"):
    """A process that is about to write rows first, first + step, ...; it begins when told to."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(path), str(first), str(step), order],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process


def begin(process):
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    process.stdin.write("go\n")
    process.stdin.flush()


def end(process):
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors


def header():
    return make_header(num_rows=NUM_ROWS, dim=DIM, columns=[("all", 0, DIM)], feature_dtype="float16")


def whole(path):
    """What an uninterrupted process writes."""
    store = open_store(path, header(), shard_rows=SHARD_ROWS)
    store.add_checkpoint(0, "hash")
    write(store.rows(0), [torch.arange(NUM_ROWS)], make_values(NUM_ROWS, DIM))
    return snapshot(store.rows(0)), store.rows(0).digest()


def test_killed_while_writing_then_resumed(tmp_path):
    expected, digest = whole(tmp_path / "whole")
    chance = random.Random(0)
    processes = [start(tmp_path / str(n), order=("in order", "shuffled")[n % 2]) for n in range(3)]
    interrupted = 0
    for number, process in enumerate(processes):
        path = tmp_path / str(number)
        begin(process)
        while not list(path.glob("checkpoints/0/train/*.safetensors")) and process.poll() is None:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.04))
        process.kill()
        process.communicate()
        store = load_store(path)
        assert verify(store).ok
        interrupted += not store.rows(0).is_complete
        write(store.rows(0), torch.arange(NUM_ROWS).split(100), make_values(NUM_ROWS, DIM))
        assert verify(store).complete
        assert all(torch.equal(a, b) for a, b in zip(expected, snapshot(store.rows(0))))
        assert store.rows(0).digest() == digest
    assert interrupted >= 1


def test_processes_share_a_store(tmp_path):
    """Each makes the store or finds it and writes every second row: shards come about together."""
    expected, digest = whole(tmp_path / "whole")
    processes = [
        start(tmp_path / "shared", first=n, step=2, order=("in order", "shuffled")[n % 2]) for n in range(2)
    ]
    for process in processes:
        begin(process)
    for process in processes:
        end(process)
    store = load_store(tmp_path / "shared")
    assert store.rows(0).is_complete
    assert verify(store).complete
    with store.rows(0).writer():
        pass  # if all closed at one moment, none may have seen the others' last rows
    assert not list(tmp_path.rglob("fragment-*"))
    assert all(torch.equal(a, b) for a, b in zip(expected, snapshot(store.rows(0))))
    assert store.rows(0).digest() == digest
