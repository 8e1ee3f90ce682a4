"""What the dense kinds share: everything but how an entry is drawn."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor

from trak.blocks import Block
from trak.projection.base import Columns, Projection, ProjectionState, Shapes
from trak.projection.checks import check_cache_bytes, check_integer, require_state
from trak.projection.kernels.entries import Entries
from trak.projection.layout import pool
from trak.projection.tiles import DenseState, add_dense, dense_matrix, init_dense


@dataclass(frozen=True)
class Dense(Projection):
    """A matrix of independent entries with variance 1/K, drawn tile by tile; the kinds add how an entry is drawn."""

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
    @abstractmethod
    def entries(self) -> Entries:
        """How entries are drawn and kept."""

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
        add_dense(require_state(self, state, DenseState), self.entries, block, out_BK)

    def matrix(self, state: ProjectionState, name: str) -> Tensor:
        """The dense [P_name, K] matrix of one parameter."""
        return dense_matrix(require_state(self, state, DenseState), self.entries, name)

    def fingerprint(self) -> dict[str, Any]:
        """What decides the numbers."""
        return {
            "kind": self.kind,
            "version": self.version,
            "seed": self.seed,
            "dim": self.dim,
            "per_layer": self.per_layer,
        }
