"""Random linear maps from P gradient entries to K features."""

from trak.projection.base import Columns, Projection, ProjectionState, Shapes
from trak.projection.default import default_projection
from trak.projection.gaussian import Gaussian
from trak.projection.identity import Identity
from trak.projection.kinds import from_fingerprint
from trak.projection.kronecker import Kronecker
from trak.projection.rademacher import Rademacher
from trak.projection.sparse import Sparse

__all__ = [
    "Columns",
    "Gaussian",
    "Identity",
    "Kronecker",
    "Projection",
    "ProjectionState",
    "Rademacher",
    "Shapes",
    "Sparse",
    "default_projection",
    "from_fingerprint",
]
