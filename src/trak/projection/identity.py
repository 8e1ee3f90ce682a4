"""All gradient entries, as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from trak.blocks import Block
from trak.projection.base import Columns, Projection, ProjectionState, Shapes
from trak.projection.checks import check_add, check_name, check_state_options, require_state, resolve_device
from trak.projection.layout import Placement, separate
from trak.projection.pieces import as_multiplied, dense_pieces


@dataclass(frozen=True, eq=False)
class IdentityState(ProjectionState):
    """Where each parameter's entries go."""

    placements: Mapping[str, Placement]


@dataclass(frozen=True)
class Identity(Projection):
    """φ = g: K = P, inner products exact. For small models and as an oracle.

    Parameters are flattened row-major and laid side by side, the parameters of one layer together. In the
    order in which a model names its parameters that is the plain concatenation.
    """

    @property
    def kind(self) -> str:
        """`"identity"`."""
        return "identity"

    @property
    def version(self) -> int:
        """Version of the order of columns."""
        return 1

    def columns(self, shapes: Shapes) -> tuple[Columns, ...]:
        """One entry for each layer."""
        return separate(shapes, None)[1]

    def init(
        self,
        shapes: Shapes,
        *,
        checkpoint: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> IdentityState:
        """Placements; nothing is drawn, every checkpoint is alike.

        Raises:
            ProjectionError: no parameters, or sums in a dtype other than float32 and float64.
        """
        check_state_options(checkpoint, dtype)
        placements, columns = separate(shapes, None)
        return IdentityState(
            dict(shapes), checkpoint, columns[-1].stop, resolve_device(device), dtype, placements
        )

    def add(self, state: ProjectionState, block: Block, out_BK: Tensor) -> None:
        """Add g to the parameter's columns of `out`."""
        state = require_state(self, state, IdentityState)
        check_add(state, block, out_BK)
        start = state.placements[block.name].start
        for first, values_Bn in dense_pieces(as_multiplied(block, state.dtype), state.dtype):
            out_BK[:, start + first : start + first + values_Bn.shape[1]] += values_Bn

    def matrix(self, state: ProjectionState, name: str) -> Tensor:
        """[P_name, P]: ones where the parameter's entries go."""
        state = require_state(self, state, IdentityState)
        check_name(state.shapes, name)
        place = state.placements[name]
        out_PK = torch.zeros(prod(state.shapes[name]), state.dim, dtype=state.dtype, device=state.device)
        out_PK[:, place.start : place.stop] = torch.eye(place.width, dtype=state.dtype, device=state.device)
        return out_PK

    def fingerprint(self) -> dict[str, Any]:
        """Nothing but the kind: there is no choice."""
        return {"kind": self.kind, "version": self.version}
