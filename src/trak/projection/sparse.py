"""Sparse Johnson–Lindenstrauss: each gradient entry goes to one or a few columns.

Legend: B examples, n entries, s non-zeros per entry, K columns, T positions and C columns of an embedding's
block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor

from trak.blocks import Block, IndexBlock
from trak.projection.base import Columns, Projection, ProjectionState, Shapes
from trak.projection.checks import (
    check_add,
    check_cache_bytes,
    check_integer,
    check_name,
    check_state_options,
    require_state,
    resolve_device,
)
from trak.projection.layout import Placement, pool
from trak.projection.philox import Key, derive_key, draw_words
from trak.projection.pieces import (
    PIECE_ENTRIES,
    as_multiplied,
    cached_pieces,
    dense_pieces,
    is_large_table,
    table_pieces,
)
from trak.projection.tiles import TileCache

TILE_ENTRIES = 1 << 16
"""Entries that are drawn, and scattered at the most, at once. It does not change the order of sums."""

SIGNED_ENTRIES = 1 << 12
"""Parameters of so many entries have sums of either sign on a CPU."""

TABLE_ENTRIES = 1 << 22
"""An embedding of at most so many entries is drawn once and kept (32 MiB)."""

WHOLE_TABLE = -1
"""Its place among a parameter's tiles."""

SORTED_ENTRIES = 1 << 18
"""Entries summed at once where they are sorted by column first: enough of them for every column."""


