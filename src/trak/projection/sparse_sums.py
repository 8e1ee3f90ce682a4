"""Ways to add the product of one block with a sparse matrix: one for each device, and others for embeddings and short blocks.

Legend: B examples, n entries, s non-zeros per entry, K columns of the parameter's placement, T positions and C columns of an
embedding's block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod, sqrt
from typing import Literal

import torch
from torch import Tensor

from trak.blocks import Block, IndexBlock
from trak.projection.base import ProjectionState
from trak.projection.kernels.dispatch import has_triton
from trak.projection.kernels.slices import add_by_slices
from trak.projection.layout import Placement
from trak.projection.philox import BLOCK_ROWS
from trak.projection.pieces import (
    PIECE_ENTRIES,
    cached_pieces,
    dense_pieces,
    is_large_table,
)
from trak.projection.shifts import Shifts
from trak.projection.tiles import TileCache

TABLE_ENTRIES = 1 << 22
"""An embedding of at most so many entries is drawn once and kept (32 MiB)."""

WHOLE_TABLE = -1
"""Its place among a parameter's tiles."""

SHORT_BLOCK = 256
"""Blocks of fewer entries, with many non-zeros or few columns, are scattered on a CPU: they are too many operations."""

TILE_ENTRIES = 1 << 16
"""Entries whose places are drawn at once there."""

SORTED_ENTRIES = 1 << 18
"""Entries summed at once where they are sorted by column first: enough of them for every column."""


