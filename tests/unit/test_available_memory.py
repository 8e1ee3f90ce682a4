import os
from pathlib import Path

import pytest

from trak import memory
from trak.memory import available_memory

GIB = 1 << 30


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Writes what the kernel says of memory, in bytes."""
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)

    def write(*, free, available, limit=None, used=0, cached=0):
        (tmp_path / "meminfo").write_text(
            f"MemTotal: {64 * GIB // 1024} kB\nMemFree: {free // 1024} kB\nMemAvailable: {available // 1024} kB\n"
        )
        (tmp_path / "memory.max").write_text("max\n" if limit is None else f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        (tmp_path / "memory.stat").write_text(f"anon {used - cached}\ninactive_file {cached}\n")

    return write


def test_the_file_cache_is_available(system):
    system(free=1 * GIB, available=13 * GIB)
    assert available_memory() == 13 * GIB


def test_a_container_has_what_its_limit_leaves(system):
    system(free=1 * GIB, available=13 * GIB, limit=8 * GIB, used=5 * GIB, cached=2 * GIB)
    assert available_memory() == 5 * GIB


def test_a_container_over_its_limit_has_nothing(system):
    system(free=1 * GIB, available=13 * GIB, limit=8 * GIB, used=9 * GIB)
    assert available_memory() == 0


def test_other_systems_are_asked_for_their_free_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "none")
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "none")
    monkeypatch.setattr(os, "sysconf", {"SC_AVPHYS_PAGES": 10, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert available_memory() == 40960


def test_a_system_that_does_not_say(tmp_path, monkeypatch):
    def unknown(name):
        raise ValueError(f"unrecognized configuration name {name}")

    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "none")
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "none")
    monkeypatch.setattr(os, "sysconf", unknown)
    assert available_memory() is None


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="reads the Linux kernel's own figures")
def test_this_machine():
    found = available_memory()
    assert found is not None
    assert 0 <= found <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
