"""Freed memory: kept while batch follows batch, given back after.

glibc returns the top of its heap to the system whenever more than some megabytes of it are free, and tensors of 32 MiB and more at once. A batch of
gradients frees that much at its end, and the next one is handed the same pages anew, each of them cleared: a tenth to a fifth of the time of
small models on a processor, and more than half of it where all gradients of a batch are formed (docs/performance.md).
After a run, on the other hand, what is free should not stay with the process.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

from trak.memory import available_memory

KEPT_BYTES = 2**30
"""That may be free at the top of the heap between batches; an eighth of what is available where that is less."""
GLIBC_TRIM_BYTES = 64 * 2**20
GLIBC_MAP_BYTES = 32 * 2**20
"""What glibc arrives at by itself, once so large a tensor was freed: from how many free bytes it trims its heap, and from how many a block
is mapped by itself. Choosing one of the two ends its own adjustment of both."""
GLIBC_MAPPED_BLOCKS = 65536
"""How many blocks glibc maps by themselves, at most. None of them can be kept, so that there are none while freed memory is."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Parameters of mallopt(3)."""


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory until `give_freed_memory_back`, in the whole process; whether it does.

    It is left alone where the environment says how memory is allocated (mallopt(3): `MALLOC_TRIM_THRESHOLD_`, `GLIBC_TUNABLES` and so on; or
    another allocator is loaded), and with other C libraries.
    """
    kept = min(KEPT_BYTES, (available_memory() or 0) // 8)
    return _set_thresholds(max(kept, GLIBC_TRIM_BYTES), mapped_blocks=0)


def give_freed_memory_back() -> None:
    """Return to the system what is free, and keep no more than glibc does by itself from now on."""
    if _set_thresholds(GLIBC_TRIM_BYTES, mapped_blocks=GLIBC_MAPPED_BLOCKS):
        trim = _function("malloc_trim")
        if trim is not None:
            trim(0)


def _set_thresholds(trim_bytes: int, *, mapped_blocks: int) -> bool:
    mallopt = None if _is_chosen() else _function("mallopt")
    return (
        mallopt is not None
        and bool(mallopt(M_MMAP_THRESHOLD, GLIBC_MAP_BYTES))
        and bool(mallopt(M_TRIM_THRESHOLD, trim_bytes))
        and bool(mallopt(M_MMAP_MAX, mapped_blocks))
    )


def _is_chosen() -> bool:
    """Whether the environment has options of glibc's allocator, or another allocator."""
    return (
        any(name.startswith("MALLOC_") and name.endswith("_") for name in os.environ)
        or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
        or "malloc" in os.environ.get("LD_PRELOAD", "")
    )


def _function(name: str) -> Any:
    """Of the C library, None where it has none of this name."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
