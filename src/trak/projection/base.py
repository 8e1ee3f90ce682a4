"""What every projection is: an immutable description, turned into a state per checkpoint, then applied.

    projection = Rademacher(dim=2048, seed=0)
    state = projection.init(shapes, checkpoint=0, device=device, dtype=torch.float32)
    out_BK = state.zeros(batch_size)
    projection.add(state, block, out_BK)          # out += Pᵀ g, for every block of the batch, in any order

All kinds are scaled so that E[P Pᵀ] = I: inner products of features are unbiased estimates of inner products
of gradients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trak.blocks import Block

Shapes = Mapping[str, tuple[int, ...]]
"""Attributed parameters: canonical name to shape, in the model's order."""


@dataclass(frozen=True)
class Columns:
    """A named slice of the K columns of a feature matrix: one layer's, or all of them."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class ProjectionState:
    """A projection drawn for one checkpoint. Kinds add fields of their own (cached matrices or hashes)."""

    shapes: Shapes
    checkpoint: int
    dim: int
    device: torch.device
    dtype: torch.dtype

    def zeros(self, batch_size: int) -> Tensor:
        """An accumulator [batch_size, K] in the state's dtype."""
        return torch.zeros(batch_size, self.dim, dtype=self.dtype, device=self.device)


class Projection(ABC):
    """A random linear map from P gradient entries to K features.

    Its matrix is a pure function of (kind, version, seed, checkpoint, parameter name, row, column).
    """

    @property
    @abstractmethod
    def kind(self) -> str:
        """The kind's name in fingerprints, e.g. "rademacher"."""

    @property
    @abstractmethod
    def version(self) -> int:
        """Raised whenever the numbers drawn change."""

    @abstractmethod
    def columns(self, shapes: Shapes) -> tuple[Columns, ...]:
        """How the K columns split over layers; one entry "all" if layers share columns."""

    @abstractmethod
    def init(
        self,
        shapes: Shapes,
        *,
        checkpoint: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> ProjectionState:
        """Draw (or prepare to draw) the matrix for one checkpoint; sums in `dtype`: float32 or float64."""

    @abstractmethod
    def add(self, state: ProjectionState, block: Block, out_BK: Tensor) -> None:
        """Add Pᵀ g of one block of one batch to `out`."""

    @abstractmethod
    def matrix(self, state: ProjectionState, name: str) -> Tensor:
        """The dense [P_name, K] matrix of one parameter (flattened row-major): the readable reference."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """kind, version, seed, dim and whatever else decides the numbers; JSON values only."""

    def output_dim(self, shapes: Shapes) -> int:
        """K for these parameters."""
        return self.columns(shapes)[-1].stop
