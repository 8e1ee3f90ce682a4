"""A block's gradients in pieces of bounded size, so that [B, P] need not exist for a large parameter.

Legend: B examples, R rows and C columns of the parameter as a matrix, n flattened entries, u distinct rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from trak.blocks import Block, ConvBlock, IndexBlock, OuterBlock, upcast
from trak.hardware import multiplies_bfloat16
from trak.projection.philox import BLOCK_ROWS

PIECE_ENTRIES = 1 << 24
"""Most gradient entries in one piece, all examples together (64 MiB in float32)."""

CACHED_ENTRIES = 1 << 20
"""Gradient entries in one piece that is to stay in the processor's cache, all examples together (4 MiB in float32)."""

PATCH_ENTRIES = 1 << 20
"""Numbers in the patches of a convolution's inputs that are there at a time (4 MiB in float32), or one example's."""

SMALL_TABLE = 1 << 18
"""An embedding of at most this many entries is made dense: cheaper than looking up its rows."""


def as_multiplied(block: Block, dtype: torch.dtype) -> Block:
    """The block as its factors are to be multiplied for sums in `dtype`.

    Factors in bfloat16, of which one is enough (under autocast a layer may be given float32, and rounds it), stay so where that is
    faster: they are multiplied as the model multiplies them, sums over positions in float32, and the products are rounded to bfloat16, as
    the weight gradients of training are. All else is raised first, float16 because products may overflow.
    """
    factors = factors_of(block)
    if (
        factors
        and dtype == torch.float32
        and torch.bfloat16 in {factor.dtype for factor in factors}
        and multiplies_bfloat16(factors[0].device)
    ):
        return upcast(block, torch.bfloat16)
    return upcast(block, dtype)


def factors_of(block: Block) -> tuple[Tensor, ...]:
    """The two tensors whose products a block stands for, if it does."""
    if isinstance(block, OuterBlock):
        return block.left, block.right
    return (block.inputs, block.gradients) if isinstance(block, ConvBlock) else ()


def is_large_table(block: Block) -> bool:
    """True for an embedding's block whose dense gradient should not be formed."""
    rows, columns = block.matrix_shape
    return isinstance(block, IndexBlock) and rows * columns > SMALL_TABLE


def dense_pieces(block: Block, dtype: torch.dtype | None = None) -> Iterator[tuple[int, Tensor]]:
    """(first flattened entry, gradients [B, n], in `dtype` if given) of consecutive entries, in order, covering the parameter."""
    for first, values_Bn in _dense_pieces(block):
        yield first, values_Bn if dtype is None else values_Bn.to(dtype)