@dataclass(frozen=True, eq=False)
class SparseState(ProjectionState):
    """Where entries go, with the signs drawn so far."""

    placements: Mapping[str, Placement]
    shifts: Mapping[str, Shifts]
    cache: TileCache

    def draw_range(self, name: str, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Columns of the parameter's own [s, n] int64 and signs / sqrt(s) [s, n] of consecutive flattened entries."""
        columns_sn, signs_sn = self.shifts[name].draw_range(first, stop, self.device)
        return columns_sn, signs_sn.to(self.dtype).div_(sqrt(self.shifts[name].nonzeros))

    def tile_of_signs(self, name: str, first: int, stop: int) -> Tensor:
        """Signs ±1 [s, n] of consecutive entries, drawn if they are not kept."""

        def draw() -> tuple[Tensor]:
            return (self.shifts[name].signs(first, stop, self.dtype),)

        return self.cache.get(name, first, draw)[0]


Way = Literal["slices", "gathered", "sorted"]


def choose_way(device: torch.device, dtype: torch.dtype) -> Way:
    """Slices on a CPU, gathered by Triton on CUDA where sums are in float32, sorted elsewhere."""
    if device.type == "cpu":
        return "slices"
    return "gathered" if device.type == "cuda" and dtype == torch.float32 and has_triton() else "sorted"


def add_sparse(state: SparseState, block: Block, target_BK: Tensor) -> None:
    """Add Pᵀ g of one block to the parameter's own columns of `out`."""
    way = choose_way(state.device, state.dtype)
    if isinstance(block, IndexBlock) and (is_large_table(block) or (way == "slices" and _is_sparse(block))):
        (_add_touched if way == "slices" else _add_table)(state, block, target_BK)
    elif way == "slices":
        is_short = state.shifts[block.name].length < SHORT_BLOCK
        (_add_scattered if is_short else _add_slices)(state, block, target_BK)
    elif way == "gathered":
        _add_gathered(state, block, target_BK)
    else:
        for first, values_Bn in dense_pieces(block, state.dtype):
            _add_sorted_range(state, block.name, first, values_Bn, target_BK)


def _is_sparse(block: IndexBlock) -> bool:
    """Whether an example has no more tokens than its table has rows."""
    return block.indices.shape[1] <= block.shape[0]


def _add_scattered(state: SparseState, block: Block, target_BK: Tensor) -> None:
    """Entries one by one, where blocks are short."""
    shifts, columns, size = state.shifts[block.name], target_BK.shape[1], prod(block.shape)
    sums_BJ = target_BK.new_zeros(len(target_BK), 2 * columns)
    for examples, first, values_bn in cached_pieces(block):
        values_bn, stop = values_bn.to(state.dtype), first + values_bn.shape[1]
        for start in range(first // TILE_ENTRIES * TILE_ENTRIES, stop, TILE_ENTRIES):

            def draw(start: int = start) -> tuple[Tensor]:
                return (_signed(*shifts.draw_range(start, min(start + TILE_ENTRIES, size)), columns),)

            (signed_sn,) = state.cache.get(block.name, start, draw)
            low, high = max(first, start), min(stop, start + TILE_ENTRIES)
            part_bn = values_bn[:, low - first : high - first]
            for signed_n in signed_sn[:, low - start : high - start]:
                sums_BJ[examples].scatter_add_(1, signed_n.expand(part_bn.shape), part_bn)
    _add_both_signs(target_BK, sums_BJ, shifts.nonzeros)


def _signed(columns_sn: Tensor, signs_sn: Tensor, columns: int) -> Tensor:
    """Columns [s, n] int64, from 0 to K − 1 where the sign is +1 and from K to 2K − 1 where it is −1."""
    return columns_sn.add_((signs_sn < 0).long(), alpha=columns)


def _add_both_signs(target_BK: Tensor, sums_BJ: Tensor, nonzeros: int) -> None:
    """Sums of positive and of negative terms, side by side, to the target."""
    columns = target_BK.shape[1]
    target_BK.add_(sums_BJ[:, :columns], alpha=1 / sqrt(nonzeros))
    target_BK.sub_(sums_BJ[:, columns:], alpha=1 / sqrt(nonzeros))


def _add_slices(state: SparseState, block: Block, target_BK: Tensor) -> None:
    def signs_of(first: int, stop: int) -> Tensor:
        return state.tile_of_signs(block.name, first, stop)

    add_by_slices(target_BK, cached_pieces(block), state.shifts[block.name], signs_of)


def _add_gathered(state: SparseState, block: Block, target_BK: Tensor) -> None:
    from trak.projection.kernels.triton_slices import add_by_gathering

    shifts = state.shifts[block.name]

    def draw() -> tuple[Tensor, Tensor]:
        packed_sW = shifts.packed_signs(0, -(-shifts.size // BLOCK_ROWS), state.device)
        return packed_sW.view(torch.int32), shifts.moves_sn.int().to(state.device, non_blocking=True)

    words_sW, moves_sn = state.cache.get(block.name, 0, draw)
    for first, values_Bn in dense_pieces(block):
        add_by_gathering(target_BK, values_Bn, first, shifts, words_sW, moves_sn)


def _sort(columns_sn: Tensor, signs_sn: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """(entries [s·n] int32 by column, their signs [s·n], where each of the K columns starts [K] int32)."""
    sorted_N, order_N = columns_sn.flatten().sort(stable=True)
    bounds_K = torch.arange(columns, device=sorted_N.device)
    starts_K = torch.searchsorted(sorted_N, bounds_K).int()
    return (order_N % columns_sn.shape[1]).int(), signs_sn.flatten()[order_N], starts_K


def _add_bags(values_nB: Tensor, tile: tuple[Tensor, Tensor, Tensor], target_BK: Tensor) -> None:
    """Every column's terms in their order: a bag of rows of the transpose, weighted by signs. No atomics."""
    entries_N, signs_N, starts_K = tile
    sums_KB = torch.embedding_bag(values_nB, entries_N, starts_K, False, 0, False, signs_N)[0]
    target_BK += sums_KB.T


def _add_sorted_range(
    state: SparseState, name: str, first: int, values_Bn: Tensor, target_BK: Tensor
) -> None:
    """Consecutive entries from `first` on; a piece that covers a tile in part is filled up with zeros."""
    size = prod(state.shapes[name])
    stop = first + values_Bn.shape[1]
    for index in range(first // SORTED_ENTRIES, -(-stop // SORTED_ENTRIES)):
        start = index * SORTED_ENTRIES
        count = min(SORTED_ENTRIES, size - start)

        def draw(start: int = start, count: int = count) -> tuple[Tensor, Tensor, Tensor]:
            return _sort(*state.draw_range(name, start, start + count), target_BK.shape[1])

        low, high = max(first, start), min(stop, start + count)
        values_nB = values_Bn.new_zeros(count, len(values_Bn))
        values_nB[low - start : high - start] = values_Bn[:, low - first : high - first].T
        tile = state.cache.get(name, index, draw)
        _add_bags(values_nB, (tile[0], tile[1], tile[2]), target_BK)


def _add_table(state: SparseState, block: IndexBlock, target_BK: Tensor) -> None:
    """An embedding: every value goes to its columns, sorted by them first, where `scatter_add_` would add atomically in any order."""
    batch_size, length, width = block.values.shape
    if not block.indices.numel():
        return
    shifts, columns = state.shifts[block.name], target_BK.shape[1]
    sums_J = target_BK.new_zeros(batch_size * columns)
    first_B1 = torch.arange(batch_size, device=state.device)[:, None] * columns
    # Every number has half a dozen of eight bytes for each non-zero, and every token whole blocks of signs.
    step = max(1, PIECE_ENTRIES // (8 * shifts.nonzeros * batch_size * max(width, BLOCK_ROWS)))
    for start in range(0, length, step):
        rows_N = block.indices[:, start : start + step].flatten()
        values_N = block.values[:, start : start + step].to(state.dtype).flatten()
        for columns_N, signs_N in zip(*shifts.draw_rows(rows_N, width)):
            place_N = (columns_N.view(batch_size, -1) + first_B1).flatten()
            sums_J.index_put_((place_N,), values_N * signs_N, accumulate=True)
    target_BK.add_(sums_J.view(batch_size, columns), alpha=1 / sqrt(shifts.nonzeros))


def _add_touched(state: SparseState, block: IndexBlock, target_BK: Tensor) -> None:
    """An embedding: values are scattered where they stand, one by one.

    A sign is a place to add to: positive terms have one sum for each column and negative ones another, and nothing is multiplied.
    Places of a very large table are drawn for the rows that the batch touches.
    """
    batch_size, length, width = block.values.shape
    if not block.indices.numel():
        return
    size = prod(block.shape)
    shifts, columns = state.shifts[block.name], target_BK.shape[1]
    sums_BJ = target_BK.new_zeros(batch_size, 2 * columns)
    rows_BT = block.indices
    if size <= TABLE_ENTRIES and state.cache.keeps(block.name, WHOLE_TABLE, 8 * shifts.nonzeros * size):

        def draw() -> tuple[Tensor]:
            return (_signed(*shifts.draw_range(0, size), columns),)

        (signed_sN,) = state.cache.get(block.name, WHOLE_TABLE, draw)
    else:
        touched_U, rows_BT = torch.unique(block.indices, return_inverse=True)
        signed_sN = _signed(*shifts.draw_rows(touched_U, width), columns)
    step = max(1, PIECE_ENTRIES // max(1, batch_size * width))
    for signed_N in signed_sN:
        signed_RC = signed_N.view(-1, width)
        for start in range(0, length, step):
            where_Bt = rows_BT[:, start : start + step]
            sums_BJ.scatter_add_(
                1, signed_RC[where_Bt].flatten(1), block.values[:, start : start + step].flatten(1)
            )
    _add_both_signs(target_BK, sums_BJ, shifts.nonzeros)
