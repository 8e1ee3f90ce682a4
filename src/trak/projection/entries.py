"""Some entries of a parameter's gradients in its eigenbasis.

Legend: B examples, T positions, R rows and C columns of a parameter as a matrix, a and b of its eigenvectors, k entries, H hits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from trak.blocks import Block, IndexBlock, OuterBlock
from trak.errors import ProjectionError
from trak.projection.base import Shapes
from trak.projection.factors import Factors, matrix_shape
from trak.projection.turning import (
    Side,
    example_pieces,
    is_outer,
    multiplications,
    outer,
    pick,
    positions_of,
)

GROUP_ROWS = 8
"""Rows of UᵀM that are multiplied at once by the columns of V that any of them needs."""


@dataclass(frozen=True, eq=False)
class RowGroup:
    """Entries in some rows that follow one another.

    Attributes:
        rows, entries: which.
        columns: those that occur, int64 [c].
        place_k: each entry's place in [rows, c], row by row.
    """

    rows: slice
    entries: slice
    columns: Tensor
    place_k: Tensor

    @property
    def area(self) -> int:
        """Rows times columns."""
        return (self.rows.stop - self.rows.start) * len(self.columns)


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
        (rows_a, row_k), (columns_b, column_k) = _places(flat_k, width)
        rows, columns = Side.of(factors.rows, height, rows_a), Side.of(factors.columns, width, columns_b)
        return cls(flat_k, rows, columns, row_k, column_k)

    @classmethod
    def used(
        cls, size: tuple[int, int], flat_k: Tensor, rows_Ra: Tensor | None, columns_Cb: Tensor | None
    ) -> Entries:
        """The same of a parameter R × C with those eigenvectors alone that its entries use, None for a side that is not turned."""
        (rows_a, row_k), (columns_b, column_k) = _places(flat_k, size[1])
        rows, columns = Side.used(rows_Ra, size[0], rows_a), Side.used(columns_Cb, size[1], columns_b)
        return cls(flat_k, rows, columns, row_k, column_k)

    def __len__(self) -> int:
        return len(self.flat_k)

    def pieces(self, block: Block) -> Iterator[tuple[slice, Tensor]]:
        """(examples, the entries [b, k] of their gradients)."""
        if isinstance(block, IndexBlock) and not self.rows.is_turned:
            yield slice(None), self._of_table(block)
            return
        positions = positions_of(block) if is_outer(block) else 1
        held = max(prod(block.shape), positions * max(len(self), block.matrix_shape[1]))
        goes_by_rows = self._goes_by_rows(block)
        for examples, piece in example_pieces(block, held):
            if goes_by_rows:
                yield examples, self._by_rows(outer(piece))
            else:
                yield examples, pick(piece, self.rows, self.columns, self.row_k, self.column_k)

    def _goes_by_rows(self, block: Block) -> bool:
        """Whether a few rows of UᵀM, each with those columns of V that it needs, take fewer multiplications than all of them with all."""
        # Elsewhere many small products are slower than a large one.
        if self.flat_k.device.type != "cpu" or not is_outer(block):
            return False
        if not (self.rows.is_turned and self.columns.is_turned):
            return False
        (length, width), positions = block.matrix_shape, positions_of(block)
        whole = multiplications(block, self.rows, self.columns, len(self))
        turned = positions * self.rows.width * (length + width)
        # Small products and the patches of a convolution are slower: it has to be a third less. Groups are not looked for where they cannot help.
        return (
            3 * turned < 2 * whole and 3 * (turned + width * sum(one.area for one in self.groups)) < 2 * whole
        )

    def _by_rows(self, block: OuterBlock) -> Tensor:
        """Entries [B, k] of gradients: UᵀM [B, a, C], and of each group of its rows the products with some columns of V."""
        turned_BaC = self.rows.of_rows(block.left[:, 0].transpose(1, 2)) @ block.right[:, 0]
        columns_bC = self.columns.factor.turned
        assert columns_bC is not None
        picked_Bk = turned_BaC.new_empty(len(turned_BaC), len(self))
        for group in self.groups:
            products_Brc = turned_BaC[:, group.rows] @ columns_bC[group.columns].T
            picked_Bk[:, group.entries] = products_Brc.flatten(1)[:, group.place_k]
        return picked_Bk

    @cached_property
    def groups(self) -> tuple[RowGroup, ...]:
        """The entries by groups of rows: the largest ones are a staircase, with many columns in the first rows only."""
        width, count = self.columns.width, -(-self.rows.width // GROUP_ROWS)
        group_k = self.row_k // GROUP_ROWS
        keys_n, place_k = torch.unique(group_k * width + self.column_k, return_inverse=True)
        edges_g = torch.arange(count + 1, device=keys_n.device)
        edges = torch.searchsorted(keys_n, edges_g * width).tolist()
        entry_edges = torch.searchsorted(group_k, edges_g).tolist()
        groups = []
        for index in range(count):
            first_row, start, stop = index * GROUP_ROWS, edges[index], edges[index + 1]
            own = slice(entry_edges[index], entry_edges[index + 1])
            rows = slice(first_row, min(first_row + GROUP_ROWS, self.rows.width))
            place = (self.row_k[own] - first_row) * (stop - start) + place_k[own] - start
            groups.append(RowGroup(rows, own, keys_n[start:stop] - index * width, place))
        return tuple(groups)

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


@dataclass(frozen=True, eq=False)
class Leading:
    """The entries of one parameter that a projection keeps: all that is needed of its factors, and what the store holds.

    Attributes:
        entries: which, with the eigenvectors that they use.
        feature_k: each one's column of the feature matrix, int64.
        scale_k: what it is multiplied by.
        size: (R, C).
    """

    entries: Entries
    feature_k: Tensor
    scale_k: Tensor
    size: tuple[int, int]

    def to(self, device: torch.device, dtype: torch.dtype) -> Leading:
        """The same on a device, in a dtype."""
        return Leading.of(
            {
                key: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
                for key, tensor in self.tensors().items()
            },
            self.size,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Itself as tensors: entries [k], features [k], scale [k], and of the sides that are turned rows [R, a] and columns [C, b]."""
        tensors = {"entries": self.entries.flat_k, "features": self.feature_k, "scale": self.scale_k}
        for side, of_side in (("rows", self.entries.rows), ("columns", self.entries.columns)):
            if of_side.vectors is not None:
                tensors[side] = of_side.vectors
        return tensors

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], size: tuple[int, int]) -> Leading:
        """Back from `tensors`."""
        entries = Entries.used(size, tensors["entries"], tensors.get("rows"), tensors.get("columns"))
        return cls(entries, tensors["features"], tensors["scale"], size)


