"""Factors from per-example gradients, in two passes over the same examples.

    moments = Moments.zeros(shapes, options, device=device, dtype=torch.float32)
    for blocks, weights_B in batches:                     # blocks: name to the block of a parameter, one each
        moments.add(blocks, weights_B)
    squares = moments.turned()
    if squares.needed:                                    # not for K-FAC, as a rule
        for blocks, weights_B in batches:
            squares.add(blocks, weights_B)
    factors = squares.factors()

Memory: R² + C² numbers for each parameter's moments and as many for its eigenvectors, R·C for its eigenvalues. Of a side that is not turned
only the diagonal of the moment is needed.

Turning whole gradients is most of the work, several times that of the first pass; of `FactorOptions.candidates` entries it is little.

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
from trak.projection.entries import Entries
from trak.projection.factors import FactorOptions, Factors, matrix_shape, with_floor
from trak.projection.leading import largest
from trak.projection.pieces import is_large_table, table_pieces, upcast
from trak.projection.turning import Side, example_pieces, full_sides, turn


@dataclass(frozen=True, eq=False)
class Moments:
    """First pass: Σ w M Mᵀ [R, R] and Σ w MᵀM [C, C] of each parameter, or the diagonal for a side that is not turned.

    Attributes:
        options: how factors are fitted.
        shapes: parameters as matrices.
        sides: name to (rows, columns); None for the columns of a vector.
        total: Σ w, [].
    """

    options: FactorOptions
    shapes: Mapping[str, tuple[int, int]]
    sides: Mapping[str, tuple[Tensor, Tensor | None]]
    total: Tensor

    @classmethod
    def zeros(
        cls, shapes: Shapes, options: FactorOptions, *, device: torch.device, dtype: torch.dtype
    ) -> Moments:
        """Nothing added up yet; sums in float32 or float64."""
        matrices = {name: matrix_shape(shape) for name, shape in shapes.items()}

        def side(size: int) -> Tensor:
            shape = (size, size) if size <= options.largest_side else (size,)
            return torch.zeros(shape, device=device, dtype=dtype)

        sides = {
            name: (side(rows), side(columns) if columns > 1 else None)
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
        entries = sum(rows * columns for rows, columns in self.shapes.values())
        candidates = self.options.candidates
        measures_all = self.options.kind == "ekfac" and (candidates is None or candidates >= entries)
        for name, (rows, columns) in self.sides.items():
            values_R, basis_RR = _eigenvectors(rows, self.total, name)
            values_C, basis_CC = (None, None) if columns is None else _eigenvectors(columns, self.total, name)
            eigenvalues_RC = self.total.new_zeros(self.shapes[name])
            factors[name] = Factors(basis_RR, basis_CC, eigenvalues_RC)
            is_turned = basis_RR is not None and (values_C is None or basis_CC is not None)
            if measures_all or not (is_turned or self.options.kind == "ekfac"):
                continue
            products[name] = values_R.unsqueeze(1)
            if values_C is not None:
                sum_C = values_C.sum().clamp_min(torch.finfo(values_C.dtype).tiny)
                products[name] = torch.outer(values_R, values_C) / sum_C
        for name, product_RC in products.items():
            factors[name].eigenvalues.copy_(product_RC)
        chosen = {}
        if self.options.kind == "ekfac" and candidates is not None and not measures_all:
            # A vector's product is its mean squares.
            matrices = {name: product for name, product in products.items() if product.shape[1] > 1}
            chosen = _candidates(matrices, factors, candidates)
        needed = frozenset(factors) - (products.keys() - chosen.keys())
        return Squares(factors, needed, torch.zeros_like(self.total), chosen)


@dataclass(frozen=True, eq=False)
class Squares:
    """Second pass: Λ = E[ρ (UᵀMV)²].

    Attributes:
        found: name to factors; eigenvalues of those in `needed` that are measured as a whole are sums, not divided yet.
        needed: parameters whose eigenvalues are measured.
        total: Σ w, [].
        candidates: of those of which some entries are: which, and Σ w (UᵀMV)² [k].
    """

    found: Mapping[str, Factors]
    needed: frozenset[str]
    total: Tensor
    candidates: Mapping[str, tuple[Entries, Tensor]]
    _sides: dict[str, tuple[Side, Side]] = field(default_factory=dict)

    def add(self, blocks: Mapping[str, Block], weights_B: Tensor) -> None:
        """Add a batch's gradients, each with a weight ≥ 0."""
        weights_B = weights_B.to(self.total)
        for name, block in blocks.items():
            if name in self.candidates:
                entries, sums_k = self.candidates[name]
                for examples, picked_Bk in entries.pieces(upcast(block, self.total.dtype)):
                    sums_k += weights_B[examples] @ picked_Bk.square()
            elif name in self.needed:
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
        for name in self.needed - self.candidates.keys():
            self.found[name].eigenvalues.div_(self.total)
        for name, (entries, sums_k) in self.candidates.items():
            _replace(self.found[name].eigenvalues.view(-1), entries.flat_k, sums_k / self.total)
        return with_floor(self.found)


