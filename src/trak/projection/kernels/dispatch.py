"""Which kernel multiplies by a dense matrix.

    device   sums      entries   columns    kernel
    cuda     float32   both      any        triton, where it can be imported
    cpu      float32   signs     >= 512     digits, where the processor has AMX
    cpu      float32   signs     >= 1024    tables
    any      any       both      any        matmul

All give the same product up to the rounding of sums. On CUDA without Triton (it comes with PyTorch on Linux)
`matmul` runs, and says so once.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch

from trak.hardware import multiplies_bytes
from trak.logs import logger
from trak.projection.kernels import digits, tables
from trak.projection.kernels.entries import Entries

Kernel = Literal["digits", "matmul", "tables", "triton"]


def choose_kernel(device: torch.device, dtype: torch.dtype, entries: Entries, columns: int) -> Kernel:
    """The kernel for sums in `dtype` on `device`, for K columns."""
    if dtype != torch.float32:
        return "matmul"
    if device.type == "cuda" and has_triton():
        return "triton"
    if device.type == "cpu" and entries is Entries.SIGNS:
        if columns >= digits.MIN_COLUMNS and multiplies_bytes():
            return "digits"
        if columns >= tables.MIN_COLUMNS:
            return "tables"
    return "matmul"


@cache
def has_triton() -> bool:
    """Whether Triton is installed; looked up once for a process."""
    found = find_spec("triton") is not None
    if not found:
        logger.warning(
            "Triton is not installed: dense projections on CUDA fall back to unpacked tiles and matrix products, "
            "which give the same features more slowly"
        )
    return found
