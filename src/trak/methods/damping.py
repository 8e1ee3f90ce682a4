"""Automatic damping by the kind of features.

The leading entries of an eigenbasis are nearly uncorrelated, so that the diagonal of their Gram matrix is itself an estimate of the whole, without
the noise between columns. Where they were divided by their size already, it is a multiple of the identity. design/whitening.md has the figures.
"""

from __future__ import annotations

from trak.precondition import AutomaticDamping, Damping, MarquardtDamping, resolve_damping
from trak.projection import Eigenbasis, Projection
from trak.tasks import Task

WHITENED_DIRECTIONS = 2.5
"""`AutomaticDamping.directions` for an `Eigenbasis` with whitening."""


def damping_for(damping: float | str | Damping, projection: Projection, task: Task) -> Damping:
    """A rule from a number, "auto", or a rule, for features of this projection and task.

    The bound on the effective dimension is in proportion to √N, for examples that are one observation each. Of other losses a row may hold many,
    as a sum over words does, and an eigenbasis gets no bound.

    Raises:
        InputError: as `resolve_damping`.
    """
    if damping == "auto" and isinstance(projection, Eigenbasis):
        if projection.whitening is None:
            return MarquardtDamping() if task.is_log_loss else MarquardtDamping(directions=None)
        return AutomaticDamping(directions=WHITENED_DIRECTIONS)
    return resolve_damping(damping)
