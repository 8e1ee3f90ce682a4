"""The leading entries of gradients in the eigenbasis of their Kronecker factors.

Legend: B examples, R rows and C columns of a parameter, k of its entries, K features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from trak.blocks import Block, upcast
from trak.errors import ProjectionError
from trak.projection.base import Columns, ProjectionState, Shapes
from trak.projection.checks import (
    check_add,
    check_integer,
    check_name,
    check_state_options,
    require_state,
    resolve_device,
)
from trak.projection.entries import Entries, Leading, leading_from_tensors, leading_to_tensors
from trak.projection.factors import Factors, matrix_shape
from trak.projection.fitted import FittedProjection, require_factors
from trak.projection.layout import check_shapes
from trak.projection.leading import largest

CANDIDATES = 4
"""Times K: entries whose mean squares are measured. The largest products of K-FAC miss two in a thousand that count (design/whitening.md)."""


@dataclass(frozen=True, eq=False)
class EigenbasisState(ProjectionState):
    """The kept entries of every parameter that has any."""

    chosen: Mapping[str, Leading]


@dataclass(frozen=True)
class Eigenbasis(FittedProjection):
    """The K entries of UᵀMV with the largest mean squares Λ: gradients in their EK-FAC eigenbasis, cut off.

    M [R, C] is a parameter's gradient as a matrix, U and V the eigenvectors of its Kronecker factors, Λ [R, C] the mean squares of UᵀMV
    (`trak.projection.factors`); entries of all parameters compete, and the features are in descending order of Λ. Nothing is random: what
    is lost is what is cut off. Entries are nearly uncorrelated, which the damping that "auto" stands for here makes use of
    (`trak.MarquardtDamping`).

    `whitening` divides by sqrt(Λ + λ) as well: with all entries kept, inner products of features are then those of EK-FAC influence. Where
    entries are cut off, λ is at least the smallest Λ that is kept: less would make what is kept all alike where a parameter's mean is that of many
    entries which are nearly 0.

    Factors are fitted to `sample` training rows at each checkpoint, which takes two passes over those, about three plain forward and backward
    passes altogether (docs/performance.md), and R² + C² + 2 R·C numbers for every parameter at that time. The store and a state hold the kept
    entries and the eigenvectors that they use. Eigenvectors differ between machines (in sign, and at will where eigenvalues are equal), so
    features can be compared with others only where they were made with the same kept entries.

    Args:
        dim: K, at least 1; a K larger than the number of parameters P gives P columns.
        whitening: λ over the mean of the parameter's Λ; None, the default, does not divide.
        factors: "ekfac", Λ as measured for the 4 K entries with the largest products, or "kfac", the product of the two factors' eigenvalues.
        sample: training rows that factors are fitted to, one drawn from each of so many equal parts of the training set; None for all.
        largest_side: a side of a parameter longer than that is not turned.
    """

    dim: int = 4096
    whitening: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_integer("dim", self.dim, at_least=1)
        super().__post_init__()

    @property
    def kind(self) -> str:
        """`"eigenbasis"`."""
        return "eigenbasis"

    @property
    def version(self) -> int:
        """Version of how factors are fitted, used and kept."""
        return 3

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
        factors: Mapping[str, Factors | Leading] | None = None,
    ) -> EigenbasisState:
        """Choose the entries, unless `factors` are entries that were chosen before.

        Raises:
            ProjectionError: no parameters, no factors or those of others, or sums in a dtype other than float32 and float64.
        """
        check_state_options(checkpoint, dtype)
        dim = self.output_dim(shapes)
        device = resolve_device(device)
        chosen = {
            name: own.to(device, dtype)
            for name, own in self.leading(shapes, factors).items()
            if len(own.entries)
        }
        return EigenbasisState(dict(shapes), checkpoint, dim, device, dtype, chosen)

    def leading(
        self, shapes: Shapes, factors: Mapping[str, Factors | Leading] | None
    ) -> Mapping[str, Leading]:
        """The entries of every parameter that are kept, none of some: those with the largest Λ; as they are where they were chosen before.

        Raises:
            ProjectionError: no factors, those of others, or entries that were chosen for another K.
        """
        leading = {name: own for name, own in (factors or {}).items() if isinstance(own, Leading)}
        if not leading:
            return self._choose(shapes, require_factors(self, factors, shapes))
        sizes = {name: own.size for name, own in leading.items()}
        count = sum(len(own.entries) for own in leading.values())
        expected = {name: matrix_shape(shape) for name, shape in shapes.items()}
        if sizes != expected or count != self.output_dim(shapes):
            raise ProjectionError(
                f"kept entries are {count} of {len(sizes)} parameters, expected {self.output_dim(shapes)} of {len(expected)} for {self!r}: fit "
                "factors for this model and this projection"
            )
        return leading

    def _choose(self, shapes: Shapes, factors: Mapping[str, Factors]) -> dict[str, Leading]:
        dim = self.output_dim(shapes)
        values_P = torch.cat([factors[name].eigenvalues.flatten().cpu() for name in shapes])
        leading_K = largest(values_P, dim)
        # Where nothing is cut off there is no smallest one to speak of.
        least = float(values_P[leading_K[-1]]) if dim < len(values_P) else 0.0
        chosen, first = {}, 0
        for name, shape in shapes.items():
            own, size = factors[name], prod(shape)
            own_k = ((leading_K >= first) & (leading_K < first + size)).nonzero().squeeze(1)
            order_k = leading_K[own_k].argsort()
            feature_k, flat_k = own_k[order_k], (leading_K[own_k] - first)[order_k]
            flat_k, feature_k = flat_k.to(own.eigenvalues.device), feature_k.to(own.eigenvalues.device)
            scale_k = own.scale(self.whitening, least=least).flatten()[flat_k]
            chosen[name] = Leading(Entries.of(own, flat_k), feature_k, scale_k, matrix_shape(shape))
            first += size
        return chosen

    def to_keep(self, shapes: Shapes, factors: Mapping[str, Factors]) -> dict[str, Tensor]:
        """The kept entries' places, columns and scale, and the eigenvectors that they use.

        Raises:
            ProjectionError: factors of other parameters.
        """
        return leading_to_tensors(self.leading(shapes, factors))

    def from_kept(self, shapes: Shapes, tensors: Mapping[str, Tensor]) -> dict[str, Leading]:
        """The kept entries.

        Raises:
            ProjectionError: they belong to other parameters, or were kept by another kind.
        """
        return leading_from_tensors(tensors, shapes)

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
