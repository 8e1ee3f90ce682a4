"""Automatic damping by the kind of features.

The leading entries of an eigenbasis have no noise of a random projection, which averaging over checkpoints would take away, and they come
whitened, so that what the Gram matrix adds is less: they want fewer directions than random columns do. design/whitening.md has the figures.
"""

from __future__ import annotations

from trak.precondition import AutomaticDamping, Damping, resolve_damping
from trak.projection import Eigenbasis, Projection

EIGENBASIS_DIRECTIONS = 2.5
"""`AutomaticDamping.directions` for `Eigenbasis`."""


def damping_for(damping: float | str | Damping, projection: Projection) -> Damping:
    """A rule from a number, "auto", or a rule, for features of this projection.

    Raises:
        InputError: as `resolve_damping`.
    """
    if damping == "auto" and isinstance(projection, Eigenbasis):
        return AutomaticDamping(directions=EIGENBASIS_DIRECTIONS)
    return resolve_damping(damping)
