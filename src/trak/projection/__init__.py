"""Linear maps from P gradient entries to K features: random ones, and those fitted to training gradients."""

from trak.projection.base import Columns, Projection, ProjectionState, Shapes
from trak.projection.default import default_projection
from trak.projection.eigenbasis import Eigenbasis
from trak.projection.entries import Leading
from trak.projection.factors import FactorOptions, Factors, factors_from_tensors, factors_to_tensors
from trak.projection.fitted import FittedProjection
from trak.projection.gaussian import Gaussian
from trak.projection.identity import Identity
from trak.projection.kinds import from_fingerprint
from trak.projection.kronecker import Kronecker
from trak.projection.moments import Moments, Squares
from trak.projection.rademacher import Rademacher
from trak.projection.sparse import Sparse
from trak.projection.turning import joined
from trak.projection.whitened import Whitened

__all__ = [
    "Columns",
    "Eigenbasis",
    "FactorOptions",
    "Factors",
    "FittedProjection",
    "Gaussian",
    "Identity",
    "Kronecker",
    "Leading",
    "Moments",
    "Projection",
    "ProjectionState",
    "Rademacher",
    "Shapes",
    "Sparse",
    "Squares",
    "Whitened",
    "default_projection",
    "factors_from_tensors",
    "factors_to_tensors",
    "from_fingerprint",
    "joined",
]
