"""Factors from per-example gradients, in two passes over the same examples.

    moments = Moments.zeros(shapes, options, device=device, dtype=torch.float32)
    for blocks, weights_B in batches:                     # blocks: name to the block of a parameter, one each
        moments.add(blocks, weights_B)
    squares = moments.turned()
    if squares.needed:                                    # not for K-FAC, as a rule
        for blocks, weights_B in batches:
            squares.add(blocks, weights_B)
    factors = squares.factors()

Memory: R² + C² numbers for each parameter's moments, whose place its eigenvectors take, and 2 R·C for its eigenvalues (a copy of them is sorted):
all parameters at once, so that the peak is Σ R² + C² + 2 R·C numbers and some float64 copies of the largest side. Of a side that is not turned only
the diagonal of the moment is needed. What a projection keeps of it is less (`FittedProjection.to_keep`).

Turning whole gradients is most of the work, several times that of the first pass; of `FactorOptions.candidates` entries it is little. What takes the
fewest multiplications is taken: with T < R, C positions M Mᵀ is formed by T × T products, without M.

Shape legend: B examples, T positions, R rows and C columns of a parameter, u rows of a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor

from trak.blocks import Block, IndexBlock, OuterBlock, upcast
from trak.errors import ProjectionError
from trak.projection.base import Shapes
from trak.projection.entries import Entries
from trak.projection.factors import FactorOptions, Factors, matrix_shape, with_floor
from trak.projection.leading import largest
from trak.projection.turning import (
    Side,
    example_pieces,
    full_sides,
    is_outer,
    outer,
    positions_of,
    scaled,
    turn,
)

PANEL_ROWS = 128
"""Rows of a symmetric sum that are formed at once on a CPU: .56 to .67 of the time of all of it for sides of 576 to 2,048, .93 for 256."""


@dataclass(frozen=True, eq=False)
class Moments:
    """First pass: Σ w M Mᵀ [R, R] and Σ w MᵀM [C, C] of each parameter, or the diagonal for a side that is not turned.

    Attributes:
        options: how factors are fitted.
        shapes: parameters as matrices.
        sides: name to (rows, columns); None for the columns of a vector. What is above the diagonal has no meaning.
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

        def side(size: int, is_vector: bool = False) -> Tensor:
            shape = (size, size) if options.turns(size, is_vector=is_vector) else (size,)
            return torch.zeros(shape, device=device, dtype=dtype)

        sides = {
            name: (side(rows, columns == 1), side(columns) if columns > 1 else None)
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
        """The eigenvectors, and K-FAC's eigenvalues; once only: eigenvectors take the place of the moments.

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
            is_turned = basis_RR is not None and (values_C is None or basis_CC is not None)
            if measures_all or not (is_turned or self.options.kind == "ekfac"):
                eigenvalues_RC = self.total.new_zeros(self.shapes[name])
            elif values_C is None:
                products[name] = eigenvalues_RC = values_R.unsqueeze(1)
            else:
                sum_C = values_C.sum().clamp_min(torch.finfo(values_C.dtype).tiny)
                products[name] = eigenvalues_RC = torch.outer(values_R, values_C / sum_C)
            factors[name] = Factors(basis_RR, basis_CC, eigenvalues_RC)
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
    """(eigenvalues [S] ≥ 0 in ascending order, eigenvectors [S, S]) of a moment [S, S], which they replace; a diagonal [S] as it is, and None.

    Only what is on and below the diagonal is read. In float64, where the solver converges for moments of low rank too. Of each eigenvector the
    entry of largest magnitude is positive: one thing less that depends on the library.
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
    values_S, vectors_SS = torch.linalg.eigh(moment.to(device).double() / total.to(device).double(), UPLO="L")
    largest_S = vectors_SS.gather(0, vectors_SS.abs().argmax(0, keepdim=True))
    vectors_SS *= torch.where(largest_S < 0, -1.0, 1.0)
    return values_S.clamp_min(0).to(total.device, total.dtype), moment.copy_(vectors_SS)


def _add_moments(block: Block, weights_B: Tensor, rows: Tensor, columns: Tensor | None) -> None:
    """Add Σ_b w_b M_b M_bᵀ and Σ_b w_b M_bᵀ M_b, on and below the diagonal, or their diagonals alone."""
    block = scaled(block, weights_B.sqrt())
    if isinstance(block, IndexBlock) and (rows.ndim == 1 or block.indices.shape[1] <= len(rows)):
        _add_table_moments(block, rows, columns)
    elif columns is not None and _stays_factored(block, rows, columns):
        positions = positions_of(block)
        for _, piece in example_pieces(block, positions * (2 * sum(block.matrix_shape) + positions)):
            _add_factored_moments(outer(piece), rows, columns)
    else:
        for _, piece in example_pieces(block, prod(block.shape)):
            matrices_BRC = piece.dense().reshape(-1, *block.matrix_shape)
            _add_products(matrices_BRC, matrices_BRC, rows, axis=1)
            if columns is not None:
                _add_products(matrices_BRC, matrices_BRC, columns, axis=2)


def _add_factored_moments(block: OuterBlock, rows: Tensor, columns: Tensor) -> None:
    """M Mᵀ = leftᵀ (right rightᵀ) left with T × T numbers in the middle, and so for the columns."""
    left_BTR, right_BTC = block.left[:, 0], block.right[:, 0]
    _add_products(right_BTC @ right_BTC.transpose(1, 2) @ left_BTR, left_BTR, rows, axis=2)
    _add_products(left_BTR @ left_BTR.transpose(1, 2) @ right_BTC, right_BTC, columns, axis=2)


def _add_products(one_Bmn: Tensor, other_Bmn: Tensor, out: Tensor, *, axis: int) -> None:
    """Add Σ one other over all axes but one, [S, S], of which no more than panels on and below the diagonal are formed, or its diagonal [S].

    The whole product has to be symmetric.
    """
    if out.ndim == 1:
        out += (one_Bmn * other_Bmn).sum([0, 3 - axis])
        return
    one_SM = one_Bmn.movedim(axis, 0).flatten(1)
    other_SM = one_SM if other_Bmn is one_Bmn else other_Bmn.movedim(axis, 0).flatten(1)
    size = len(out)
    step = PANEL_ROWS if out.device.type == "cpu" else size
    for first in range(0, size, step):
        last = min(first + step, size)
        out[first:last, :last].addmm_(one_SM[first:last], other_SM[:last].T)


def _add_table_moments(block: IndexBlock, rows: Tensor, columns: Tensor | None) -> None:
    """The same for an embedding's block: only rows that an example touches are looked at, T of R at the most."""
    if columns is not None or rows.ndim == 1:
        row_u, values_uC = _touched_rows(block)
        if columns is not None:
            _add_products(values_uC[None], values_uC[None], columns, axis=2)
        if rows.ndim == 1:
            _add_at(rows, row_u, values_uC.square().sum(1))
    if rows.ndim == 2:
        for examples, _ in example_pieces(block, block.indices.shape[1] ** 2):
            values_bTC, indices_bT = block.values[examples], block.indices[examples]
            places_bTT = indices_bT[:, :, None] * len(rows) + indices_bT[:, None]
            products_bTT = values_bTC @ values_bTC.transpose(1, 2)
            _add_at(rows.view(-1), places_bTT.flatten(), products_bTT.flatten())


def _touched_rows(block: IndexBlock) -> tuple[Tensor, Tensor]:
    """(row [u], values [u, C]) of each example's rows of the table that are not zero, what several positions add to one being summed up."""
    height, device = block.matrix_shape[0], block.indices.device
    keys_BT = block.indices + height * torch.arange(block.batch_size, device=device).unsqueeze(1)
    keys_u, place_BT = torch.unique(keys_BT, return_inverse=True)
    values_uC = block.values.new_zeros(len(keys_u), block.values.shape[2])
    _add_at(values_uC, place_BT.flatten(), block.values.flatten(0, 1))
    return keys_u % height, values_uC


def _add_at(out: Tensor, places_n: Tensor, values_n: Tensor) -> None:
    """out[places] += values, in an order that does not change from run to run."""
    if out.device.type == "cpu":
        out.index_add_(0, places_n, values_n)
    else:
        # Sorts, where index_add_ adds atomically in any order.
        out.index_put_((places_n,), values_n, accumulate=True)


def _stays_factored(block: Block, rows: Tensor, columns: Tensor) -> bool:
    """Whether T × T products take fewer multiplications for an example than the gradient and its products with itself."""
    if not is_outer(block):
        return False
    (height, width), positions = block.matrix_shape, positions_of(block)
    # Of R × R products the panels below the diagonal; of a diagonal R.
    own, other = (side.numel() / side.ndim for side in (rows, columns))
    factored = 2 * positions**2 * (height + width) + positions * (own + other)
    return factored <= positions * height * width + width * own + height * other


def _add_squares(block: Block, weights_B: Tensor, rows: Side, columns: Side, out_RC: Tensor) -> None:
    """Add Σ_b w_b (UᵀM_bV)², entry by entry."""
    if isinstance(block, IndexBlock) and not rows.is_turned:
        weighted = replace(block, values=block.values * weights_B.sqrt()[:, None, None])
        row_u, values_uC = _touched_rows(weighted)
        _add_at(out_RC, row_u, columns.of_values(values_uC).square())
        return
    if isinstance(block, OuterBlock) and block.left.shape[1:3] == (1, 1):
        left_BR, right_BC = rows.of_values(block.left[:, 0, 0]), columns.of_values(block.right[:, 0, 0])
        out_RC += (left_BR.square() * weights_B[:, None]).T @ right_BC.square()
        return
    for examples, piece in example_pieces(block, prod(block.shape)):
        turned_BRC = turn(piece, rows, columns)
        out_RC += torch.einsum("b,brc->rc", weights_B[examples], turned_BRC.square())
