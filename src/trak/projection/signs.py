"""Random signs: one bit each, 128 rows of one column to a Philox call.

Sign of (row, column): row = 128·block + 32·word + bit; the bit of that word for counter (block, column), least
significant bit first, is 1 for +1 and 0 for −1.

A byte thus holds eight consecutive rows of one column, and a matrix of signs is kept as bytes [K, W], column
by column. That is what `kernels.tables` looks up sums by, and a word is what a GPU thread unpacks along the inner
dimension of a product.

Legend: c blocks of 128 rows, n rows, K columns, W = 16·c bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from trak.projection.philox import BLOCK_ROWS, Key, draw_words


def draw_packed_signs(key: Key, blocks_c: Tensor, columns: int) -> Tensor:
    """Packed signs [K, 16·c] uint8 of the blocks of 128 rows blocks_c, int64 [c]."""
    words = draw_words(key, blocks_c, columns)
    return _pack_by_numpy(words) if blocks_c.device.type == "cpu" else _pack_by_torch(words)


def unpack_signs(packed_KW: Tensor, dtype: torch.dtype, scratch: Tensor | None = None) -> Tensor:
    """±1 as [8·W, K] in `dtype`; written into `scratch` (at least 8·W·K numbers of that dtype) if given."""
    columns, width = packed_KW.shape
    if scratch is None:
        scratch = torch.empty(columns * width * 8, dtype=dtype, device=packed_KW.device)
    out = scratch[: columns * width * 8].view(columns * width, 8)
    if packed_KW.device.type == "cpu":
        _look_up_by_numpy(packed_KW, out)
    else:
        _look_up_by_torch(packed_KW, out)
    return out.view(columns, width * 8).T


def reference_signs(key: Key, blocks_c: Tensor, columns: int) -> Tensor:
    """±1 as [128·c, K] int64, bit by bit: what the packed path must equal."""
    words_c4K = torch.stack(draw_words(key, blocks_c, columns), dim=1)
    bits = torch.arange(32, device=blocks_c.device)[:, None]
    signs_c4bK = 2 * (words_c4K[:, :, None] >> bits & 1) - 1
    return signs_c4bK.reshape(blocks_c.numel() * BLOCK_ROWS, columns)


def _pack_by_numpy(words: Sequence[Tensor]) -> Tensor:
    """Four words [c, K] as bytes [K, 16·c], lowest byte first."""
    blocks, columns = words[0].shape
    packed = np.empty((columns, blocks, 4), dtype="<u4")
    for index, word in enumerate(words):
        packed[..., index] = word.numpy().T
    return torch.from_numpy(packed.view(np.uint8).reshape(columns, blocks * 16))


def _pack_by_torch(words: Sequence[Tensor]) -> Tensor:
    words_Kc4 = torch.stack([word.T for word in words], dim=-1)
    parts = [(words_Kc4 >> shift & 0xFF).to(torch.uint8) for shift in (0, 8, 16, 24)]
    return torch.stack(parts, dim=-1).flatten(1)


def _look_up_by_numpy(packed_KW: Tensor, out: Tensor) -> None:
    table = _byte_table(out.dtype, out.device).numpy()
    # mode="clip" skips the bounds check, which a byte into 256 rows does not need.
    np.take(table, packed_KW.numpy().reshape(-1), axis=0, out=out.numpy(), mode="clip")


def _look_up_by_torch(packed_KW: Tensor, out: Tensor) -> None:
    torch.index_select(_byte_table(out.dtype, out.device), 0, packed_KW.reshape(-1).int(), out=out)


@cache
def _byte_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256, 8]: the eight signs of each byte. A constant, so keeping it is no hidden state."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return (2 * bits - 1).to(dtype)
