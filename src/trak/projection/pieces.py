"""A block's gradients in pieces of bounded size, so that [B, P] need not exist for a large parameter.

Legend: B examples, R rows and C columns of the parameter as a matrix, n flattened entries, u distinct rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

import torch
from torch import Tensor

from trak.blocks import Block, IndexBlock, OuterBlock

PIECE_ENTRIES = 1 << 24
"""Most gradient entries in one piece, all examples together (64 MiB in float32)."""

SMALL_TABLE = 1 << 18
"""An embedding of at most this many entries is made dense: cheaper than looking up its rows."""


def upcast(block: Block, dtype: torch.dtype) -> Block:
    """The block with its floating-point tensors in `dtype`: sums over positions are not in half precision."""
    tensors = {field.name: getattr(block, field.name) for field in fields(block)}
    changed = {
        name: tensor.to(dtype)
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != dtype
    }
    return replace(block, **changed) if changed else block  # type: ignore[arg-type]


def is_large_table(block: Block) -> bool:
    """True for an embedding's block whose dense gradient should not be formed."""
    rows, columns = block.matrix_shape
    return isinstance(block, IndexBlock) and rows * columns > SMALL_TABLE


def dense_pieces(block: Block) -> Iterator[tuple[int, Tensor]]:
    """(first flattened entry, gradients [B, n]) of consecutive entries, in order, covering the parameter."""
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


def table_pieces(block: IndexBlock) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows [u] int64, gradients [B, u, C]) for the rows of the table that the batch touches, in order."""
    batch_size, length, columns = block.values.shape
    touched_U, position_BT = torch.unique(block.indices, return_inverse=True)
    order_BT = position_BT.flatten().argsort(stable=True)
    sorted_BT = position_BT.flatten()[order_BT]
    step = max(1, PIECE_ENTRIES // max(1, batch_size * columns))
    for first in range(0, touched_U.numel(), step):
        rows_u = touched_U[first : first + step]
        bounds = torch.tensor([first, first + rows_u.numel()], device=sorted_BT.device)
        start, stop = torch.searchsorted(sorted_BT, bounds).tolist()
        # Stable order keeps each example's positions in their own order, so sums do not depend on the batch.
        pairs = order_BT[start:stop]
        values_BuC = block.values.new_zeros(batch_size * rows_u.numel(), columns)
        slots = (pairs // length) * rows_u.numel() + sorted_BT[start:stop] - first
        terms = block.values.reshape(-1, columns)[pairs]
        if terms.device.type == "cpu":
            values_BuC.index_add_(0, slots, terms)
        else:
            # Sorts, where index_add_ adds atomically in any order.
            values_BuC.index_put_((slots,), terms, accumulate=True)
        yield rows_u, values_BuC.reshape(batch_size, -1, columns)
