"""Factors from per-example gradients, in two passes over the same examples.

    moments = Moments.zeros(shapes, options, device=device, dtype=torch.float32)
    for blocks, weights_B in batches:                     # blocks: name to the block of a parameter, one each
        moments.add(blocks, weights_B)
    squares = moments.turned()
    if squares.needed:                                    # not for K-FAC, as a rule
        for blocks, weights_B in batches:
            squares.add(blocks, weights_B)
    factors = squares.factors()

Memory: R² + C² numbers for each parameter's moments and as many for its eigenvectors, R·C for its eigenvalues.

Shape legend: B examples, T positions, R rows and C columns of a parameter, u rows of a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from trak.blocks import Block, IndexBlock, OuterBlock
from trak.errors import ProjectionError
from trak.projection.base import Shapes
from trak.projection.factors import FactorOptions, Factors, matrix_shape, with_floor
from trak.projection.pieces import is_large_table, table_pieces, upcast
from trak.projection.turning import Side, example_pieces, full_sides, turn


@dataclass(frozen=True, eq=False)
class Moments:
    """First pass: Σ w M Mᵀ [R, R] and Σ w MᵀM [C, C] of each parameter; None for a side that is not turned.

    Attributes:
        options: how factors are fitted.
        shapes: parameters as matrices.
        sides: name to (rows, columns).
        total: Σ w, [].
    """

    options: FactorOptions
    shapes: Mapping[str, tuple[int, int]]
    sides: Mapping[str, tuple[Tensor | None, Tensor | None]]
    total: Tensor

    @classmethod
    def zeros(
        cls, shapes: Shapes, options: FactorOptions, *, device: torch.device, dtype: torch.dtype
    ) -> Moments:
        """Nothing added up yet; sums in float32 or float64."""
        matrices = {name: matrix_shape(shape) for name, shape in shapes.items()}

        def side(size: int, is_turned: bool) -> Tensor | None:
            return torch.zeros(size, size, device=device, dtype=dtype) if is_turned else None

        sides = {
            name: (
                side(rows, rows <= options.largest_side),
                # A vector has no columns to turn.
                side(columns, 1 < columns <= options.largest_side),
            )
            for name, (rows, columns) in matrices.items()
        }
        return cls(options, matrices, sides, torch.zeros((), device=device, dtype=dtype))

    def add(self, blocks: Mapping[str, Block], weights_B: Tensor) -> None:
        """Add a batch's gradients, each with a weight ≥ 0."""
        weights_B = weights_B.to(self.total)
        for name, block in blocks.items():
            _add_moments(upcast(block, self.total.dtype), weights_B, *self.sides[name])
        self.total.add_(weights_B.sum())

    def turned(self) -> Squares:
        """The eigenvectors, and K-FAC's eigenvalues.

        Raises:
            ProjectionError: gradients that are not finite, or no weight at all.
        """
        if not 0 < float(self.total) < float("inf"):
            raise ProjectionError(
                f"the weights of the examples that factors are fitted to sum to {float(self.total)}, expected a finite number above 0"
            )
        factors, products = {}, {}
        for name, (rows_RR, columns_CC) in self.sides.items():
            values_R, basis_RR = _eigenvectors(rows_RR, self.total, name)
            values_C, basis_CC = _eigenvectors(columns_CC, self.total, name)
            eigenvalues_RC = self.total.new_zeros(self.shapes[name])
            factors[name] = Factors(basis_RR, basis_CC, eigenvalues_RC)
            if self.options.kind == "kfac" and values_R is not None:
                if self.shapes[name][1] == 1:
                    products[name] = values_R.unsqueeze(1)
                elif values_C is not None:
                    products[name] = torch.outer(values_R, values_C) / values_C.sum().clamp_min(
                        torch.finfo(values_C.dtype).tiny
                    )
        for name, product_RC in products.items():
            factors[name].eigenvalues.copy_(product_RC)
        return Squares(factors, frozenset(factors) - products.keys(), torch.zeros_like(self.total))


@dataclass(frozen=True, eq=False)
class Squares:
    """Second pass: Λ = E[ρ (UᵀMV)²].

    Attributes:
        found: name to factors; eigenvalues of those in `needed` are sums, not divided yet.
        needed: parameters whose eigenvalues are the mean squares.
        total: Σ w, [].
    """

    found: Mapping[str, Factors]
    needed: frozenset[str]
    total: Tensor
    _sides: dict[str, tuple[Side, Side]] = field(default_factory=dict)

    def add(self, blocks: Mapping[str, Block], weights_B: Tensor) -> None:
        """Add a batch's gradients, each with a weight ≥ 0."""
        weights_B = weights_B.to(self.total)
        for name, block in blocks.items():
            if name in self.needed:
                if name not in self._sides:
                    self._sides[name] = full_sides(self.found[name])
                block = upcast(block, self.total.dtype)
                _add_squares(block, weights_B, *self._sides[name], self.found[name].eigenvalues)
        self.total.add_(weights_B.sum())

    def factors(self) -> dict[str, Factors]:
        """The factors of every parameter; once only.

        Raises:
            ProjectionError: gradients that are not finite, or all zero.
        """
        for name in self.needed:
            self.found[name].eigenvalues.div_(self.total)
        return with_floor(self.found)


