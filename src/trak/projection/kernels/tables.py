"""A product with random signs by looked-up sums: no multiplications, on a CPU (Arlazarov, Dinic, Kronrod and
Faradzhev, 1970: "the four Russians").

Eight rows have only 256 possible columns of signs. For each example the 256 signed sums of eight gradient entries
are tabulated, and a column of the matrix, eight rows at a time, is one byte: the place in the table. With B
examples side by side, a product of B × 8 by 8 × K is then K additions of vectors of length B instead of eight, and

    additions per row and example = 256 / 8 (table) + K / 8 (look-ups)     against K multiplications and additions

Each look-up reads a vector of B floats from a table in cache. `torch.embedding_bag` does exactly that: bags are
columns, indices are bytes. The sums of a table are as exact as those of a product; the order of additions is
fixed and does not depend on the batch.

Cost for 8,192 rows, K = 2048, B = 64, one core with AVX2, in milliseconds (least of several runs): gradients laid out 2,
tables 5, indices 2, look-ups 9, against 31 for the bare matrix product over signs that are there as float32 already.

Legend: B examples (b of one slice), n rows, K columns, m bytes (eight rows each) of a tile.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

from trak.projection.kernels.entries import Part

SLICE_EXAMPLES = 32
"""Examples whose tables are in cache together (32 KiB for eight rows)."""

MIN_COLUMNS = 1024
"""With fewer columns the tables cost more than they save."""


def add_by_tables(target_BK: Tensor, parts: Iterable[Part], scale: float) -> None:
    """Add to the target: target += scale · Σ values @ signs, all of float32, the signs packed as in `signs.draw_packed_signs`."""
    batch_size, columns = target_BK.shape
    slices = [slice(start, start + SLICE_EXAMPLES) for start in range(0, batch_size, SLICE_EXAMPLES)]
    sums = [target_BK.new_zeros(columns, target_BK[rows].shape[0]) for rows in slices]
    # Tables are megabytes that live for a millisecond: in one buffer, since fresh pages would cost as much as the sums.
    scratch = target_BK.new_empty(0)
    for values_Bn, skip, packed_KW in parts:
        first, lead = divmod(skip, 8)
        length = -(-(lead + values_Bn.shape[1]) // 8)
        index_Km = packed_KW[:, first : first + length].int()
        # The table's row for byte v of place p is v·m + p.
        torch.add(torch.arange(length, dtype=torch.int32), index_Km, alpha=length, out=index_Km)
        starts_K = torch.arange(0, columns * length, length, dtype=torch.int32)
        for rows, sum_Kb in zip(slices, sums):
            if scratch.numel() < 256 * length * sum_Kb.shape[1]:
                scratch = target_BK.new_empty(256 * length * sum_Kb.shape[1])
            table_vb = signed_sums(values_Bn[rows], lead, length, scratch)
            sum_Kb += torch.embedding_bag(table_vb, index_Km.view(-1), starts_K, False, 0)[0]
    for rows, sum_Kb in zip(slices, sums):
        target_BK[rows].add_(sum_Kb.T, alpha=scale)


def signed_sums(values_bn: Tensor, lead: int, length: int, scratch: Tensor) -> Tensor:
    """[256·m, b] in `scratch`: row v·m + p is Σ_i ±x_i over rows 8p to 8p + 7, + where bit i of v is set.

    `lead` rows before the first value, and those after the last, are zeros.
    """
    batch_size, count = values_bn.shape
    if lead or count != 8 * length:
        padded = values_bn.new_zeros(batch_size, 8 * length)
        padded[:, lead : lead + count] = values_bn
        values_bn = padded
    halves_24mb = values_bn.reshape(batch_size, length, 2, 4).permute(2, 3, 1, 0).contiguous()
    low, high = _signs_of_four(values_bn.dtype) @ halves_24mb.view(2, 4, length * batch_size)
    table = scratch[: 256 * length * batch_size].view(16, 16, length * batch_size)
    return torch.add(high[:, None], low[None], out=table).view(256 * length, batch_size)


@cache
def _signs_of_four(dtype: torch.dtype) -> Tensor:
    """[16, 4]: the signs of four rows for each nibble. A constant, so keeping it is no hidden state."""
    nibbles = torch.arange(16)[:, None] >> torch.arange(4) & 1
    return (2 * nibbles - 1).to(dtype)