def _dense_pieces(block: Block) -> Iterator[tuple[int, Tensor]]:
    batch_size = block.batch_size
    rows, columns = block.matrix_shape
    if not isinstance(block, OuterBlock) or batch_size * rows * columns <= PIECE_ENTRIES:
        yield 0, block.dense().reshape(batch_size, rows * columns)
        return
    groups = block.left.shape[1]
    group_rows = rows // groups
    step = max(1, PIECE_ENTRIES // max(1, batch_size * columns))
    for group in range(groups):
        for first in range(0, group_rows, step):
            left_BTr = block.left[:, group, :, first : first + step]
            values_BrC = left_BTr.transpose(-1, -2) @ block.right[:, group]
            yield (group * group_rows + first) * columns, values_BrC.reshape(batch_size, -1)


def cached_pieces(block: Block) -> Iterator[tuple[slice, int, Tensor]]:
    """(examples, first flattened entry, gradients [b, n]): of every example consecutive entries, in order, covering the parameter.

    Gradients of a large parameter for a batch are too many for the cache: written to memory, in pages fresh from the system, and
    read back they cost several times what is done with them. Here a piece is overwritten by the next.
    """
    batch_size = block.batch_size
    rows, columns = block.matrix_shape
    whole = slice(0, batch_size)
    if batch_size * rows * columns <= CACHED_ENTRIES:
        yield whole, 0, block.dense().reshape(batch_size, rows * columns)
    elif isinstance(block, OuterBlock):
        # In half precision products are so fast that what the short ones of few rows lose counts for more.
        yield from _cached_outer(block, CACHED_ENTRIES >> (4 if block.left.element_size() > 2 else 2))
    elif isinstance(block, ConvBlock):
        yield from _cached_convolution(block)
    else:
        yield whole, 0, block.dense().reshape(batch_size, rows * columns)


def _cached_convolution(block: ConvBlock) -> Iterator[tuple[slice, int, Tensor]]:
    """Some examples at a time, of which patches give some rows at a time."""
    batch_size, (rows, columns) = block.batch_size, block.matrix_shape
    images = len(block.inputs) // batch_size
    by_patches = block.prefers_patches
    positions = images * prod(block.gradients.shape[2:]) * block.groups
    step = max(
        1, PATCH_ENTRIES // (positions * columns) if by_patches else CACHED_ENTRIES // (rows * columns)
    )
    for first in range(0, batch_size, step):
        count = min(step, batch_size - first)
        own = slice(first * images, (first + count) * images)
        part = replace(block, inputs=block.inputs[own], gradients=block.gradients[own], examples=count)
        if by_patches:
            for inner, entry, values_bn in _cached_outer(part.by_positions(), CACHED_ENTRIES >> 2):
                yield slice(first + inner.start, first + inner.stop), entry, values_bn
        else:
            yield slice(first, first + count), 0, part.dense().reshape(count, rows * columns)


def _cached_outer(block: OuterBlock, entries: int) -> Iterator[tuple[slice, int, Tensor]]:
    """Rows of so many entries, of some examples at a time, in one buffer.

    Many examples and few rows leave long sums where they are in cache. But products of many rows are faster, the more so the more positions.
    """
    batch_size, groups, _, group_rows = block.left.shape
    columns = block.matrix_shape[1]
    step = min(group_rows, max(32, -(-entries // columns)))
    in_cache = CACHED_ENTRIES * 4 // block.left.element_size()
    examples = min(batch_size, max(1, in_cache // (step * columns)))
    buffer = block.left.new_empty(examples * step * columns)
    for group in range(groups):
        for first in range(0, group_rows, step):
            left_BrT = block.left[:, group, :, first : first + step].transpose(-1, -2)
            count = left_BrT.shape[1]
            for start in range(0, batch_size, examples):
                own = slice(start, min(start + examples, batch_size))
                values = buffer[: (own.stop - start) * count * columns].view(-1, count, columns)
                torch.bmm(left_BrT[own], block.right[own, group], out=values)
                yield own, (group * group_rows + first) * columns, values.flatten(1)


def table_pieces(block: IndexBlock) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows [u] int64, gradients [B, u, C]) for the rows of the table that the batch touches.

    On a CPU every row once, in order. How many there are a GPU would be waited for: there are as many as tokens, in pieces of them. A row may be in
    two pieces, and those left over are row 0 with gradients of 0.
    """
    return _touched_rows(block) if block.indices.device.type == "cpu" else _touched_by_tokens(block)


def _touched_rows(block: IndexBlock) -> Iterator[tuple[Tensor, Tensor]]:
    batch_size, length, columns = block.values.shape
    touched_U, position_BT = torch.unique(block.indices, return_inverse=True)
    order_BT = position_BT.flatten().argsort(stable=True)
    sorted_BT = position_BT.flatten()[order_BT]
    step = max(1, PIECE_ENTRIES // max(1, batch_size * columns))
    for first in range(0, touched_U.numel(), step):
        rows_u = touched_U[first : first + step]
        bounds = torch.tensor([first, first + rows_u.numel()])
        start, stop = torch.searchsorted(sorted_BT, bounds).tolist()
        # Stable order keeps each example's positions in their own order, so sums do not depend on the batch.
        pairs = order_BT[start:stop]
        values_BuC = block.values.new_zeros(batch_size * rows_u.numel(), columns)
        slots = (pairs // length) * rows_u.numel() + sorted_BT[start:stop] - first
        values_BuC.index_add_(0, slots, block.values.reshape(-1, columns)[pairs])
        yield rows_u, values_BuC.reshape(batch_size, -1, columns)


def _touched_by_tokens(block: IndexBlock) -> Iterator[tuple[Tensor, Tensor]]:
    batch_size, length, columns = block.values.shape
    # Tokens by row, those of one row in their own order.
    sorted_N, token_N = block.indices.flatten().sort(stable=True)
    place_N = F.pad(sorted_N.diff() != 0, (1, 0)).cumsum(0)
    # A row of a narrow table takes a block of the matrix.
    step = max(1, PIECE_ENTRIES // max(1, batch_size * max(columns, BLOCK_ROWS)))
    for first in range(0, len(sorted_N), step):
        token_n = token_N[first : first + step]
        place_n = place_N[first : first + step] - place_N[first]
        rows_u = sorted_N.new_zeros(len(token_n)).scatter_(0, place_n, sorted_N[first : first + step])
        values_BuC = block.values.new_zeros(batch_size * len(rows_u), columns)
        slot_n = (token_n // length) * len(rows_u) + place_n
        # Sorts, where index_add_ adds atomically in any order.
        values_BuC.index_put_((slot_n,), block.values.reshape(-1, columns)[token_n], accumulate=True)
        yield rows_u, values_BuC.reshape(batch_size, -1, columns)
