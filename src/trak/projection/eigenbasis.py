"""The leading entries of gradients in the eigenbasis of their Kronecker factors.

Legend: B examples, R rows and C columns of a parameter, k of its entries, K features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from trak.blocks import Block
from trak.projection.base import Columns, ProjectionState, Shapes
from trak.projection.checks import (
    check_add,
    check_integer,
    check_name,
    check_state_options,
    require_state,
    resolve_device,
)
from trak.projection.entries import Entries
from trak.projection.factors import Factors, matrix_shape
from trak.projection.fitted import FittedProjection, require_factors
from trak.projection.layout import check_shapes
from trak.projection.leading import largest
from trak.projection.pieces import upcast

CANDIDATES = 4
"""Times K: entries whose mean squares are measured. The largest products of K-FAC miss two in a thousand that count (design/whitening.md)."""


@dataclass(frozen=True, eq=False)
class Chosen:
    """The entries of one parameter that are kept.

    Attributes:
        entries: which.
        feature_k: each one's column of the feature matrix.
        scale_k: what it is multiplied by.
    """

    entries: Entries
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
    is lost is what is cut off. Where entries are cut off, λ is at least the smallest Λ that is kept: less would make what is kept all alike
    where a parameter's mean is that of many entries which are nearly 0. With all entries kept, inner products of whitened features are those
    of EK-FAC influence.

    Factors are fitted to `sample` training rows at each checkpoint, which takes two passes over those, and kept in the store. They hold
    R² + C² + R·C numbers for every parameter; a state holds the eigenvectors that its entries use. Eigenvectors differ between machines
    (in sign, and at will where eigenvalues are equal), so features can be compared with others only where they were made with the
    same kept factors.

    Args:
        dim: K, at least 1; a K larger than the number of parameters P gives P columns.
        whitening: λ over the mean of the parameter's Λ; None does not divide.
        factors: "ekfac", Λ as measured for the 4 K entries with the largest products, or "kfac", the product of the two factors' eigenvalues.
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

    @property
    def candidates(self) -> int:
        """Four times K."""
        return CANDIDATES * self.dim

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
        values_P = torch.cat([factors[name].eigenvalues.flatten().cpu() for name in shapes])
        leading_K = largest(values_P, dim)
        # Where nothing is cut off there is no smallest one to speak of.
        least = float(values_P[leading_K[-1]]) if dim < len(values_P) else 0.0
        chosen, first = {}, 0
        for name in shapes:
            size = factors[name].eigenvalues.numel()
            own_k = ((leading_K >= first) & (leading_K < first + size)).nonzero().squeeze(1)
            if len(own_k):
                order_k = leading_K[own_k].argsort()
                flat_k, feature_k = (leading_K[own_k] - first)[order_k].to(device), own_k[order_k].to(device)
                own = factors[name].to(device, dtype)
                scale_k = own.scale(self.whitening, least=least).flatten()[flat_k]
                chosen[name] = Chosen(Entries.of(own, flat_k), feature_k, scale_k)
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
        for examples, picked_Bk in chosen.entries.pieces(block):
            out_BK[examples, chosen.feature_k] += picked_Bk * chosen.scale_k

    def matrix(self, state: ProjectionState, name: str) -> Tensor:
        """The dense [P_name, K] matrix of one parameter: entry (r·C + c, j) is U[r, r_j] V[c, c_j] scale_j."""
        state = require_state(self, state, EigenbasisState)
        check_name(state.shapes, name)
        out_PK = torch.zeros(prod(state.shapes[name]), state.dim, dtype=state.dtype, device=state.device)
        if name in state.chosen:
            chosen = state.chosen[name]
            entries = chosen.entries
            rows, columns = matrix_shape(state.shapes[name])
            rows_Rk = entries.rows.dense(rows, out_PK)[:, entries.row_k]
            columns_Ck = entries.columns.dense(columns, out_PK)[:, entries.column_k]
            products_RCk = rows_Rk[:, None] * columns_Ck[None]
            out_PK[:, chosen.feature_k] = products_RCk.flatten(0, 1) * chosen.scale_k
        return out_PK

    def fingerprint(self) -> dict[str, Any]:
        """What decides the numbers, but for the factors."""
        return {**super().fingerprint(), "dim": self.dim}
