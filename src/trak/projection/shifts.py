"""Where the entries of a sparse matrix go: blocks of consecutive entries, each moved as one.

Legend: n entries, s non-zeros per entry (one in each group of columns), L entries in a block, m blocks in a
superblock, q superblocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from trak.projection.philox import BLOCK_ROWS, Key, blocks_of_rows, draw_words
from trak.projection.signs import draw_packed_signs, unpack_signs

SUPERBLOCK_ENTRIES = 1 << 13
"""Most entries in a superblock of more than one block."""

SUPERBLOCKS = 16
"""Fewest superblocks of a parameter whose superblocks have more than one block."""


@dataclass(frozen=True)
class Shifts:
    """Columns and signs of one parameter's entries.

    The K columns are cut into s groups, group t from floor(t·K / s) on, and the entries into blocks of L = floor(K / s) consecutive
    ones (the last may be shorter). In each group a block has one shift: entry o of block b goes to place
    (o + shift) mod K_t of the K_t places in group t. Entries of one block thus never meet, and those of two blocks meet with
    probability 1 / K_t, since the shifts of two blocks differ by a uniform number:

        shift = x(b div m) + y(b mod m),    x(q) = word 0 of (q, t) · K_t div 2^32,    y(j) = word 1 of (j, t) · K_t div 2^32

    (uneven by less than K_t / 2^32), where m = min(8192 div L, blocks div 16), at least 1, and the words are of counter (a, b) with
    `shift_key`. The sign in group t is that of row `entry` and column t of `signs`, with `sign_key`.

    Attributes:
        sign_key: of the signs.
        shift_key: of the shifts.
        size: entries of the parameter.
        columns: K, of the parameter's placement.
        nonzeros: s, at most K.
    """

    sign_key: Key
    shift_key: Key
    size: int
    columns: int
    nonzeros: int

    @cached_property
    def length(self) -> int:
        """L: entries in a block."""
        return self.columns // self.nonzeros

    @cached_property
    def blocks(self) -> int:
        """Blocks of the parameter."""
        return -(-self.size // self.length)

    @cached_property
    def lanes(self) -> int:
        """m: blocks in a superblock."""
        return max(1, min(SUPERBLOCK_ENTRIES // self.length, self.blocks // SUPERBLOCKS))

    @cached_property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """(first column, columns) of each group."""
        return tuple((first, stop - first) for first, stop in pairwise(self._bounds("cpu").tolist()))

    @cached_property
    def outer_sq(self) -> Tensor:
        """x(q) of each group and superblock, int64 [s, q], on the CPU."""
        return self._draw_shifts(0, -(-self.blocks // self.lanes))

    @cached_property
    def inner_sm(self) -> Tensor:
        """y(j) of each group and block of a superblock, int64 [s, m], on the CPU."""
        return self._draw_shifts(1, self.lanes)

    @cached_property
    def moves_sn(self) -> Tensor:
        """Shift of each block in each group, below the columns of the group: int64 [s, blocks], on the CPU."""
        return self._shifts_of(torch.arange(self.blocks)) % self._bounds("cpu").diff()[:, None]

    def signs(self, first: int, stop: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """±1 [s, n] of consecutive entries."""
        start = first // BLOCK_ROWS
        packed = self.packed_signs(start, -(-stop // BLOCK_ROWS), device)
        return unpack_signs(packed, dtype).T[:, first - start * BLOCK_ROWS : stop - start * BLOCK_ROWS]

    def packed_signs(self, start: int, stop: int, device: torch.device | str) -> Tensor:
        """Signs of consecutive blocks of 128 entries, one bit each: uint8 [s, 16 · (stop − start)]."""
        return draw_packed_signs(self.sign_key, torch.arange(start, stop, device=device), self.nonzeros)

    def draw_range(self, first: int, stop: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Columns [s, n] int64 and signs ±1 [s, n] int8 of consecutive entries."""
        entries_n = torch.arange(first, stop, device=device)
        return self._columns(entries_n), self.signs(first, stop, torch.int8, device)

    def draw_rows(self, rows_u: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Columns [s, u · width] int64 and signs ±1 [s, u · width] int8 of any rows of so many entries, wherever they stand."""
        blocks_um, offset_u = blocks_of_rows(rows_u, width)
        packed_sW = draw_packed_signs(self.sign_key, blocks_um.flatten(), self.nonzeros)
        drawn_suE = unpack_signs(packed_sW, torch.int8).T.reshape(
            self.nonzeros, len(rows_u), blocks_um.shape[1] * BLOCK_ROWS
        )
        column_C = torch.arange(width, device=rows_u.device)
        place_suC = (offset_u[:, None] + column_C).expand(self.nonzeros, -1, -1)
        entries_n = (rows_u[:, None] * width + column_C).flatten()
        return self._columns(entries_n), drawn_suE.gather(2, place_suC).flatten(1)

    def _columns(self, entries_n: Tensor) -> Tensor:
        """Columns of any entries in each group: int64 [s, n]."""
        places_sn = entries_n % self.length + self._shifts_of(entries_n // self.length)
        bounds_s1 = self._bounds(entries_n.device)[:, None]
        return places_sn % bounds_s1.diff(dim=0) + bounds_s1[:-1]

    def _shifts_of(self, blocks_n: Tensor) -> Tensor:
        """Shifts of any blocks, not below the columns of the group yet: int64 [s, n]. A table of all blocks may be as long as the parameter."""
        outer_sq, inner_sm = self._on(blocks_n.device)
        return outer_sq[:, blocks_n // self.lanes] + inner_sm[:, blocks_n % self.lanes]

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """X and y on a device, where they stay: a copy of each batch's own would wait for the work before it."""
        if device not in self._copies:
            self._copies[device] = (self.outer_sq.to(device), self.inner_sm.to(device))
        return self._copies[device]

    @cached_property
    def _copies(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}

    def _bounds(self, device: torch.device | str) -> Tensor:
        """First column of each group, and K: int64 [s + 1]."""
        return torch.arange(self.nonzeros + 1, device=device) * self.columns // self.nonzeros

    def _draw_shifts(self, word: int, count: int) -> Tensor:
        words_ns = draw_words(self.shift_key, torch.arange(count), self.nonzeros)[word]
        return words_ns.T * self._bounds("cpu").diff()[:, None] >> 32
