"""Another projection, of gradients that are whitened first.

Legend: B examples, R rows and C columns of a parameter as a matrix, K features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from trak.blocks import Block, DenseBlock, IndexBlock, upcast
from trak.errors import ProjectionError
from trak.projection.base import Columns, Projection, ProjectionState, Shapes
from trak.projection.checks import check_add, check_name, check_state_options, require_state, resolve_device
from trak.projection.entries import Leading
from trak.projection.factors import Factors, factors_from_tensors, factors_to_tensors, matrix_shape
from trak.projection.fitted import FittedProjection, require_factors
from trak.projection.turning import Side, example_pieces, full_sides, turn


@dataclass(frozen=True, eq=False)
class WhitenedState(ProjectionState):
    """The inner projection's state; of each parameter both bases and 1 / sqrt(Λ + λ) [R, C]."""

    inner: ProjectionState
    bases: Mapping[str, tuple[Side, Side, Tensor]]


@dataclass(frozen=True)
class Whitened(FittedProjection):
    """Pᵀ vec(UᵀMV / sqrt(Λ + λ)): gradients whitened by their Kronecker factors, then projected by another kind.

    M [R, C] is a parameter's gradient as a matrix, U, V and Λ are its factors (`trak.projection.factors`). With `Identity` inner products are
    those of EK-FAC influence, Σ gᵀ(F + λI)⁻¹g' with F = (U ⊗ V) Λ (U ⊗ V)ᵀ for each parameter. A random projection keeps them in
    expectation, with far more noise than it adds to plain gradients: `Eigenbasis` predicts retraining better with as many columns.

    Factors are fitted and kept as for `Eigenbasis`. A state holds R² + C² + R·C numbers for every parameter.

    Args:
        inner: an ordinary kind, such as `Sparse(4096)`.
        whitening: λ over the mean of the parameter's Λ.
        factors, sample, largest_side: as for `Eigenbasis`.
    """

    inner: Projection

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Projection) or isinstance(self.inner, FittedProjection):
            raise ProjectionError(
                f"Whitened takes an ordinary projection such as trak.Sparse(4096); got {self.inner!r}. The leading whitened entries are "
                "trak.Eigenbasis(4096)"
            )
        if self.whitening is None:
            raise ProjectionError("whitening must be a number ≥ 0; got None, which would whiten nothing")
        super().__post_init__()

    @property
    def kind(self) -> str:
        """`"whitened"`."""
        return "whitened"

    @property
    def version(self) -> int:
        """Version of how factors are fitted and used."""
        return 2

    @property
    def candidates(self) -> None:
        """None: every entry counts."""
        return None

    def columns(self, shapes: Shapes) -> tuple[Columns, ...]:
        """Those of the inner projection."""
        return self.inner.columns(shapes)

    def init(
        self,
        shapes: Shapes,
        *,
        checkpoint: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        factors: Mapping[str, Factors | Leading] | None = None,
    ) -> WhitenedState:
        """Draw the inner projection.

        Raises:
            ProjectionError: no factors or those of other parameters, or as for the inner kind.
        """
        check_state_options(checkpoint, dtype)
        factors = require_factors(self, factors, shapes)
        device = resolve_device(device)
        inner = self.inner.init(shapes, checkpoint=checkpoint, device=device, dtype=dtype)
        bases = {}
        for name in shapes:
            own = factors[name].to(device, dtype)
            bases[name] = (*full_sides(own), own.scale(self.whitening))
        return WhitenedState(dict(shapes), checkpoint, inner.dim, device, dtype, inner, bases)

    def to_keep(self, shapes: Shapes, factors: Mapping[str, Factors]) -> dict[str, Tensor]:
        """All of the factors.

        Raises:
            ProjectionError: factors of other parameters.
        """
        return factors_to_tensors(require_factors(self, factors, shapes))

    def from_kept(self, shapes: Shapes, tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
        """All of the factors.

        Raises:
            ProjectionError: they belong to other parameters, or are not whole.
        """
        return factors_from_tensors(tensors, shapes)

    def add(self, state: ProjectionState, block: Block, out_BK: Tensor) -> None:
        """Whiten one block of one batch, and have the inner projection add it to `out`."""
        state = require_state(self, state, WhitenedState)
        check_add(state, block, out_BK)
        rows, columns, scale_RC = state.bases[block.name]
        block = upcast(block, state.dtype)
        if isinstance(block, IndexBlock) and not rows.is_turned:
            values_BTC = columns.of_values(block.values) * scale_RC[block.indices]
            self.inner.add(state.inner, replace(block, values=values_BTC), out_BK)
            return
        for examples, piece in example_pieces(block, prod(block.shape)):
            whitened_BRC = turn(piece, rows, columns) * scale_RC
            values = whitened_BRC.reshape(-1, *block.shape)
            self.inner.add(state.inner, DenseBlock(block.name, block.shape, values), out_BK[examples])

    def matrix(self, state: ProjectionState, name: str) -> Tensor:
        """The dense [P_name, K] matrix of one parameter: (U ⊗ V) diag(scale) times the inner one."""
        state = require_state(self, state, WhitenedState)
        check_name(state.shapes, name)
        rows, columns, scale_RC = state.bases[name]
        size = matrix_shape(state.shapes[name])
        basis_PP = torch.kron(
            rows.dense(size[0], scale_RC).contiguous(), columns.dense(size[1], scale_RC).contiguous()
        )
        return basis_PP @ (scale_RC.reshape(-1, 1) * self.inner.matrix(state.inner, name))

    def fingerprint(self) -> dict[str, Any]:
        """What decides the numbers, but for the factors."""
        return {**super().fingerprint(), "inner": self.inner.fingerprint()}
