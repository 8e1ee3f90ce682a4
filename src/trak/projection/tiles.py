"""Dense random matrices drawn tile by tile and multiplied, for the kinds whose every entry is drawn.

A tile is a fixed range of rows of one parameter's matrix; its size depends on K alone, never on the batch.
Tiles are kept as long as a budget allows, and drawn afresh for every batch beyond it: the numbers are the
same.

Legend: B examples, n entries (rows of the matrix), K columns (of the parameter's placement).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import Protocol

import torch
from torch import Tensor

from trak.blocks import Block, IndexBlock
from trak.projection.base import Projection, ProjectionState, Shapes
from trak.projection.checks import check_add, check_name, check_state_options, resolve_device
from trak.projection.layout import Placement, pool
from trak.projection.philox import Key, derive_key
from trak.projection.pieces import dense_pieces, is_large_table, table_pieces, upcast

TILE_ENTRIES = 1 << 20
"""Entries of one tile (4 MiB unpacked in float32: in cache while it is multiplied)."""


def tile_rows(columns: int) -> int:
    """Rows of a tile of so many columns."""
    return min(8192, max(64, TILE_ENTRIES // columns))


@dataclass(eq=False)
class TileCache:
    """Drawn tiles, kept until `budget` bytes are used; what comes later is drawn each time."""

    budget: int
    used: int = 0
    tiles: dict[tuple[str, int], tuple[Tensor, ...]] = field(default_factory=dict)

    def get(self, name: str, index: int, draw: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Tile `index` of a parameter, drawn if it is not there."""
        tile = self.tiles.get((name, index))
        if tile is None:
            tile = draw()
            size = sum(tensor.numel() * tensor.element_size() for tensor in tile)
            if self.used + size <= self.budget:
                self.tiles[name, index] = tile
                self.used += size
        return tile


class Entries(Protocol):
    """How a kind draws the unscaled entries of its matrix, and in which form it keeps them."""

    def draw(self, key: Key, rows_n: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        """The kept form for rows_n int64 [n] and columns 0 to K - 1."""

    def expand(self, kept: Tensor, columns: int, dtype: torch.dtype, scratch: Tensor) -> Tensor:
        """[n, K] in `dtype`, valid until `scratch` is used again."""

    def reference(self, key: Key, rows_n: Tensor, columns: int) -> Tensor:
        """[n, K] by the plainest way."""


@dataclass(frozen=True, eq=False)
class DenseState(ProjectionState):
    """A dense projection drawn for one checkpoint: keys and placements, with the tiles drawn so far."""

    keys: Mapping[str, Key]
    placements: Mapping[str, Placement]
    cache: TileCache


def init_dense(
    projection: Projection,
    shapes: Shapes,
    *,
    dim: int,
    seed: int,
    per_layer: bool,
    cache_bytes: int,
    checkpoint: int,
    device: torch.device | str,
    dtype: torch.dtype,
) -> DenseState:
    """Keys and placements of a dense kind; tiles are drawn when first used.

    Raises:
        ProjectionError: no parameters, fewer columns than layers, or sums in a dtype other than float32 and
            float64.
    """
    check_state_options(checkpoint, dtype)
    placements, columns = pool(shapes, dim, per_layer=per_layer)
    return DenseState(
        shapes=dict(shapes),
        checkpoint=checkpoint,
        dim=columns[-1].stop,
        device=resolve_device(device),
        dtype=dtype,
        keys={
            name: derive_key(projection.kind, projection.version, seed, checkpoint, name) for name in shapes
        },
        placements=placements,
        cache=TileCache(cache_bytes),
    )


def add_dense(state: DenseState, entries: Entries, block: Block, out_BK: Tensor) -> None:
    """Add Pᵀ g / sqrt(K) of one block to `out`, P drawn by `entries`."""
    check_add(state, block, out_BK)
    block = upcast(block, state.dtype)
    place = state.placements[block.name]
    target_BK = out_BK[:, place.start : place.stop]
    if place.exact:
        for first, values_Bn in dense_pieces(block):
            target_BK[:, first : first + values_Bn.shape[1]] += values_Bn
        return
    scratch = torch.empty(tile_rows(place.width) * (place.width + 7), dtype=state.dtype, device=state.device)
    if is_large_table(block) and isinstance(block, IndexBlock):
        _add_table(state, entries, block, target_BK, scratch)
        return
    for first, values_Bn in dense_pieces(block):
        _add_range(state, entries, block.name, first, values_Bn, target_BK, scratch)


def _add_range(
    state: DenseState,
    entries: Entries,
    name: str,
    first: int,
    values_Bn: Tensor,
    target_BK: Tensor,
    scratch: Tensor,
) -> None:
    """Consecutive entries from `first` on, tile by tile."""
    columns = target_BK.shape[1]
    size = prod(state.shapes[name])
    step = tile_rows(columns)
    stop = first + values_Bn.shape[1]
    for index in range(first // step, -(-stop // step)):
        start = index * step

        def draw(start: int = start) -> tuple[Tensor]:
            rows_n = torch.arange(start, min(start + step, size), device=state.device)
            return (entries.draw(state.keys[name], rows_n, columns, state.dtype),)

        (kept,) = state.cache.get(name, index, draw)
        tile_nK = entries.expand(kept, columns, state.dtype, scratch)
        low, high = max(first, start), min(stop, start + step)
        target_BK.addmm_(
            values_Bn[:, low - first : high - first],
            tile_nK[low - start : high - start],
            alpha=1 / sqrt(columns),
        )


def _add_table(
    state: DenseState, entries: Entries, block: IndexBlock, target_BK: Tensor, scratch: Tensor
) -> None:
    """An embedding: only the rows of the table that the batch touches are drawn (and not kept)."""
    columns = target_BK.shape[1]
    step = tile_rows(columns)
    width = block.values.shape[2]
    offsets = torch.arange(width, device=state.device)
    for rows_u, values_BuC in table_pieces(block):
        entries_n = (rows_u[:, None] * width + offsets).flatten()
        values_Bn = values_BuC.flatten(1)
        for start in range(0, entries_n.numel(), step):
            kept = entries.draw(state.keys[block.name], entries_n[start : start + step], columns, state.dtype)
            tile_nK = entries.expand(kept, columns, state.dtype, scratch)
            target_BK.addmm_(values_Bn[:, start : start + step], tile_nK, alpha=1 / sqrt(columns))


def dense_matrix(state: DenseState, entries: Entries, name: str) -> Tensor:
    """[P_name, K of the state]: the whole matrix of one parameter, by the plainest way."""
    check_name(state.shapes, name)
    place = state.placements[name]
    size = prod(state.shapes[name])
    out_PK = torch.zeros(size, state.dim, dtype=state.dtype, device=state.device)
    if place.exact:
        out_PK[:, place.start : place.stop] = torch.eye(size, dtype=state.dtype, device=state.device)
    else:
        rows_P = torch.arange(size, device=state.device)
        unscaled_PK = entries.reference(state.keys[name], rows_P, place.width).to(state.dtype)
        out_PK[:, place.start : place.stop] = unscaled_PK / sqrt(place.width)
    return out_PK
