"""Some entries of a parameter's gradients in its eigenbasis.

Legend: B examples, T positions, R rows and C columns of a parameter as a matrix, a and b of its eigenvectors, k entries, H hits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from trak.blocks import Block, IndexBlock, OuterBlock
from trak.projection.factors import Factors
from trak.projection.turning import Side, example_pieces, pick


@dataclass(frozen=True, eq=False)
class Entries:
    """Entries of UᵀMV, sorted by row.

    Attributes:
        flat_k: their places in [R, C], row by row, ascending.
        rows, columns: the coordinates that occur.
        row_k, column_k: each entry's place among them.
    """

    flat_k: Tensor
    rows: Side
    columns: Side
    row_k: Tensor
    column_k: Tensor

    @classmethod
    def of(cls, factors: Factors, flat_k: Tensor) -> Entries:
        """Those at `flat_k`, int64 [k] ascending, on the factors' device."""
        height, width = factors.eigenvalues.shape
        rows_a, row_k = torch.unique(flat_k // width, return_inverse=True)
        columns_b, column_k = torch.unique(flat_k % width, return_inverse=True)
        rows, columns = Side.of(factors.rows, height, rows_a), Side.of(factors.columns, width, columns_b)
        return cls(flat_k, rows, columns, row_k, column_k)

    def __len__(self) -> int:
        return len(self.flat_k)

    def pieces(self, block: Block) -> Iterator[tuple[slice, Tensor]]:
        """(examples, the entries [b, k] of their gradients)."""
        if isinstance(block, IndexBlock) and not self.rows.is_turned:
            yield slice(None), self._of_table(block)
            return
        positions = block.left.shape[2] if isinstance(block, OuterBlock) else 1
        held = max(prod(block.shape), positions * len(self))
        for examples, piece in example_pieces(block, held):
            yield examples, pick(piece, self.rows, self.columns, self.row_k, self.column_k)

    def _of_table(self, block: IndexBlock) -> Tensor:
        """Of an embedding whose rows are not turned, [B, k]: only positions whose row has an entry are looked at."""
        right_BTb = self.columns.of_values(block.values)
        rows_a = self.rows.index
        if rows_a is None:
            rows_a = torch.arange(self.rows.width, device=block.indices.device)
        place_BT = torch.searchsorted(rows_a, block.indices).clamp_max(len(rows_a) - 1)
        example_H, position_H = (rows_a[place_BT] == block.indices).nonzero(as_tuple=True)
        count_a = torch.bincount(self.row_k, minlength=len(rows_a))
        place_H = place_BT[example_H, position_H]
        count_H = count_a[place_H]
        # Each hit with each entry of its row; entries are sorted by row.
        hit_n = torch.repeat_interleave(count_H)
        nth_n = torch.arange(len(hit_n), device=hit_n.device) - (count_H.cumsum(0) - count_H)[hit_n]
        entry_n = (count_a.cumsum(0) - count_a)[place_H[hit_n]] + nth_n
        values_n = right_BTb[example_H[hit_n], position_H[hit_n], self.column_k[entry_n]]
        out_Bk = right_BTb.new_zeros(len(right_BTb), len(self))
        return out_Bk.index_put_((example_H[hit_n], entry_n), values_n, accumulate=True)
