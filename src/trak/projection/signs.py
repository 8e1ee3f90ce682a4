"""Random signs: one bit each, 128 to a Philox call.

Sign of (row, column): column = 128·block + 32·word + bit; the bit of that word for counter (row, block),
least significant bit first, is 1 for +1 and 0 for −1.

Signs are kept packed, eight to a byte in column order (a 32nd of float32), and unpacked through a table of
the 256 bytes: about as fast as reading float32 from memory, and a tenth of the matrix product that follows.

Legend: n rows, K columns, W = ceil(K / 8) bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from trak.projection.philox import Key, draw_words

CALL_COLUMNS = 128
"""Columns served by one Philox call."""


def draw_packed_signs(key: Key, rows_n: Tensor, columns: int) -> Tensor:
    """Packed signs [n, W] uint8 for rows_n int64 [n] and K columns; the last byte may hold bits beyond K."""
    words = draw_words(key, rows_n, -(-columns // CALL_COLUMNS))
    bytes_nW = _pack_by_numpy(words) if rows_n.device.type == "cpu" else _pack_by_torch(words)
    return bytes_nW[:, : -(-columns // 8)].contiguous()


def unpack_signs(
    packed_nW: Tensor, columns: int, dtype: torch.dtype, scratch: Tensor | None = None
) -> Tensor:
    """±1 as [n, K] in `dtype`; written into `scratch` (at least n·W·8 numbers of that dtype) if given."""
    rows, width = packed_nW.shape
    if scratch is None:
        scratch = torch.empty(rows * width * 8, dtype=dtype, device=packed_nW.device)
    out = scratch[: rows * width * 8].view(rows * width, 8)
    if packed_nW.device.type == "cpu":
        _look_up_by_numpy(packed_nW, out)
    else:
        _look_up_by_torch(packed_nW, out)
    return out.view(rows, width * 8)[:, :columns]


def reference_signs(key: Key, rows_n: Tensor, columns: int) -> Tensor:
    """±1 as [n, K] int64, bit by bit: what the packed path must equal."""
    words_nc4 = torch.stack(draw_words(key, rows_n, -(-columns // CALL_COLUMNS)), dim=-1)
    bits = torch.arange(32, device=rows_n.device)
    signs = 2 * (words_nc4[..., None] >> bits & 1) - 1
    return signs.reshape(rows_n.shape[0], -1)[:, :columns]


def _pack_by_numpy(words: Sequence[Tensor]) -> Tensor:
    """Four words [n, c] as bytes [n, 16 c], lowest byte first."""
    packed = np.empty((*words[0].shape, 4), dtype="<u4")
    for index, word in enumerate(words):
        packed[..., index] = word.numpy()
    return torch.from_numpy(packed.view(np.uint8).reshape(packed.shape[0], packed.shape[1] * 16))


def _pack_by_torch(words: Sequence[Tensor]) -> Tensor:
    words_nc4 = torch.stack(list(words), dim=-1)
    parts = [(words_nc4 >> shift & 0xFF).to(torch.uint8) for shift in (0, 8, 16, 24)]
    return torch.stack(parts, dim=-1).flatten(1)


def _look_up_by_numpy(packed_nW: Tensor, out: Tensor) -> None:
    table = _byte_table(out.dtype, out.device).numpy()
    # mode="clip" skips the bounds check, which a byte into 256 rows does not need.
    np.take(table, packed_nW.numpy().reshape(-1), axis=0, out=out.numpy(), mode="clip")


def _look_up_by_torch(packed_nW: Tensor, out: Tensor) -> None:
    torch.index_select(_byte_table(out.dtype, out.device), 0, packed_nW.reshape(-1).int(), out=out)


@cache
def _byte_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256, 8]: the eight signs of each byte. A constant, so keeping it is no hidden state."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return (2 * bits - 1).to(dtype)
