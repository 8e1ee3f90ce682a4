"""Dense random signs."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor

from trak.blocks import Block
from trak.projection.base import Columns, Projection, ProjectionState, Shapes
from trak.projection.checks import check_cache_bytes, check_integer, require_state
from trak.projection.layout import pool
from trak.projection.philox import Key
from trak.projection.signs import draw_packed_signs, reference_signs, unpack_signs
from trak.projection.tiles import DenseState, add_dense, dense_matrix, init_dense


class _Signs:
    """Kept packed, a bit for each entry."""

    def draw(self, key: Key, rows_n: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        return draw_packed_signs(key, rows_n, columns)

    def expand(self, kept: Tensor, columns: int, dtype: torch.dtype, scratch: Tensor) -> Tensor:
        return unpack_signs(kept, columns, dtype, scratch)

    def reference(self, key: Key, rows_n: Tensor, columns: int) -> Tensor:
        return reference_signs(key, rows_n, columns)


@dataclass(frozen=True)
class Rademacher(Projection):
    """Pᵀg with independent entries ±1/sqrt(K) (Achlioptas 2003): the dense projection to prefer.

    Var⟨φ, φ'⟩ = (‖g‖²‖g'‖² + ⟨g, g'⟩² − 2 Σ_i g_i² g'_i²) / K.

    Args:
        dim: K, at least 1. It may exceed P, except with `per_layer`.
        seed: any integer.
        per_layer: K is split over layers, each with columns of its own; a layer that fits its share is kept
            exactly, and K is at most P. The formula above then holds layer by layer, with the layer's K.
        cache_bytes: memory for drawn tiles, in bytes, for each state (a bit for each entry). It changes the
            speed and no number, and takes no part in equality and fingerprint.
    """

    dim: int
    seed: int = 0
    _: KW_ONLY
    per_layer: bool = False
    cache_bytes: int = field(default=1 << 30, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_integer("dim", self.dim, at_least=1)
        check_integer("seed", self.seed)
        check_cache_bytes(self.cache_bytes)

    @property
    def kind(self) -> str:
        """`"rademacher"`."""
        return "rademacher"

    @property
    def version(self) -> int:
        """Version of the numbers drawn."""
        return 1

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
    ) -> DenseState:
        """Keys and placements; tiles are drawn when first used.

        Raises:
            ProjectionError: no parameters, fewer columns than layers, or sums in a dtype other than float32
                and float64.
        """
        return init_dense(
            self,
            shapes,
            dim=self.dim,
            seed=self.seed,
            per_layer=self.per_layer,
            cache_bytes=self.cache_bytes,
            checkpoint=checkpoint,
            device=device,
            dtype=dtype,
        )

    def add(self, state: ProjectionState, block: Block, out_BK: Tensor) -> None:
        """Add Pᵀ g of one block of one batch to `out`."""
        add_dense(require_state(self, state, DenseState), _Signs(), block, out_BK)

    def matrix(self, state: ProjectionState, name: str) -> Tensor:
        """The dense [P_name, K] matrix of one parameter."""
        return dense_matrix(require_state(self, state, DenseState), _Signs(), name)

    def fingerprint(self) -> dict[str, Any]:
        """What decides the numbers."""
        return {
            "kind": self.kind,
            "version": self.version,
            "seed": self.seed,
            "dim": self.dim,
            "per_layer": self.per_layer,
        }
