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

from trak.projection.philox import BLOCK_ROWS, Key, draw_words
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
        bounds = [index * self.columns // self.nonzeros for index in range(self.nonzeros + 1)]
        return tuple((first, stop - first) for first, stop in pairwise(bounds))

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
        return self._shifts_of(torch.arange(self.blocks)) % self._widths_s1("cpu")

    def signs(self, first: int, stop: int, dtype: torch.dtype) -> Tensor:
        """±1 [s, n] of consecutive entries, on the CPU."""
        start = first // BLOCK_ROWS
        packed = self.packed_signs(start, -(-stop // BLOCK_ROWS), "cpu")
        return unpack_signs(packed, dtype).T[:, first - start * BLOCK_ROWS : stop - start * BLOCK_ROWS]

    def packed_signs(self, start: int, stop: int, device: torch.device | str) -> Tensor:
        """Signs of consecutive blocks of 128 entries, one bit each: uint8 [s, 16 · (stop − start)]."""
        return draw_packed_signs(self.sign_key, torch.arange(start, stop, device=device), self.nonzeros)

    def draw(self, entries_n: Tensor) -> tuple[Tensor, Tensor]:
        """Columns [s, n] and signs ±1 [s, n], both int64, of any entries, wherever they stand."""
        # Consecutive entries, the usual ones, share their block of signs.
        blocks_c, block_n = torch.unique_consecutive(entries_n // BLOCK_ROWS, return_inverse=True)
        unpacked_sN = unpack_signs(draw_packed_signs(self.sign_key, blocks_c, self.nonzeros), torch.int64).T
        signs_sn = unpacked_sN[:, block_n * BLOCK_ROWS + entries_n % BLOCK_ROWS]
        places_sn = entries_n % self.length + self._shifts_of(entries_n // self.length)
        first_s1 = torch.tensor([[first] for first, _ in self.groups], device=entries_n.device)
        return places_sn % self._widths_s1(entries_n.device) + first_s1, signs_sn

    def _shifts_of(self, blocks_n: Tensor) -> Tensor:
        """Shifts of any blocks, not below the columns of the group yet: int64 [s, n]. A table of all blocks may be as long as the parameter."""
        outer_sq, inner_sm = self.outer_sq.to(blocks_n.device), self.inner_sm.to(blocks_n.device)
        return outer_sq[:, blocks_n // self.lanes] + inner_sm[:, blocks_n % self.lanes]

    def _widths_s1(self, device: torch.device | str) -> Tensor:
        return torch.tensor([[width] for _, width in self.groups], device=device)

    def _draw_shifts(self, word: int, count: int) -> Tensor:
        words_ns = draw_words(self.shift_key, torch.arange(count), self.nonzeros)[word]
        return words_ns.T * self._widths_s1("cpu") >> 32
