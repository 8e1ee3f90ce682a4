"""The projection that is used when none is named."""

from __future__ import annotations

from math import prod

from trak.projection.base import Projection, Shapes
from trak.projection.eigenbasis import Eigenbasis
from trak.projection.identity import Identity
from trak.projection.kronecker import Kronecker
from trak.projection.layout import check_shapes
from trak.projection.sparse import Sparse

# Chosen by the linear datamodeling score and the time of each kind and K: design/defaults.md and design/whitening.md have the figures.
DEFAULT_DIM = 4096
# Beyond this many attributed parameters one layer's gradients no longer fit for a batch, and only factors are kept.
LARGE_MODEL = 50_000_000
LARGE_DIM = 8192


def default_projection(
    shapes: Shapes, *, dim: int | None = None, seed: int = 0, is_fitted: bool = False
) -> Projection:
    """`Identity` if all P numbers fit into K; `Sparse`, or `Eigenbasis`, for models of ordinary size; `Kronecker` for large ones.

    Random columns keep inner products of gradients, whatever is done with them, and need nothing but the parameters' shapes. The
    leading entries of an eigenbasis predict retraining better once the Gram matrix is solved, and have to be fitted.

    Args:
        shapes: attributed parameters, name to shape.
        dim: K; None for 4,096, and 8,192 for models of more than 50 million attributed parameters.
        seed: of a random projection.
        is_fitted: `Eigenbasis` in place of `Sparse`: for TRAK, where there is a training set to fit to.

    Raises:
        ProjectionError: no parameters.
    """
    check_shapes(shapes)
    size = sum(prod(shape) for shape in shapes.values())
    is_large = size > LARGE_MODEL
    dim = dim if dim is not None else (LARGE_DIM if is_large else DEFAULT_DIM)
    if size <= dim:
        return Identity()
    if is_large:
        return Kronecker(dim, seed=seed)
    return Eigenbasis(dim) if is_fitted else Sparse(dim, seed=seed)
