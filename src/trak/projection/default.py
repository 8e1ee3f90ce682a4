"""The projection that is used when none is named."""

from __future__ import annotations

from math import prod

from trak.projection.base import Projection, Shapes
from trak.projection.identity import Identity
from trak.projection.layout import check_shapes
from trak.projection.sparse import Sparse

# Chosen by the linear datamodeling score that each kind and K reaches for its time; see the design note.
DEFAULT_KIND: type[Sparse] = Sparse
DEFAULT_DIM = 2048


def default_projection(shapes: Shapes, *, dim: int | None = None, seed: int = 0) -> Projection:
    """`Identity` if all P numbers fit into K, else the default kind.

    Args:
        shapes: the attributed parameters.
        dim: K; None takes the default, 2048.
        seed: any integer.

    Raises:
        ProjectionError: no parameters, or `dim` or `seed` not what a projection takes.
    """
    check_shapes(shapes)
    projection = DEFAULT_KIND(dim=DEFAULT_DIM if dim is None else dim, seed=seed)
    if sum(prod(shape) for shape in shapes.values()) <= projection.dim:
        return Identity()
    return projection
