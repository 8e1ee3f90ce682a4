"""Sparse Johnson–Lindenstrauss: each gradient entry goes to one or a few columns."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from trak.blocks import Block
from trak.projection.base import Columns, Projection, ProjectionState, Shapes
from trak.projection.checks import (
    check_add,
    check_cache_bytes,
    check_integer,
    check_name,
    check_state_options,
    require_state,
    resolve_device,
)
from trak.projection.layout import pool
from trak.projection.philox import Key, derive_key
from trak.projection.pieces import as_multiplied, dense_pieces
from trak.projection.shifts import Shifts
from trak.projection.sparse_sums import SparseState, add_sparse
from trak.projection.tiles import TileCache


@dataclass(frozen=True)
class Sparse(Projection):
    """Pᵀg with `nonzeros` entries ±1/sqrt(nonzeros) in each row, the rest zero (Kane and Nelson, 2014; block
    construction), and L = floor(K / nonzeros) consecutive entries moved together (`Shifts`).

    Costs `nonzeros` additions for each gradient entry, at about the speed of copying it where L is 256 or more and some examples come
    together: the fastest on a CPU. In expectation at least as good as dense signs,

        Var⟨φ, φ'⟩ = (‖g‖²‖g'‖² + ⟨g, g'⟩² − Σ_b (‖g_b‖²‖g'_b‖² + ⟨g_b, g'_b⟩²)) / K

    over blocks b of L entries of one parameter, which never meet, for every `nonzeros` that divides K; a parameter of at most L
    entries is moved without loss. Tails are heavier where a few entries carry most of a gradient; more non-zeros thin them.

    On a CPU slices of gradients are added as they stand; on CUDA a Triton kernel gathers every column's entries; elsewhere they are
    sorted by column. No atomics: the same bits in every run.

    Args:
        dim: K, at least 1. It may exceed P, except with `per_layer`.
        seed: any integer.
        nonzeros: from 1 to dim (in a layer with fewer columns: as many as it has).
        per_layer: K is split over layers, each with columns of its own; a layer that fits its share is kept
            exactly, and K is at most P. The formula above then holds layer by layer, with the layer's K.
        cache_bytes: memory for drawn signs, in bytes, for each state (4 to 12 for each
            non-zero, an eighth by Triton). It changes the speed and no number, and takes no part in equality and fingerprint.
    """

    dim: int
    seed: int = 0
    _: KW_ONLY
    nonzeros: int = 1
    per_layer: bool = False
    cache_bytes: int = field(default=1 << 30, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_integer("dim", self.dim, at_least=1)
        check_integer("seed", self.seed)
        check_integer("nonzeros", self.nonzeros, at_least=1, at_most=self.dim)
        check_cache_bytes(self.cache_bytes)

    @property
    def kind(self) -> str:
        """`"sparse"`."""
        return "sparse"

    @property
    def version(self) -> int:
        """Version of the numbers drawn."""
        return 2

    def columns(self, shapes: Shapes) -> tuple[Columns, ...]:
        """One entry "all", or one for each layer."""
        return pool(shapes, self.dim, per_layer=self.per_layer)[1]

    def init(
        self,
        shapes: Shapes,
        *,
        checkpoint: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> SparseState:
        """Where entries go; shifts and signs are drawn when first used.

        Raises:
            ProjectionError: no parameters, fewer columns than layers, or sums in a dtype other than float32
                and float64.
        """
        check_state_options(checkpoint, dtype)
        placements, columns = pool(shapes, self.dim, per_layer=self.per_layer)

        def key(name: str, role: str) -> Key:
            return derive_key(self.kind, self.version, self.seed, checkpoint, name, role)

        return SparseState(
            shapes=dict(shapes),
            checkpoint=checkpoint,
            dim=columns[-1].stop,
            device=resolve_device(device),
            dtype=dtype,
            placements=placements,
            shifts={
                name: Shifts(
                    key(name, "signs"),
                    key(name, "shifts"),
                    size=prod(shape),
                    columns=placements[name].width,
                    nonzeros=min(self.nonzeros, placements[name].width),
                )
                for name, shape in shapes.items()
                if not placements[name].exact
            },
            cache=TileCache(self.cache_bytes),
        )

    def add(self, state: ProjectionState, block: Block, out_BK: Tensor) -> None:
        """Add Pᵀ g of one block of one batch to `out`."""
        state = require_state(self, state, SparseState)
        check_add(state, block, out_BK)
        block = as_multiplied(block, state.dtype)
        place = state.placements[block.name]
        if place.exact:
            for first, values_Bn in dense_pieces(block, state.dtype):
                start = place.start + first
                out_BK[:, start : start + values_Bn.shape[1]] += values_Bn
            return
        add_sparse(state, block, out_BK[:, place.start : place.stop])

    def matrix(self, state: ProjectionState, name: str) -> Tensor:
        """The dense [P_name, K] matrix of one parameter."""
        state = require_state(self, state, SparseState)
        check_name(state.shapes, name)
        place = state.placements[name]
        size = prod(state.shapes[name])
        out_PK = torch.zeros(size, state.dim, dtype=state.dtype, device=state.device)
        if place.exact:
            out_PK[:, place.start : place.stop] = torch.eye(size, dtype=state.dtype, device=state.device)
            return out_PK
        columns_sP, signs_sP = state.draw_range(name, 0, size)
        return out_PK.scatter_(1, (columns_sP + place.start).T, signs_sP.T)

    def fingerprint(self) -> dict[str, Any]:
        """What decides the numbers."""
        return {
            "kind": self.kind,
            "version": self.version,
            "seed": self.seed,
            "dim": self.dim,
            "nonzeros": self.nonzeros,
            "per_layer": self.per_layer,
        }