def leading_to_tensors(leading: Mapping[str, Leading]) -> dict[str, Tensor]:
    """The kept entries of all parameters as named tensors, to be kept."""
    return {f"{key}:{name}": tensor for name, own in leading.items() for key, tensor in own.tensors().items()}


def leading_from_tensors(tensors: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Leading]:
    """Kept entries from what `leading_to_tensors` made of them.

    Raises:
        ProjectionError: they belong to other parameters.
    """
    leading = {}
    for name, shape in shapes.items():
        own = {
            key: tensors[f"{key}:{name}"]
            for key in ("entries", "features", "scale", "rows", "columns")
            if f"{key}:{name}" in tensors
        }
        size = matrix_shape(shape)
        _check_tensors(own, name, size)
        leading[name] = Leading.of(own, size)
    return leading


def _check_tensors(own: Mapping[str, Tensor], name: str, size: tuple[int, int]) -> None:
    if not {"entries", "features", "scale"} <= own.keys():
        raise ProjectionError(
            f"there are no kept entries of parameter {name!r}: they belong to other parameters, or were kept by another kind of projection"
        )
    heights = {side: len(own[side]) for side in ("rows", "columns") if side in own}
    expected = dict(zip(("rows", "columns"), size))
    too_large = len(own["entries"]) > 0 and int(own["entries"].max()) >= size[0] * size[1]
    if too_large or any(heights[side] != expected[side] for side in heights):
        raise ProjectionError(
            f"kept entries of parameter {name!r} have eigenvectors of lengths {heights}, expected {expected}: fit them for this model"
        )


def _places(flat_k: Tensor, width: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The rows that occur and each entry's place among them; the columns likewise."""
    rows_a, row_k = torch.unique(flat_k // width, return_inverse=True)
    columns_b, column_k = torch.unique(flat_k % width, return_inverse=True)
    return (rows_a, row_k), (columns_b, column_k)