def _candidates(
    products: Mapping[str, Tensor], factors: Mapping[str, Factors], count: int
) -> dict[str, tuple[Entries, Tensor]]:
    """The `count` entries of all parameters with the largest products, and a sum for each that is zero."""
    found: dict[str, tuple[Entries, Tensor]] = {}
    if not products:
        return found
    values_P = torch.cat([product.flatten() for product in products.values()])
    flat_K, first = largest(values_P, min(count, len(values_P))).sort().values, 0
    for name, product in products.items():
        own_k = flat_K[(flat_K >= first) & (flat_K < first + product.numel())] - first
        first += product.numel()
        if len(own_k):
            found[name] = Entries.of(factors[name], own_k), product.new_zeros(len(own_k))
    return found


def _replace(values_P: Tensor, flat_k: Tensor, measured_k: Tensor) -> None:
    """Put in what was measured, and scale the rest so that the sum is what it was."""
    total = values_P.sum()
    rest = total - values_P[flat_k].sum()
    if len(flat_k) < len(values_P) and rest > 0:
        values_P *= ((total - measured_k.sum()) / rest).clamp_min(0)
    values_P[flat_k] = measured_k


def _eigenvectors(moment: Tensor, total: Tensor, name: str) -> tuple[Tensor, Tensor | None]:
    """(eigenvalues [S] ≥ 0 in ascending order, eigenvectors [S, S]) of a moment [S, S]; a diagonal [S] as it is, and None.

    Of each eigenvector the entry of largest magnitude is positive: one thing less that depends on the library.
    """
    if not moment.isfinite().all():
        raise ProjectionError(
            f"gradients of parameter {name!r} are NaN or infinite for some of the rows that factors are fitted to: look at the model's "
            "outputs there; a model in float16 may overflow: try dtype=torch.float32"
        )
    if moment.ndim == 1:
        return moment / total, None
    # On MPS there is no float64.
    device = torch.device("cpu") if moment.device.type == "mps" else moment.device
    values_S, vectors_SS = torch.linalg.eigh(moment.to(device).double() / total.to(device).double())
    largest_S = vectors_SS.gather(0, vectors_SS.abs().argmax(0, keepdim=True))
    vectors_SS = vectors_SS * torch.where(largest_S < 0, -1.0, 1.0)
    return values_S.clamp_min(0).to(total.device, total.dtype), vectors_SS.to(moment)


def _add_moments(block: Block, weights_B: Tensor, rows: Tensor, columns: Tensor | None) -> None:
    """Add Σ_b w_b M_b M_bᵀ and Σ_b w_b M_bᵀ M_b, or their diagonals."""
    height, width = block.matrix_shape
    roots_B11 = weights_B.sqrt()[:, None, None]
    if isinstance(block, OuterBlock) and block.left.shape[1] == 1 and _stays_factored(block):
        left_BTR, right_BTC = block.left[:, 0] * roots_B11, block.right[:, 0]
        # M Mᵀ = leftᵀ (right rightᵀ) left, and T × T is small.
        _add_products(right_BTC @ right_BTC.transpose(1, 2) @ left_BTR, left_BTR, rows)
        if columns is not None:
            _add_products(left_BTR @ left_BTR.transpose(1, 2) @ right_BTC, right_BTC, columns)
        return
    if isinstance(block, IndexBlock) and (rows.ndim == 1 or is_large_table(block)):
        _add_table_moments(block, roots_B11, rows, columns)
        return
    for examples, piece in example_pieces(block, prod(block.shape)):
        matrices_BRC = piece.dense().reshape(-1, height, width) * roots_B11[examples]
        _add_products(matrices_BRC.transpose(1, 2), matrices_BRC.transpose(1, 2), rows)
        if columns is not None:
            _add_products(matrices_BRC, matrices_BRC, columns)


def _add_products(one_BnS: Tensor, other_BnS: Tensor, out: Tensor) -> None:
    """Add Σ_bn one other, [S, S] or its diagonal."""
    if out.ndim == 1:
        out += (one_BnS * other_BnS).sum((0, 1))
        return
    one_mS = one_BnS.reshape(-1, one_BnS.shape[2])
    out += one_mS.T @ (one_mS if one_BnS is other_BnS else other_BnS.reshape(-1, other_BnS.shape[2]))


def _add_table_moments(block: IndexBlock, roots_B11: Tensor, rows: Tensor, columns: Tensor | None) -> None:
    """The same for an embedding's block, one example's rows of the table at a time where rows are turned."""
    for rows_u, values_BuC in table_pieces(block) if columns is not None or rows.ndim == 1 else ():
        weighted_BuC = values_BuC * roots_B11
        if columns is not None:
            _add_products(weighted_BuC, weighted_BuC, columns)
        if rows.ndim == 1:
            rows.index_add_(0, rows_u, weighted_BuC.square().sum((0, 2)))
    if rows.ndim == 2:
        for indices_T, values_TC in zip(block.indices, block.values * roots_B11):
            products_TT = values_TC @ values_TC.T
            pairs = (indices_T[:, None].expand_as(products_TT), indices_T[None].expand_as(products_TT))
            rows.index_put_(pairs, products_TT, accumulate=True)


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