@dataclass(frozen=True, eq=False)
class SparseState(ProjectionState):
    """Keys and placements, with the columns and signs drawn so far."""

    keys: Mapping[str, Key]
    placements: Mapping[str, Placement]
    nonzeros: int
    cache: TileCache

    def draw(self, name: str, entries_n: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of the feature matrix [s, n] int64 and signs / sqrt(s) [s, n] for flattened entries."""
        place = self.placements[name]
        nonzeros = min(self.nonzeros, place.width)
        columns_sn, signs_sn = draw_hashes(self.keys[name], entries_n, nonzeros, place.width)
        return columns_sn.add_(place.start), signs_sn.to(self.dtype).div_(sqrt(nonzeros))

    def draw_signed(self, name: str, entries_n: Tensor) -> Tensor:
        """Columns of the parameter's own [s, n] int64, from 0 to K − 1 where the sign is +1 and from K to 2K − 1 where it is −1."""
        width = self.placements[name].width
        columns_sn, signs_sn = draw_hashes(self.keys[name], entries_n, min(self.nonzeros, width), width)
        return columns_sn.add_((signs_sn < 0).long(), alpha=width)


def draw_hashes(key: Key, entries_n: Tensor, nonzeros: int, columns: int) -> tuple[Tensor, Tensor]:
    """Columns [s, n] and signs ±1 [s, n], both int64.

    The K columns are cut into s groups, group t from floor(t·K / s) on; non-zero t lies in group t, so that
    the columns of one entry differ. Words 2(t mod 2) and 2(t mod 2) + 1 of counter (entry, t div 2) give it:
    the first times the size of the group, div 2^32, is the place in the group (uneven by less than K / 2^32);
    the lowest bit of the second is 1 for +1.
    """
    words = draw_words(key, entries_n, -(-nonzeros // 2))
    columns_sn = torch.empty(nonzeros, entries_n.numel(), dtype=torch.int64, device=entries_n.device)
    signs_sn = torch.empty_like(columns_sn)
    for index in range(nonzeros):
        first = index * columns // nonzeros
        size = (index + 1) * columns // nonzeros - first
        call, half = divmod(index, 2)
        columns_sn[index] = (words[2 * half][:, call] * size >> 32) + first
        signs_sn[index] = 2 * (words[2 * half + 1][:, call] & 1) - 1
    return columns_sn, signs_sn


@dataclass(frozen=True)
class Sparse(Projection):
    """Pᵀg with `nonzeros` entries ±1/sqrt(nonzeros) in each row, the rest zero (Kane and Nelson, 2014; block
    construction).

    Costs `nonzeros` additions for each gradient entry, whatever K: the fastest on a CPU. In expectation as
    good as dense signs, Var⟨φ, φ'⟩ = (‖g‖²‖g'‖² + ⟨g, g'⟩² − 2 Σ_i g_i² g'_i²) / K for every `nonzeros` that
    divides K, with heavier tails where a few entries carry most of a gradient; more non-zeros thin the tails.

    On a CPU entries are scattered in their order; elsewhere they are sorted by column, and every column summed by
    itself: no atomics, the same bits in every run.

    Args:
        dim: K, at least 1. It may exceed P, except with `per_layer`.
        seed: any integer.
        nonzeros: from 1 to dim (in a layer with fewer columns: as many as it has).
        per_layer: K is split over layers, each with columns of its own; a layer that fits its share is kept
            exactly, and K is at most P. The formula above then holds layer by layer, with the layer's K.
        cache_bytes: memory for drawn columns and signs, in bytes, for each state (8 to 16 for each
            non-zero). It changes the speed and no number, and takes no part in equality and fingerprint.
    """

    dim: int
    seed: int = 0
    _: KW_ONLY
    nonzeros: int = 1
    per_layer: bool = False
    cache_bytes: int = field(default=1 << 30, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_integer("dim", self.dim, at_least=1)
        check_integer("seed", self.seed)
        check_integer("nonzeros", self.nonzeros, at_least=1, at_most=self.dim)
        check_cache_bytes(self.cache_bytes)

    @property
    def kind(self) -> str:
        """`"sparse"`."""
        return "sparse"

    @property
    def version(self) -> int:
        """Version of the numbers drawn."""
        return 1

    def columns(self, shapes: Shapes) -> tuple[Columns, ...]:
        """One entry "all", or one for each layer."""
        return pool(shapes, self.dim, per_layer=self.per_layer)[1]

    def init(
        self,
        shapes: Shapes,
        *,
        checkpoint: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> SparseState:
        """Keys and placements; columns and signs are drawn when first used.

        Raises:
            ProjectionError: no parameters, fewer columns than layers, or sums in a dtype other than float32
                and float64.
        """
        check_state_options(checkpoint, dtype)
        placements, columns = pool(shapes, self.dim, per_layer=self.per_layer)
        return SparseState(
            shapes=dict(shapes),
            checkpoint=checkpoint,
            dim=columns[-1].stop,
            device=resolve_device(device),
            dtype=dtype,
            keys={name: derive_key(self.kind, self.version, self.seed, checkpoint, name) for name in shapes},
            placements=placements,
            nonzeros=self.nonzeros,
            cache=TileCache(self.cache_bytes),
        )

    def add(self, state: ProjectionState, block: Block, out_BK: Tensor) -> None:
        """Add Pᵀ g of one block of one batch to `out`."""
        state = require_state(self, state, SparseState)
        check_add(state, block, out_BK)
        block = as_multiplied(block, state.dtype)
        place = state.placements[block.name]
        if place.exact:
            for first, values_Bn in dense_pieces(block, state.dtype):
                start = place.start + first
                out_BK[:, start : start + values_Bn.shape[1]] += values_Bn
            return
        if not sums_sorted(state.device):
            _add_scattered(state, block, out_BK)
        elif is_large_table(block) and isinstance(block, IndexBlock):
            _add_sorted_table(state, block, out_BK)
        else:
            for first, values_Bn in dense_pieces(block, state.dtype):
                _add_sorted_range(state, block.name, first, values_Bn, out_BK)

    def matrix(self, state: ProjectionState, name: str) -> Tensor:
        """The dense [P_name, K] matrix of one parameter."""
        state = require_state(self, state, SparseState)
        check_name(state.shapes, name)
        place = state.placements[name]
        size = prod(state.shapes[name])
        out_PK = torch.zeros(size, state.dim, dtype=state.dtype, device=state.device)
        if place.exact:
            out_PK[:, place.start : place.stop] = torch.eye(size, dtype=state.dtype, device=state.device)
            return out_PK
        columns_sP, signs_sP = state.draw(name, torch.arange(size, device=state.device))
        return out_PK.scatter_(1, columns_sP.T, signs_sP.T)

    def fingerprint(self) -> dict[str, Any]:
        """What decides the numbers."""
        return {
            "kind": self.kind,
            "version": self.version,
            "seed": self.seed,
            "dim": self.dim,
            "nonzeros": self.nonzeros,
            "per_layer": self.per_layer,
        }


def sums_sorted(device: torch.device) -> bool:
    """Whether entries are sorted by column: everywhere but on a CPU, where scattering keeps their order anyway."""
    return device.type != "cpu"


def _sort(columns_sn: Tensor, signs_sn: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """(entries [s·n] int32 by column, their signs [s·n], where each of the K columns starts [K] int32)."""
    sorted_N, order_N = columns_sn.flatten().sort(stable=True)
    bounds_K = torch.arange(columns, device=sorted_N.device)
    starts_K = torch.searchsorted(sorted_N, bounds_K).int()
    return (order_N % columns_sn.shape[1]).int(), signs_sn.flatten()[order_N], starts_K


def _add_sorted(values_nB: Tensor, tile: tuple[Tensor, Tensor, Tensor], out_BK: Tensor) -> None:
    """Every column's terms in their order: a bag of rows of the transpose, weighted by signs. No atomics."""
    entries_N, signs_N, starts_K = tile
    sums_KB = torch.embedding_bag(values_nB, entries_N, starts_K, False, 0, False, signs_N)[0]
    out_BK += sums_KB.T


def _add_sorted_range(state: SparseState, name: str, first: int, values_Bn: Tensor, out_BK: Tensor) -> None:
    """`_add_range` by sorted entries; a piece that covers a tile in part is filled up with zeros."""
    size = prod(state.shapes[name])
    stop = first + values_Bn.shape[1]
    for index in range(first // SORTED_ENTRIES, -(-stop // SORTED_ENTRIES)):
        start = index * SORTED_ENTRIES
        count = min(SORTED_ENTRIES, size - start)

        def draw(start: int = start, count: int = count) -> tuple[Tensor, Tensor, Tensor]:
            drawn = state.draw(name, torch.arange(start, start + count, device=state.device))
            return _sort(*drawn, out_BK.shape[1])

        low, high = max(first, start), min(stop, start + count)
        values_nB = values_Bn.new_zeros(count, len(values_Bn))
        values_nB[low - start : high - start] = values_Bn[:, low - first : high - first].T
        tile = state.cache.get(name, index, draw)
        _add_sorted(values_nB, (tile[0], tile[1], tile[2]), out_BK)


def _add_sorted_table(state: SparseState, block: IndexBlock, out_BK: Tensor) -> None:
    """`_add_table` by sorted entries: gradients are collected on the rows that the batch touches."""
    for rows_u, values_BuC in table_pieces(block):
        width = values_BuC.shape[2]
        entries_n = (rows_u[:, None] * width + torch.arange(width, device=state.device)).flatten()
        tile = _sort(*state.draw(block.name, entries_n), out_BK.shape[1])
        _add_sorted(values_BuC.flatten(1).T.contiguous(), tile, out_BK)


def _add_scattered(state: SparseState, block: Block, out_BK: Tensor) -> None:
    """Entries in their order; each column gets its terms in theirs, whatever the tiles, pieces and batches.

    A sign is a place to add to: positive terms have one sum for each column and negative ones another, and nothing is multiplied.
    """
    place = state.placements[block.name]
    nonzeros = min(state.nonzeros, place.width)
    target_BK = out_BK[:, place.start : place.stop]
    by_rows = isinstance(block, IndexBlock) and (
        is_large_table(block) or block.indices.shape[1] <= block.shape[0]
    )
    if prod(block.shape) < SIGNED_ENTRIES and not by_rows:
        _add_small(state, block, target_BK)
        return
    sums_BJ = out_BK.new_zeros(len(out_BK), 2 * place.width)
    if by_rows and isinstance(block, IndexBlock):
        _scatter_table(state, block, sums_BJ)
    else:
        for examples, first, values_bn in cached_pieces(block, state.dtype):
            _scatter_range(state, block.name, first, values_bn, sums_BJ[examples])
    target_BK.add_(sums_BJ[:, : place.width], alpha=1 / sqrt(nonzeros))
    target_BK.sub_(sums_BJ[:, place.width :], alpha=1 / sqrt(nonzeros))


def _add_small(state: SparseState, block: Block, target_BK: Tensor) -> None:
    """A small parameter: to clear and to subtract twice the columns would cost more than to multiply by signs."""
    start = state.placements[block.name].start
    values_Bn = block.dense().reshape(block.batch_size, prod(block.shape)).to(state.dtype)

    def draw() -> tuple[Tensor, Tensor]:
        columns_sn, signs_sn = state.draw(block.name, torch.arange(values_Bn.shape[1], device=state.device))
        return columns_sn - start, signs_sn

    for columns_n, signs_n in zip(*state.cache.get(block.name, 0, draw)):
        target_BK.scatter_add_(1, columns_n.expand(values_Bn.shape), values_Bn * signs_n)


def _scatter_range(state: SparseState, name: str, first: int, values_Bn: Tensor, sums_BJ: Tensor) -> None:
    """Consecutive entries from `first` on, added to the sums of either sign [B, 2K]."""
    size = prod(state.shapes[name])
    stop = first + values_Bn.shape[1]
    for index in range(first // TILE_ENTRIES, -(-stop // TILE_ENTRIES)):
        start = index * TILE_ENTRIES

        def draw(start: int = start) -> tuple[Tensor]:
            last = min(start + TILE_ENTRIES, size)
            return (state.draw_signed(name, torch.arange(start, last, device=state.device)),)

        (signed_sn,) = state.cache.get(name, index, draw)
        low, high = max(first, start), min(stop, start + TILE_ENTRIES)
        part_Bn = values_Bn[:, low - first : high - first]
        for signed_n in signed_sn[:, low - start : high - start]:
            sums_BJ.scatter_add_(1, signed_n.expand(part_Bn.shape), part_Bn)


def _scatter_table(state: SparseState, block: IndexBlock, sums_BJ: Tensor) -> None:
    """An embedding: values are scattered where they stand. Columns of a very large one are drawn for the rows that the batch touches."""
    batch_size, length, width = block.values.shape
    size = prod(block.shape)
    nonzeros = min(state.nonzeros, state.placements[block.name].width)
    rows_BT = block.indices
    if size <= TABLE_ENTRIES and state.cache.keeps(block.name, WHOLE_TABLE, 8 * nonzeros * size):

        def draw() -> tuple[Tensor]:
            return (state.draw_signed(block.name, torch.arange(size, device=state.device)),)

        (signed_sN,) = state.cache.get(block.name, WHOLE_TABLE, draw)
    else:
        touched_U, rows_BT = torch.unique(block.indices, return_inverse=True)
        entries_UC = touched_U[:, None] * width + torch.arange(width, device=state.device)
        signed_sN = state.draw_signed(block.name, entries_UC.flatten())
    step = max(1, PIECE_ENTRIES // max(1, batch_size * width))
    for signed_N in signed_sN:
        signed_RC = signed_N.view(-1, width)
        for start in range(0, length, step):
            where_Bt = rows_BT[:, start : start + step]
            sums_BJ.scatter_add_(
                1, signed_RC[where_Bt].flatten(1), block.values[:, start : start + step].flatten(1)
            )
