"""Random normal numbers: four rows of one column to a Philox call.

Normal number of (row, column): row = 128·block + 32·word + lane. Words (w0, w1, w2, w3) of counter (block,
column, lane) give words 0 to 3 by Box–Muller, twice: u = (w0 + 1/2) / 2^32, v = (w1 + 1/2) / 2^32;
sqrt(−2 ln u) cos 2πv and sqrt(−2 ln u) sin 2πv; then (w2, w3) alike. All in float64, then rounded to float32
for every dtype, so that a float64 state holds the same matrix.

Legend: c blocks of 128 rows, K columns.
"""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor

from trak.projection.philox import BLOCK_ROWS, MASK, Key, philox4x32

LANES = BLOCK_ROWS // 4
"""Philox calls for one column of a block."""

CHUNK_COLUMNS = 1 << 9
"""Columns of a block drawn at once: their scratch stays in cache."""


def draw_normals(key: Key, blocks_c: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers [128·c, K] in `dtype` of the blocks of 128 rows blocks_c, int64 [c]."""
    out_crK = torch.empty(blocks_c.numel(), BLOCK_ROWS, columns, dtype=dtype, device=blocks_c.device)
    for index, block in enumerate(blocks_c.split(1)):
        for start in range(0, columns, CHUNK_COLUMNS):
            stop = min(start + CHUNK_COLUMNS, columns)
            out_crK[index, :, start:stop] = _box_muller(key, block, start, stop)[0]
    return out_crK.flatten(0, 1)


def reference_normals(key: Key, blocks_c: Tensor, columns: int) -> Tensor:
    """[128·c, K] float32, all at once."""
    return _box_muller(key, blocks_c, 0, columns).flatten(0, 1)


def _box_muller(key: Key, blocks_c: Tensor, start: int, stop: int) -> Tensor:
    """[c, 128, stop - start] float32."""
    device = blocks_c.device
    shape = (blocks_c.numel(), LANES, stop - start)
    block = blocks_c[:, None, None].expand(shape)
    lane = torch.arange(LANES, device=device)[:, None].expand(shape)
    column = torch.arange(start, stop, device=device).expand(shape)
    words = philox4x32((block & MASK, block >> 32, column, lane), key)
    out = torch.empty(shape[0], 4, *shape[1:], dtype=torch.float32, device=device)
    for first, second in ((0, 1), (2, 3)):
        radius = words[first].double().add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
        angle = words[second].double().add_(0.5).mul_(2 * pi * 2.0**-32)
        out[:, first] = torch.cos(angle).mul_(radius)
        out[:, second] = angle.sin_().mul_(radius)
    return out.flatten(1, 2)
