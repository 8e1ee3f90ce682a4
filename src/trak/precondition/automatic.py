"""Damping chosen from the features themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trak.precondition.damping import Damping, GroupMoments

# See design/damping.md for the figures that decided it.
TRACE_SHARE = 1000


@dataclass(frozen=True)
class AutomaticDamping(Damping):
    """λ = trace(ΦᵀΦ) / 1000: a thousandth of the training set's total squared gradient norm.

    The trace does not depend on the projection dimension K, so neither does λ: a larger K resolves more directions and damps them
    as much. A group of columns of its own (one layer's) is damped by its own trace.
    """

    def value(self, moments: GroupMoments) -> float:
        """trace(ΦᵀΦ) / 1000."""
        return float(moments.gram.diagonal().sum()) / TRACE_SHARE

    def fingerprint(self) -> dict[str, Any]:
        """The rule, as JSON values."""
        return {"rule": "automatic", "version": 1, "trace_share": TRACE_SHARE}
