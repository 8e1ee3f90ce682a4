"""A product with a sparse matrix for CUDA: every column gathers its entries, block by block, in their order.

A column of a group has at most one entry of each block, at (column − shift) mod K_t, so that neighbouring columns read
neighbouring entries: whole cache lines, but where a block begins and where it is turned. Every program owns a tile of the output
[BLOCK_B, BLOCK_K] and one range of blocks; the ranges, which follow from shapes alone, are stored apart and added in a fixed order by a
second pass. No atomics, no sorting, no transpose: the bits are the same from run to run.

Signs are bits, 32 to a word, as `signs` packs them, drawn once for a parameter and kept: P / 8 bytes, read once for each tile of examples.

Roofline, from the data sheet of an H100 SXM (3.35 TB/s), for each number of a batch; nothing here was timed:

    memory      4 bytes of float32 gradients, read once: 1.2 ps (0.6 in half precision). Signs: 1 / (8 · BLOCK_B) bytes. Partial sums:
                one written and read for eight blocks (a quarter as much again for float32 gradients, a half in half
                precision), or for a smaller parameter.
    compiled    all instructions of the loop, at four a cycle: 0.4 ps (`benchmarks/triton_ahead.py`), two thirds of them
                places, masks and the columns' signs, which BLOCK_B examples share.

Memory is the bottleneck: to read what the backward pass, or the products of its factors, wrote.

Legend: B examples, n entries, K columns of one group, S ranges of blocks.
"""

from __future__ import annotations

from math import sqrt

import torch
import triton
import triton.language as tl
from torch import Tensor

from trak.projection.shifts import Shifts

BLOCK_B, BLOCK_K = 8, 256

RANGES = 64
"""Ranges of blocks, at most: with K = 2048 and 32 examples 2,048 programs, 15 for each of 132 multiprocessors, which hold 7 at a time."""

MIN_BLOCKS = 8
"""Fewest blocks in a range, where there is more than one: partial sums are then an eighth of the gradients."""


def add_by_gathering(
    target_BK: Tensor, values_Bn: Tensor, first: int, shifts: Shifts, words_sW: Tensor, moves_sn: Tensor
) -> None:
    """Add to the target: target += values @ matrix[first : first + n].

    Args:
        target_BK: float32 [B, K of the parameter's placement], any strides.
        values_Bn: float32, bfloat16 or float16 [B, n], any strides; sums are in float32 for all.
        first: the entry of the parameter that the first of the n is.
        shifts: of the parameter.
        words_sW: int32, its packed signs from entry 0 on, in each group.
        moves_sn: int32, the shift of each of its blocks in each group, below the columns of the group.
    """
    batch_size, count = values_Bn.shape
    if not (batch_size and count):
        return
    start = first // shifts.length
    blocks = -(-(first + count) // shifts.length) - start
    per_range = max(MIN_BLOCKS, triton.cdiv(blocks, RANGES))
    ranges = triton.cdiv(blocks, per_range)
    for (column, width), words_W, moves_n in zip(shifts.groups, words_sW, moves_sn):
        partial_SBK = torch.empty(ranges, batch_size, width, dtype=torch.float32, device=values_Bn.device)
        _gather[(triton.cdiv(width, BLOCK_K), triton.cdiv(batch_size, BLOCK_B), ranges)](
            values_Bn,
            words_W,
            moves_n,
            partial_SBK,
            batch_size,
            count,
            width,
            shifts.length,
            start,
            blocks,
            first,
            *values_Bn.stride(),
            per_range,
            BLOCK_B=BLOCK_B,
            BLOCK_K=BLOCK_K,
            num_warps=4,
            # Triton's default is about to change, and it warns if none is named. A product with ±1 is exact either way.
            enable_fp_fusion=True,
        )
        target_BK[:, column : column + width].add_(
            partial_SBK.sum(0) if ranges > 1 else partial_SBK[0], alpha=1 / sqrt(shifts.nonzeros)
        )


@triton.jit(do_not_specialize=["count", "start", "blocks", "first", "per_range"])
def _gather(  # type: ignore[no-untyped-def]
    x_ptr,
    words_ptr,
    moves_ptr,
    partial_ptr,
    batch_size,
    count,
    width,
    length,
    start,
    blocks,
    first,
    stride_b,
    stride_n,
    per_range,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    example = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    split = tl.program_id(2)
    x_ptrs = x_ptr + example.to(tl.int64)[:, None] * stride_b
    valid = (example < batch_size)[:, None]
    acc = tl.zeros((BLOCK_B, BLOCK_K), dtype=tl.float32)
    for index in range(split * per_range, tl.minimum((split + 1) * per_range, blocks)):
        block = start + index
        # 64 bits for a parameter of more than 2^31 entries; within a block 32 do.
        entry = tl.full((), 1, tl.int64) * block * length
        low = tl.maximum(first - entry, 0).to(tl.int32)
        high = tl.minimum(first - entry + count, length).to(tl.int32)
        offset = column - tl.load(moves_ptr + block)
        offset += tl.where(offset < 0, width, 0)
        # Beyond `width` there is no column, and from `high` on no entry of this block.
        inside = (column < width) & (offset >= low) & (offset < high)
        bit = offset + (entry & 31).to(tl.int32)
        word = tl.load(words_ptr + (entry >> 5) + (bit >> 5), mask=inside, other=0)
        # The sign as the highest bit of a float: set for a bit of 0, which is −1.
        flip = ((~(word >> (bit & 31))) & 1) << 31
        x_block_ptrs = x_ptrs + (entry - first) * stride_n
        x = tl.load(x_block_ptrs + (offset * stride_n)[None, :], mask=valid & inside[None, :], other=0.0)
        bits = x.to(tl.float32).to(tl.int32, bitcast=True) ^ flip[None, :]
        acc += bits.to(tl.float32, bitcast=True)
    # Offsets in 64 bits: S·B·K may exceed 2^31.
    place = split.to(tl.int64) * batch_size + example
    out_ptrs = partial_ptr + place[:, None] * width + column[None, :]
    tl.store(out_ptrs, acc, mask=valid & (column < width)[None, :])
