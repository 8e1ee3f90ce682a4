"""Tiles as they are kept, unpacked and multiplied: for any device and dtype.

Legend: B examples, n rows, K columns.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from trak.projection.kernels.entries import Entries, Part


def add_by_matmul(target_BK: Tensor, parts: Iterable[Part], entries: Entries, scale: float) -> None:
    """Add to the target: target += scale · Σ values @ tile, one matrix product for each part."""
    scratch: Tensor | None = None
    columns = target_BK.shape[1]
    for values_Bn, skip, kept in parts:
        size = kept.shape[1] * 8 * columns
        if entries is Entries.SIGNS and (scratch is None or scratch.numel() < size):
            scratch = torch.empty(size, dtype=target_BK.dtype, device=target_BK.device)
        tile_nK = entries.expand(kept, target_BK.dtype, scratch)
        target_BK.addmm_(values_Bn, tile_nK[skip : skip + values_Bn.shape[1]], alpha=scale)
