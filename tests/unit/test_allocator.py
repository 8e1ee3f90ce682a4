"""What the process holds, before, between and after batches: in processes of their own, since the allocator has a past."""

import subprocess
import sys

import pytest

from trak import allocator

PROGRAM = """
import sys
from pathlib import Path

import torch

from trak.allocator import give_freed_memory_back, keep_freed_memory


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 // 2**20


def batch():
    size = 2**24 if "large" in sys.argv else 2**20  # 64 or 4 MiB each
    tensors = [torch.ones(size) for _ in range(2**26 // size)]


if "keep" in sys.argv:
    assert keep_freed_memory() == ("chosen" not in sys.argv)
torch.ones(2**22 + 2**21).sum()  # 24 MiB: blocks of its size come from the heap from now on
start = resident()
batch()
between = resident()
give_freed_memory_back()
print(between - start, resident() - start)
"""


def held(*arguments, **environment):
    """MiB more than at the start: between batches, and after."""
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        env={"OMP_NUM_THREADS": "1", **environment},
    )
    assert answer.returncode == 0, answer.stderr
    return [int(part) for part in answer.stdout.split()]


glibc = pytest.mark.skipif(allocator._function("malloc_trim") is None, reason="glibc only")


@glibc
@pytest.mark.parametrize("size", ["small", "large"])
def test_a_batch_is_kept_and_given_back_at_the_end(size):
    between, after = held("keep", size)
    assert between > 200
    assert after < 60


@glibc
def test_large_tensors_are_given_back_at_once_where_nothing_is_kept():
    between, _ = held("large")
    assert between < 60


@glibc
def test_what_the_environment_says_stands():
    between, after = held(
        "keep", "chosen", MALLOC_TRIM_THRESHOLD_="1000000000", MALLOC_MMAP_THRESHOLD_="33554432"
    )
    assert between > 200
    assert after > 200


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_ARENA_MAX_", "1"),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1"),
        ("LD_PRELOAD", "/lib/libjemalloc.so"),
    ],
)
def test_the_choices_that_are_recognised(monkeypatch, name, value):
    monkeypatch.setattr(allocator.os, "environ", {})
    assert not allocator._is_chosen()
    monkeypatch.setattr(allocator.os, "environ", {name: value})
    assert allocator._is_chosen()
    assert not allocator.keep_freed_memory()


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(allocator, "_function", lambda name: None)
    assert not allocator.keep_freed_memory()
    allocator.give_freed_memory_back()
