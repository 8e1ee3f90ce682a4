"""The leading entries of gradients in the eigenbasis of their Kronecker factors.

Legend: B examples, T positions, R rows and C columns of a parameter, a and b of its eigenvectors, k of its entries, K features, H hits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from trak.blocks import Block, IndexBlock, OuterBlock
from trak.projection.base import Columns, ProjectionState, Shapes
from trak.projection.checks import (
    check_add,
    check_integer,
    check_name,
    check_state_options,
    require_state,
    resolve_device,
)
from trak.projection.factors import Factors, matrix_shape
from trak.projection.fitted import FittedProjection, require_factors
from trak.projection.layout import check_shapes
from trak.projection.pieces import upcast
from trak.projection.turning import Side, example_pieces, pick


@dataclass(frozen=True, eq=False)
class Chosen:
    """The entries of one parameter that are kept, sorted by row.

    Attributes:
        rows, columns: the coordinates that occur, a and b of them.
        row_k, column_k: each entry's place among them.
        feature_k: its column of the feature matrix.
        scale_k: what it is multiplied by.
    """

    rows: Side
    columns: Side
    row_k: Tensor
    column_k: Tensor
    feature_k: Tensor
    scale_k: Tensor


@dataclass(frozen=True, eq=False)
class EigenbasisState(ProjectionState):
    """The kept entries of every parameter that has any."""

    chosen: Mapping[str, Chosen]


@dataclass(frozen=True)
class Eigenbasis(FittedProjection):
    """The K entries of UᵀMV with the largest mean squares Λ, divided by sqrt(Λ + λ): gradients in their EK-FAC eigenbasis, cut off.

    M [R, C] is a parameter's gradient as a matrix, U and V the eigenvectors of its Kronecker factors, Λ [R, C] the mean squares of UᵀMV
    (`trak.projection.factors`); entries of all parameters compete, and the features are in descending order of Λ. Nothing is random: what
    is lost is what is cut off. With all entries kept, inner products of whitened features are those of EK-FAC influence.

    Factors are fitted to `sample` training rows at each checkpoint, which takes two passes over those, and kept in the store. They hold
    R² + C² + R·C numbers for every parameter; a state holds the eigenvectors that its entries use. Eigenvectors differ between machines
    (in sign, and at will where eigenvalues are equal), so features can be compared with others only where they were made with the
    same kept factors.

    Args:
        dim: K, at least 1; a K larger than the number of parameters P gives P columns.
        whitening: λ over the mean of the parameter's Λ; None does not divide.
        factors: "ekfac", Λ as measured, or "kfac", the product of the two factors' eigenvalues.
        sample: training rows that factors are fitted to, one drawn from each of so many equal parts of the training set; None for all.
        largest_side: a side of a parameter longer than that is not turned.
    """

    dim: int = 4096

    def __post_init__(self) -> None:
        check_integer("dim", self.dim, at_least=1)
        super().__post_init__()

    @property
    def kind(self) -> str:
        """`"eigenbasis"`."""
        return "eigenbasis"

    def columns(self, shapes: Shapes) -> tuple[Columns, ...]:
        """One entry "all": which layer an entry comes from differs between checkpoints."""
        check_shapes(shapes)
        return (Columns("all", 0, min(self.dim, sum(prod(shape) for shape in shapes.values()))),)

    def init(
        self,
        shapes: Shapes,
        *,
        checkpoint: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        factors: Mapping[str, Factors] | None = None,
    ) -> EigenbasisState:
        """Choose the entries.

        Raises:
            ProjectionError: no parameters, no factors or those of others, or sums in a dtype other than float32 and float64.
        """
        check_state_options(checkpoint, dtype)
        dim = self.output_dim(shapes)
        factors = require_factors(self, factors, shapes)
        device = resolve_device(device)
        leading_K = largest(torch.cat([factors[name].eigenvalues.flatten().cpu() for name in shapes]), dim)
        chosen, first = {}, 0
        for name in shapes:
            size = factors[name].eigenvalues.numel()
            own_k = ((leading_K >= first) & (leading_K < first + size)).nonzero().squeeze(1)
            if len(own_k):
                chosen[name] = self._choose(
                    factors[name].to(device, dtype), leading_K[own_k] - first, own_k, device
                )
            first += size
        return EigenbasisState(dict(shapes), checkpoint, dim, device, dtype, chosen)

    def add(self, state: ProjectionState, block: Block, out_BK: Tensor) -> None:
        """Add the kept entries of UᵀMV of one block of one batch to `out`."""
        state = require_state(self, state, EigenbasisState)
        check_add(state, block, out_BK)
        chosen = state.chosen.get(block.name)
        if chosen is None:
            return
        block = upcast(block, state.dtype)
        if isinstance(block, IndexBlock) and not chosen.rows.is_turned:
            _add_table(block, chosen, out_BK)
            return
        positions = block.left.shape[2] if isinstance(block, OuterBlock) else 1
        entries = max(prod(block.shape), positions * len(chosen.row_k))
        for examples, piece in example_pieces(block, entries):
            picked_Bk = pick(piece, chosen.rows, chosen.columns, chosen.row_k, chosen.column_k)
            out_BK[examples, chosen.feature_k] += picked_Bk * chosen.scale_k

    def matrix(self, state: ProjectionState, name: str) -> Tensor:
        """The dense [P_name, K] matrix of one parameter: entry (r·C + c, j) is U[r, r_j] V[c, c_j] scale_j."""
        state = require_state(self, state, EigenbasisState)
        check_name(state.shapes, name)
        out_PK = torch.zeros(prod(state.shapes[name]), state.dim, dtype=state.dtype, device=state.device)
        if name in state.chosen:
            chosen = state.chosen[name]
            rows, columns = matrix_shape(state.shapes[name])
            rows_Rk = chosen.rows.dense(rows, out_PK)[:, chosen.row_k]
            columns_Ck = chosen.columns.dense(columns, out_PK)[:, chosen.column_k]
            products_RCk = rows_Rk[:, None] * columns_Ck[None]
            out_PK[:, chosen.feature_k] = products_RCk.flatten(0, 1) * chosen.scale_k
        return out_PK

    def fingerprint(self) -> dict[str, Any]:
        """What decides the numbers, but for the factors."""
        return {**super().fingerprint(), "dim": self.dim}

    def _choose(self, factors: Factors, entries_k: Tensor, feature_k: Tensor, device: torch.device) -> Chosen:
        order_k = entries_k.argsort()
        entries_k, feature_k = entries_k[order_k].to(device), feature_k[order_k].to(device)
        width = factors.eigenvalues.shape[1]
        rows_a, row_k = torch.unique(entries_k // width, return_inverse=True)
        columns_b, column_k = torch.unique(entries_k % width, return_inverse=True)
        scale_k = factors.scale(self.whitening).flatten()[entries_k]
        rows = Side.of(factors.rows, factors.eigenvalues.shape[0], rows_a)
        columns = Side.of(factors.columns, width, columns_b)
        return Chosen(rows, columns, row_k, column_k, feature_k, scale_k)


def largest(values_P: Tensor, count: int) -> Tensor:
    """Positions of the largest values in descending order, the first of equal ones first, int64 [count]."""
    least = values_P.topk(count).values[-1]
    candidates_C = (values_P >= least).nonzero().squeeze(1)
    return candidates_C[values_P[candidates_C].sort(descending=True, stable=True).indices[:count]]


def _add_table(block: IndexBlock, chosen: Chosen, out_BK: Tensor) -> None:
    """An embedding whose rows are not turned: only positions whose row has kept entries are looked at."""
    right_BTb = chosen.columns.of_values(block.values)
    rows_a = chosen.rows.index
    if rows_a is None:
        rows_a = torch.arange(chosen.rows.width, device=out_BK.device)
    place_BT = torch.searchsorted(rows_a, block.indices).clamp_max(len(rows_a) - 1)
    example_H, position_H = (rows_a[place_BT] == block.indices).nonzero(as_tuple=True)
    count_a = torch.bincount(chosen.row_k, minlength=len(rows_a))
    place_H = place_BT[example_H, position_H]
    count_H = count_a[place_H]
    # Each hit with each entry of its row; entries are sorted by row.
    hit_n = torch.repeat_interleave(count_H)
    nth_n = torch.arange(len(hit_n), device=out_BK.device) - (count_H.cumsum(0) - count_H)[hit_n]
    entry_n = (count_a.cumsum(0) - count_a)[place_H[hit_n]] + nth_n
    values_n = (
        right_BTb[example_H[hit_n], position_H[hit_n], chosen.column_k[entry_n]] * chosen.scale_k[entry_n]
    )
    out_BK.index_put_((example_H[hit_n], chosen.feature_k[entry_n]), values_n, accumulate=True)
