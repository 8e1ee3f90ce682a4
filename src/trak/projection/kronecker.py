"""Projection of the two sides of a gradient matrix apart.

Legend: R rows and C columns of a parameter as a matrix, a and b columns of the two factors, k numbers kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, isqrt, prod, sqrt
from typing import Any

import torch
from torch import Tensor

from trak.blocks import Block, DenseBlock
from trak.projection.base import Columns, Projection, ProjectionState, Shapes
from trak.projection.checks import (
    check_add,
    check_integer,
    check_name,
    check_state_options,
    require_state,
    resolve_device,
)
from trak.projection.contract import Factor, contract
from trak.projection.layout import Placement, separate
from trak.projection.philox import BLOCK_ROWS, Key, derive_key
from trak.projection.pieces import as_multiplied, dense_pieces
from trak.projection.signs import draw_packed_signs, unpack_signs


@dataclass(frozen=True)
class Split:
    """How k numbers of AᵀGB are chosen: factor widths a and b, and whether a factor is the identity.

    Attributes:
        a, b: columns of A [R, a] and B [C, b]; a·b >= k.
        exact: "rows" (A = I, a = R), "columns" (B = I, b = C), or None (both random).
    """

    a: int
    b: int
    k: int
    exact: str | None

    def kept(self) -> Tensor:
        """Which k of the a·b numbers (row-major index), int64 [k].

        The first k, row by row. With A = I column by column, so that no row is left out.
        """
        order = torch.arange(self.k)
        return (order % self.a) * self.b + order // self.a if self.exact == "rows" else order

    def scale(self) -> Tensor:
        """Weight of each kept number, float64 [k], so that inner products are unbiased.

        1/sqrt(k) if both factors are random. If one is the identity each row (or column) of G has an estimate
        of its own: 1/sqrt(the numbers kept for it).
        """
        kept = self.kept()
        if self.exact is None:
            return torch.full((self.k,), 1 / sqrt(self.k), dtype=torch.float64)
        side = kept // self.b if self.exact == "rows" else kept % self.b
        return side.bincount()[side].double().rsqrt()


def choose_splits(rows: int, columns: int, k: int, sketches: int = 1) -> tuple[Split, ...]:
    """The splits for a parameter [R, C] of which k < R·C numbers are kept.

    The variance of ⟨φ, φ'⟩ goes like V_A/a + V_B/b (design note), with V_A and V_B alike for a single outer
    product: smallest for a = b = sqrt(k), then 2V/sqrt(k). Leaving a side of m entries as it is takes its
    term away and leaves V·m/k: smaller if m < 2 sqrt(k). So: the shorter side exact if m² <= 4k (and m <= k),
    else square; and several independent squares if asked, 2V/sqrt(k·sketches).
    """
    short = min(rows, columns)
    if short * short <= 4 * k and short <= k:
        if rows <= columns:
            return (Split(rows, ceil(k / rows), k, "rows"),)
        return (Split(ceil(k / columns), columns, k, "columns"),)
    count = min(sketches, k)
    parts = [k // count + (index < k % count) for index in range(count)]
    sides = [isqrt(part - 1) + 1 for part in parts]
    return tuple(Split(side, ceil(part / side), part, None) for side, part in zip(sides, parts))


@dataclass(frozen=True, eq=False)
class Sketch:
    """Drawn factors of one split.

    Attributes:
        rows, columns: the factors A [R, a] and B [C, b], ±1 or the identity.
        kept_k: which numbers of AᵀGB are kept; None for the first k.
        scale_k: their weights.
        vector_Rk: for a parameter of one column, all that is done to it as one matrix; else None.
        start: first column of the feature matrix.
    """

    rows: Factor
    columns: Factor
    kept_k: Tensor | None
    scale_k: Tensor
    vector_Rk: Tensor | None
    start: int

    @classmethod
    def of(cls, split: Split, rows: Factor, columns: Factor, scale_k: Tensor, start: int) -> Sketch:
        """The sketch of a split, with what can be prepared."""
        kept_k = split.kept().to(scale_k.device)
        in_order = torch.equal(kept_k, torch.arange(split.k, device=scale_k.device))
        sketch = cls(rows, columns, None if in_order else kept_k, scale_k, None, start)
        return replace(sketch, vector_Rk=sketch.matrix()) if len(columns.plain) == 1 else sketch

    def add(self, block: Block, out_BK: Tensor) -> None:
        """Add scale · (the kept numbers of AᵀGB) to `out`, in as few calls as possible: models have many small parameters."""
        out_Bk = out_BK[:, self.start : self.start + len(self.scale_k)]
        if self.vector_Rk is not None and isinstance(block, DenseBlock):
            out_Bk.addmm_(block.values.flatten(1), self.vector_Rk)
            return
        numbers_Bn = contract(block, self.rows, self.columns).flatten(1).to(out_BK.dtype)
        kept_Bk = (
            numbers_Bn[:, : len(self.scale_k)]
            if self.kept_k is None
            else numbers_Bn.index_select(1, self.kept_k)
        )
        out_Bk.addcmul_(kept_Bk, self.scale_k)

    def matrix(self) -> Tensor:
        """[R·C, k]: entry (r·C + c, j) is A[r, p] B[c, q] scale_j, for kept number j = (p, q)."""
        products = self.rows.plain[:, None, :, None] * self.columns.plain[None, :, None, :]
        flat = products.reshape(products.shape[0] * products.shape[1], -1)
        kept = flat[:, : len(self.scale_k)] if self.kept_k is None else flat[:, self.kept_k]
        return kept * self.scale_k


@dataclass(frozen=True, eq=False)
class KroneckerState(ProjectionState):
    """The drawn factors of every parameter that is not kept exactly."""

    placements: Mapping[str, Placement]
    sketches: Mapping[str, tuple[Sketch, ...]]


@dataclass(frozen=True)
class Kronecker(Projection):
    """AᵀGB for the gradient matrix G [R, C] of each parameter, outer products never being formed.

    With G = Σ_t u_t v_tᵀ, AᵀGB = Σ_t (Aᵀu_t)(Bᵀv_t)ᵀ: about T·(R·a + C·b) multiplications for an example
    instead of T·R·C to form G and R·C·K to project it densely (compare LoGra: Choe et al., 2024). Every
    parameter has columns of its own: K is shared out equally over layers, a layer's share equally over its
    parameters, and what fits its share is kept exactly.

    The price is variance: a square split keeps a = b = sqrt(k) directions of each side, and Var⟨φ, φ'⟩ goes
    like 1/sqrt(k), not 1/k. `sketches` draws that many independent smaller squares instead, with variance
    like 1/sqrt(k·sketches).

    Args:
        dim: K, at least the number of parameters; a K larger than P gives P columns, exactly the gradient.
        seed: any integer.
        sketches: independent pairs (A, B) for each parameter, at least 1; costs about sqrt(sketches) times as
            much.
    """

    dim: int
    seed: int = 0
    sketches: int = 1

    def __post_init__(self) -> None:
        check_integer("dim", self.dim, at_least=1)
        check_integer("seed", self.seed)
        check_integer("sketches", self.sketches, at_least=1)

    @property
    def kind(self) -> str:
        """`"kronecker"`."""
        return "kronecker"

    @property
    def version(self) -> int:
        """Version of the numbers drawn."""
        return 2

    def columns(self, shapes: Shapes) -> tuple[Columns, ...]:
        """One entry for each layer."""
        return separate(shapes, self.dim)[1]

    def init(
        self,
        shapes: Shapes,
        *,
        checkpoint: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> KroneckerState:
        """Draw the factors.

        Raises:
            ProjectionError: no parameters, fewer columns than parameters, or sums in a dtype other than
                float32 and float64.
        """
        check_state_options(checkpoint, dtype)
        placements, columns = separate(shapes, self.dim)
        device = resolve_device(device)
        drawn = {
            name: self._draw(name, shape, placements[name], checkpoint, device, dtype)
            for name, shape in shapes.items()
            if not placements[name].exact
        }
        return KroneckerState(dict(shapes), checkpoint, columns[-1].stop, device, dtype, placements, drawn)

    def add(self, state: ProjectionState, block: Block, out_BK: Tensor) -> None:
        """Add scale · (the kept numbers of AᵀGB) of one block of one batch to `out`."""
        state = require_state(self, state, KroneckerState)
        check_add(state, block, out_BK)
        block = as_multiplied(block, state.dtype)
        place = state.placements[block.name]
        if place.exact:
            for first, values_Bn in dense_pieces(block, state.dtype):
                start = place.start + first
                out_BK[:, start : start + values_Bn.shape[1]] += values_Bn
            return
        for sketch in state.sketches[block.name]:
            sketch.add(block, out_BK)

    def matrix(self, state: ProjectionState, name: str) -> Tensor:
        """The dense [P_name, K] matrix of one parameter."""
        state = require_state(self, state, KroneckerState)
        check_name(state.shapes, name)
        place = state.placements[name]
        size = prod(state.shapes[name])
        out_PK = torch.zeros(size, state.dim, dtype=state.dtype, device=state.device)
        if place.exact:
            out_PK[:, place.start : place.stop] = torch.eye(size, dtype=state.dtype, device=state.device)
            return out_PK
        for sketch in state.sketches[name]:
            out_PK[:, sketch.start : sketch.start + len(sketch.scale_k)] = sketch.matrix()
        return out_PK

    def fingerprint(self) -> dict[str, Any]:
        """What decides the numbers."""
        return {
            "kind": self.kind,
            "version": self.version,
            "seed": self.seed,
            "dim": self.dim,
            "sketches": self.sketches,
        }

    def _draw(
        self,
        name: str,
        shape: tuple[int, ...],
        place: Placement,
        checkpoint: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> tuple[Sketch, ...]:
        rows, columns = (shape[0], prod(shape[1:])) if shape else (1, 1)
        drawn = []
        start = place.start
        for index, split in enumerate(choose_splits(rows, columns, place.width, self.sketches)):
            keys = [
                derive_key(self.kind, self.version, self.seed, checkpoint, name, f"{side}.{index}")
                for side in ("rows", "columns")
            ]
            # Each sketch is an estimate of its own, and they are averaged by the numbers they keep.
            scale_k = split.scale() * sqrt(split.k / place.width)
            drawn.append(
                Sketch.of(
                    split,
                    _factor(keys[0], rows, split.a, split.exact == "rows", device, dtype),
                    _factor(keys[1], columns, split.b, split.exact == "columns", device, dtype),
                    scale_k.to(device=device, dtype=dtype),
                    start,
                )
            )
            start += split.k
        return tuple(drawn)


def _factor(
    key: Key, rows: int, columns: int, exact: bool, device: torch.device, dtype: torch.dtype
) -> Factor:
    """The identity, or random signs: [rows, columns]."""
    if exact:
        return Factor.of(torch.eye(rows, dtype=dtype, device=device), is_identity=True)
    packed = draw_packed_signs(key, torch.arange(ceil(rows / BLOCK_ROWS), device=device), columns)
    return Factor.of(unpack_signs(packed, dtype)[:rows].contiguous(), is_identity=False)
