"""Dense random matrices drawn tile by tile and multiplied, for the kinds whose every entry is drawn.

A tile is a fixed range of rows of one parameter's matrix; its size depends on K alone, never on the batch.
Tiles are kept as long as a budget allows, and drawn afresh for every batch beyond it: the numbers are the
same. Where a kernel draws in registers there are no tiles.

Legend: B examples, n entries (rows of the matrix), K columns (of the parameter's placement), c blocks of 128
rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod, sqrt

import torch
from torch import Tensor

from trak.blocks import Block, DenseBlock, IndexBlock
from trak.projection.base import Projection, ProjectionState, Shapes
from trak.projection.checks import check_add, check_name, check_state_options, resolve_device
from trak.projection.kernels.digits import add_by_digits
from trak.projection.kernels.dispatch import Kernel, choose_kernel
from trak.projection.kernels.entries import Entries, Part
from trak.projection.kernels.matmul import add_by_matmul
from trak.projection.kernels.tables import add_by_tables
from trak.projection.layout import Placement, pool
from trak.projection.philox import BLOCK_ROWS, Key, blocks_of_rows, derive_key
from trak.projection.pieces import as_multiplied, dense_pieces, is_large_table, table_pieces

TILE_ENTRIES = 1 << 20
"""Entries of one tile (4 MiB unpacked in float32: in cache while it is multiplied)."""


def tile_rows(columns: int) -> int:
    """Rows of a tile of so many columns: whole blocks."""
    return min(8192, max(BLOCK_ROWS, TILE_ENTRIES // columns // BLOCK_ROWS * BLOCK_ROWS))


@dataclass(eq=False)
class TileCache:
    """Drawn tiles, kept until `budget` bytes are used; what comes later is drawn each time."""

    budget: int
    used: int = 0
    tiles: dict[tuple[str, int], tuple[Tensor, ...]] = field(default_factory=dict)

    def keeps(self, name: str, index: int, size: int) -> bool:
        """Whether tile `index` of a parameter, of `size` bytes, is there or would be kept."""
        return (name, index) in self.tiles or self.used + size <= self.budget

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
    place = state.placements[block.name]
    kernel = choose_kernel(state.device, state.dtype, entries, place.width)
    # These kernels read half precision as it is.
    reads_half = kernel in ("triton", "digits") and not place.exact
    dtype = None if reads_half else state.dtype
    if not (reads_half and isinstance(block, DenseBlock)):
        block = as_multiplied(block, state.dtype)
    target_BK = out_BK[:, place.start : place.stop]
    if place.exact:
        for first, values_Bn in dense_pieces(block, dtype):
            target_BK[:, first : first + values_Bn.shape[1]] += values_Bn
        return
    add = _Adder(state, entries, block.name, target_BK, kernel)
    if is_large_table(block) and isinstance(block, IndexBlock):
        for rows_u, values_BuC in table_pieces(block):
            add.blocks(*_whole_blocks(rows_u, values_BuC))
        return
    for first, values_Bn in dense_pieces(block, dtype):
        add.range(first, values_Bn)


@dataclass(frozen=True, eq=False)
class _Adder:
    """Adds products of gradients with rows of one parameter's matrix to `target`."""

    state: DenseState
    entries: Entries
    name: str
    target_BK: Tensor
    kernel: Kernel

    def range(self, first: int, values_Bn: Tensor) -> None:
        """Consecutive entries from `first` on."""
        if self.kernel == "triton":
            start, skip = divmod(first, BLOCK_ROWS)
            stop = -(-(first + values_Bn.shape[1]) // BLOCK_ROWS)
            self._fused(values_Bn, skip, torch.arange(start, stop, device=self.state.device))
        else:
            self._tiled(self._range_parts(first, values_Bn))

    def blocks(self, blocks_c: Tensor, values_Bn: Tensor) -> None:
        """All rows of some blocks; what is drawn is not kept."""
        if self.kernel == "triton":
            self._fused(values_Bn, 0, blocks_c)
        else:
            self._tiled(self._block_parts(blocks_c, values_Bn))

    def _fused(self, values_Bn: Tensor, skip: int, blocks_c: Tensor) -> None:
        from trak.projection.kernels.triton import add_by_triton

        add_by_triton(
            self.target_BK,
            values_Bn,
            skip=skip,
            entries=self.entries,
            key=self.state.keys[self.name],
            blocks_c=blocks_c,
            scale=1 / sqrt(self.target_BK.shape[1]),
        )

    def _tiled(self, parts: Iterator[Part]) -> None:
        scale = 1 / sqrt(self.target_BK.shape[1])
        if self.kernel == "digits":
            add_by_digits(self.target_BK, parts, scale)
        elif self.kernel == "tables":
            add_by_tables(self.target_BK, parts, scale)
        else:
            add_by_matmul(self.target_BK, parts, self.entries, scale)

    def _draw(self, blocks_c: Tensor) -> Tensor:
        key = self.state.keys[self.name]
        return self.entries.draw(key, blocks_c, self.target_BK.shape[1], self.state.dtype)

    def _range_parts(self, first: int, values_Bn: Tensor) -> Iterator[Part]:
        step = tile_rows(self.target_BK.shape[1])
        blocks = -(-prod(self.state.shapes[self.name]) // BLOCK_ROWS)
        stop = first + values_Bn.shape[1]
        for index in range(first // step, -(-stop // step)):
            start = index * step

            def draw(start: int = start) -> tuple[Tensor]:
                last = min((start + step) // BLOCK_ROWS, blocks)
                return (self._draw(torch.arange(start // BLOCK_ROWS, last, device=self.state.device)),)

            (kept,) = self.state.cache.get(self.name, index, draw)
            low, high = max(first, start), min(stop, start + step)
            yield Part(values_Bn[:, low - first : high - first], low - start, kept)

    def _block_parts(self, blocks_c: Tensor, values_Bn: Tensor) -> Iterator[Part]:
        step = tile_rows(self.target_BK.shape[1])
        for start in range(0, values_Bn.shape[1], step):
            kept = self._draw(blocks_c[start // BLOCK_ROWS : (start + step) // BLOCK_ROWS])
            yield Part(values_Bn[:, start : start + step], 0, kept)


def _whole_blocks(rows_u: Tensor, values_BuC: Tensor) -> tuple[Tensor, Tensor]:
    """(blocks [c] int64, gradients [B, 128·c]): rows of a table as blocks of the matrix that they touch.

    A block that several rows touch is there once on a CPU; a GPU, which would be waited for, has it once for each of them.
    """
    batch_size, _, width = values_BuC.shape
    blocks_um, offset_u = blocks_of_rows(rows_u, width)
    if blocks_um.shape[1] * BLOCK_ROWS == width:
        return blocks_um.flatten(), values_BuC.flatten(1)
    entry_uC = offset_u[:, None] + torch.arange(width, device=rows_u.device)
    if rows_u.device.type == "cpu":
        blocks_c, number_uC = torch.unique(blocks_um.gather(1, entry_uC // BLOCK_ROWS), return_inverse=True)
    else:
        blocks_c = blocks_um.flatten()
        number_n = torch.arange(len(blocks_c), device=rows_u.device)
        number_uC = number_n.view_as(blocks_um).gather(1, entry_uC // BLOCK_ROWS)
    slot_uC = number_uC * BLOCK_ROWS + entry_uC % BLOCK_ROWS
    padded = values_BuC.new_zeros(batch_size, len(blocks_c) * BLOCK_ROWS)
    padded[:, slot_uC.flatten()] = values_BuC.flatten(1)
    return blocks_c, padded


def dense_matrix(state: DenseState, entries: Entries, name: str) -> Tensor:
    """[P_name, K of the state]: the whole matrix of one parameter, by the plainest way."""
    check_name(state.shapes, name)
    place = state.placements[name]
    size = prod(state.shapes[name])
    out_PK = torch.zeros(size, state.dim, dtype=state.dtype, device=state.device)
    if place.exact:
        out_PK[:, place.start : place.stop] = torch.eye(size, dtype=state.dtype, device=state.device)
    else:
        blocks_c = torch.arange(-(-size // BLOCK_ROWS), device=state.device)
        unscaled_PK = entries.reference(state.keys[name], blocks_c, place.width)[:size].to(state.dtype)
        out_PK[:, place.start : place.stop] = unscaled_PK / sqrt(place.width)
    return out_PK