def _eigenvectors(
    moment_SS: Tensor | None, total: Tensor, name: str
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """(eigenvalues [S] ≥ 0 in ascending order, eigenvectors [S, S]) in float64 and the moment's dtype.

    Of each eigenvector the entry of largest magnitude is positive: one thing less that depends on the library.
    """
    if moment_SS is None:
        return None, None
    if not moment_SS.isfinite().all():
        raise ProjectionError(
            f"gradients of parameter {name!r} are NaN or infinite for some of the rows that factors are fitted to: look at the model's "
            "outputs there; a model in float16 may overflow: try dtype=torch.float32"
        )
    # On MPS there is no float64.
    device = torch.device("cpu") if moment_SS.device.type == "mps" else moment_SS.device
    values_S, vectors_SS = torch.linalg.eigh(moment_SS.to(device).double() / total.to(device).double())
    largest_S = vectors_SS.gather(0, vectors_SS.abs().argmax(0, keepdim=True))
    vectors_SS = vectors_SS * torch.where(largest_S < 0, -1.0, 1.0)
    return values_S.clamp_min(0).to(total.device, total.dtype), vectors_SS.to(moment_SS)


def _add_moments(block: Block, weights_B: Tensor, rows_RR: Tensor | None, columns_CC: Tensor | None) -> None:
    """Add Σ_b w_b M_b M_bᵀ and Σ_b w_b M_bᵀ M_b."""
    rows, columns = block.matrix_shape
    roots_B11 = weights_B.sqrt()[:, None, None]
    if isinstance(block, OuterBlock) and block.left.shape[1] == 1 and _stays_factored(block):
        left_BTR, right_BTC = block.left[:, 0] * roots_B11, block.right[:, 0]
        # M Mᵀ = leftᵀ (right rightᵀ) left, and T × T is small.
        if rows_RR is not None:
            inner_BTR = right_BTC @ right_BTC.transpose(1, 2) @ left_BTR
            rows_RR += inner_BTR.reshape(-1, rows).T @ left_BTR.reshape(-1, rows)
        if columns_CC is not None:
            inner_BTC = left_BTR @ left_BTR.transpose(1, 2) @ right_BTC
            columns_CC += inner_BTC.reshape(-1, columns).T @ right_BTC.reshape(-1, columns)
        return
    if isinstance(block, IndexBlock) and (rows_RR is None or is_large_table(block)):
        _add_table_moments(block, roots_B11, rows_RR, columns_CC)
        return
    for examples, piece in example_pieces(block, prod(block.shape)):
        matrices_BRC = piece.dense().reshape(-1, rows, columns) * roots_B11[examples]
        if rows_RR is not None:
            by_row_Rn = matrices_BRC.permute(1, 0, 2).reshape(rows, -1)
            rows_RR += by_row_Rn @ by_row_Rn.T
        if columns_CC is not None:
            by_column_nC = matrices_BRC.reshape(-1, columns)
            columns_CC += by_column_nC.T @ by_column_nC


def _add_table_moments(
    block: IndexBlock, roots_B11: Tensor, rows_RR: Tensor | None, columns_CC: Tensor | None
) -> None:
    """The same for an embedding's block, one example's rows of the table at a time where rows are turned."""
    if columns_CC is not None:
        for _, values_BuC in table_pieces(block):
            weighted_nC = (values_BuC * roots_B11).reshape(-1, values_BuC.shape[2])
            columns_CC += weighted_nC.T @ weighted_nC
    if rows_RR is not None:
        for indices_T, values_TC in zip(block.indices, block.values * roots_B11):
            products_TT = values_TC @ values_TC.T
            pairs = (indices_T[:, None].expand_as(products_TT), indices_T[None].expand_as(products_TT))
            rows_RR.index_put_(pairs, products_TT, accumulate=True)


def _stays_factored(block: OuterBlock) -> bool:
    """Whether T × T products take fewer multiplications than the gradient and its products with itself."""
    (rows, columns), positions = block.matrix_shape, block.left.shape[2]
    factored = 2 * positions**2 * (rows + columns) + positions * (rows**2 + columns**2)
    return factored <= positions * rows * columns + rows * columns * (rows + columns)


def _add_squares(block: Block, weights_B: Tensor, rows: Side, columns: Side, out_RC: Tensor) -> None:
    """Add Σ_b w_b (UᵀM_bV)², entry by entry."""
    if isinstance(block, IndexBlock) and not rows.is_turned:
        for rows_u, values_BuC in table_pieces(block):
            squares_BuC = columns.of_values(values_BuC).square()
            out_RC.index_add_(0, rows_u, torch.einsum("b,buc->uc", weights_B, squares_BuC))
        return
    if isinstance(block, OuterBlock) and block.left.shape[1:3] == (1, 1):
        left_BR, right_BC = rows.of_values(block.left[:, 0, 0]), columns.of_values(block.right[:, 0, 0])
        out_RC += (left_BR.square() * weights_B[:, None]).T @ right_BC.square()
        return
    for examples, piece in example_pieces(block, prod(block.shape)):
        turned_BRC = turn(piece, rows, columns)
        out_RC += torch.einsum("b,brc->rc", weights_B[examples], turned_BRC.square())
