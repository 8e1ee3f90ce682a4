"""A product with a sparse matrix by adding slices: blocks of entries are multiplied by their signs and added where they are shifted to.

No entry has a place of its own to be looked up, so that all runs at the speed of reading gradients, signs and sums from cache: 0.3 ns for each
number of a batch (one core; PyTorch copies a tensor in as much), against 0.7 to 1.0 ns for `scatter_add_` of the same numbers.

Superblocks of m blocks share the larger part of a shift: they are added at once to m sums that are K places too long, and each of these is
turned by its block's own part at the end.

Legend: B examples (b of one piece), n entries, K columns of one group, J places of a sum that is too long, L entries in a block, m blocks in a
superblock, s non-zeros per entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import sqrt

from torch import Tensor

from trak.projection.shifts import Shifts

TILE_ENTRIES = 1 << 18
"""Entries whose signs are drawn at once, or one superblock where that is more."""

FEW_BLOCKS = 4
"""A parameter of so few blocks is added where it belongs: to clear and to fold a longer sum would take as much as adding it."""

Pieces = Iterable[tuple[slice, int, Tensor]]
"""(examples, first entry, gradients [b, n]) as `pieces.cached_pieces` yields them."""

SignsOf = Callable[[int, int], Tensor]
"""Signs [s, n] of the entries from `first` to `stop`, which are a whole tile of them."""


def add_by_slices(target_BK: Tensor, pieces: Pieces, shifts: Shifts, signs_of: SignsOf) -> None:
    """Add to the target: target += values @ matrix.

    Every column gets its terms in an order that follows from the shape of the matrix alone: the same bits for any batch, piece and tile.

    Args:
        target_BK: [B, K of the parameter's placement], any strides.
        pieces: of the parameter, in the target's dtype or a narrower one: PyTorch raises what it adds.
        shifts: of the parameter.
        signs_of: a tile of signs, in the target's dtype.
    """
    if shifts.blocks <= FEW_BLOCKS:
        for examples, first, values_bn in pieces:
            _add_turned(target_BK[examples], values_bn, first, shifts, signs_of(0, shifts.size))
        return
    length, lanes, batch_size = shifts.length, shifts.lanes, len(target_BK)
    sums_sBmJ = [target_BK.new_zeros(batch_size, lanes, length + width) for _, width in shifts.groups]
    outer_sq = shifts.outer_sq.tolist()
    for examples, first, values_bn in pieces:
        values_bn = values_bn.contiguous()
        for low, high, start, signs_sn in _tiles(first, first + values_bn.shape[1], shifts, signs_of):
            runs = list(split_runs(low, high, length, lanes))
            for sums_BmJ, outer_q, signs_n in zip(sums_sBmJ, outer_sq, signs_sn):
                _add_runs(sums_BmJ[examples], values_bn, signs_n, first, start, runs, shifts, outer_q)
    for group, sums_BmJ in enumerate(sums_sBmJ):
        _fold(target_BK, sums_BmJ, shifts, group)


def _add_turned(target_bK: Tensor, values_bn: Tensor, first: int, shifts: Shifts, signs_sn: Tensor) -> None:
    """Block by block: what goes beyond the last column of a group is added from its first on."""
    moves_sn = shifts.moves_sn.tolist()
    if shifts.nonzeros > 1:
        values_bn = values_bn.to(target_bK.dtype) * (1 / sqrt(shifts.nonzeros))
    for start, _, length in split_runs(first, first + values_bn.shape[1], shifts.length, 1):
        block, offset = divmod(start, shifts.length)
        for group, (column, width) in enumerate(shifts.groups):
            place = (offset + moves_sn[group][block]) % width
            part = min(length, width - place)
            for low, high, to in (
                (start, start + part, column + place),
                (start + part, start + length, column),
            ):
                if high > low:
                    target_bK[:, to : to + high - low].addcmul_(
                        values_bn[:, low - first : high - first], signs_sn[group, low:high]
                    )


def _add_runs(
    sums_bmJ: Tensor,
    values_bn: Tensor,
    signs_n: Tensor,
    first: int,
    tile: int,
    runs: list[tuple[int, int, int]],
    shifts: Shifts,
    outer_q: list[int],
) -> None:
    """Runs of one tile, each in one operation.

    Views are made by strides, in half the time of slicing: a run is some ten thousand numbers, which are added in microseconds.
    """
    examples, count = values_bn.shape
    by_example, by_lane, _ = sums_bmJ.stride()
    origin, source = sums_bmJ.storage_offset(), values_bn.storage_offset() - first
    signs, block_length, lanes = signs_n.storage_offset() - tile, shifts.length, shifts.lanes
    for start, blocks, length in runs:
        block, offset = divmod(start, block_length)
        superblock, lane = divmod(block, lanes)
        place = origin + lane * by_lane + outer_q[superblock] + offset
        sums_bml = sums_bmJ.as_strided((examples, blocks, length), (by_example, by_lane, 1), place)
        values_bml = values_bn.as_strided((examples, blocks, length), (count, length, 1), source + start)
        sums_bml.addcmul_(values_bml, signs_n.as_strided((blocks, length), (length, 1), signs + start))


def _tiles(
    first: int, stop: int, shifts: Shifts, signs_of: SignsOf
) -> Iterator[tuple[int, int, int, Tensor]]:
    """(first entry, entry behind the last, where the tile starts, its signs [s, n]) of the part of each tile between `first` and `stop`."""
    superblock = shifts.lanes * shifts.length
    step = max(1, TILE_ENTRIES // superblock) * superblock
    for start in range(first // step * step, stop, step):
        end = min(start + step, shifts.size)
        yield max(first, start), min(stop, end), start, signs_of(start, end)


def _fold(target_BK: Tensor, sums_BmJ: Tensor, shifts: Shifts, group: int) -> None:
    """Sums that are too long, each turned by its block's part of the shift, added to a group's columns."""
    first, width = shifts.groups[group]
    scale = 1 / sqrt(shifts.nonzeros)
    beyond = sums_BmJ.shape[2] - width
    sums_BmJ[:, :, :beyond] += sums_BmJ[:, :, width:]
    group_BK = target_BK[:, first : first + width]
    for lane, inner in enumerate(shifts.inner_sm[group].tolist()):
        group_BK[:, inner:].add_(sums_BmJ[:, lane, : width - inner], alpha=scale)
        group_BK[:, :inner].add_(sums_BmJ[:, lane, width - inner : width], alpha=scale)


def split_runs(first: int, stop: int, length: int, lanes: int) -> Iterator[tuple[int, int, int]]:
    """(first entry, blocks, entries of each): whole blocks side by side in one superblock, or a part of one block, in order."""
    while first < stop:
        block, offset = divmod(first, length)
        whole = min((block // lanes + 1) * lanes, stop // length) - block
        if offset or whole < 1:
            last = min((block + 1) * length, stop)
            yield first, 1, last - first
        else:
            last = first + whole * length
            yield first, whole, length
        first = last
