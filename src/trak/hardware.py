"""What a processor multiplies faster in few bits than in float32, and how many threads it has cores for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch


@cache
def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 numbers, summed in float32, are faster there than those of float32: on a GPU of compute capability 8
    and above, and on a CPU with AMX. Without AMX (AVX-512 BF16 alone) products of single examples were slower.
    """
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and _has_amx("amx_bf16")


@cache
def multiplies_bytes() -> bool:
    """Whether this CPU has AMX for bytes, and PyTorch uses it.

    `torch._int_mm` is what PyTorch's own quantisation multiplies by, but is not documented: where it is missing or
    gives anything but the product, it is not used.
    """
    if not _has_amx("amx_int8"):
        return False
    left_mn = torch.arange(-96, 96, dtype=torch.int8).view(3, 64)
    right_no = torch.ones(64, 2, dtype=torch.int8).T.contiguous().T
    try:
        product_mo = torch._int_mm(left_mn, right_no)
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(product_mo, left_mn.sum(1, dtype=torch.int32)[:, None].expand(3, 2))


@contextmanager
def one_core_left() -> Iterator[None]:
    """PyTorch leaves one core free where it would take them all.

    Its threads wait for one another by spinning: where they have all the cores, a thread of ours that reads files gets on at half its speed.
    Threads that first use PyTorch meanwhile inherit the number.
    """
    threads = torch.get_num_threads()
    if threads < max(2, available_cores()):
        yield
        return
    torch.set_num_threads(max(1, available_cores() - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _has_amx(kind: str) -> bool:
    """Whether the CPU has these instructions and PyTorch the library that uses them; False where it cannot tell."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get(kind)) and torch.backends.mkldnn.is_available()
