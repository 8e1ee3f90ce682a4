"""Damping by the Gram matrix's own diagonal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from trak.errors import InputError
from trak.precondition.automatic import AutomaticDamping
from trak.precondition.damping import Damping, GroupMoments


@dataclass(frozen=True)
class MarquardtDamping(Damping):
    """ΦᵀΦ + α diag(ΦᵀΦ) + λI: the Gram matrix, what it would be were its columns uncorrelated, and the ridge of `AutomaticDamping`.

    For features that are nearly uncorrelated by construction, which those of `trak.Eigenbasis` are: diag(ΦᵀΦ) is then EK-FAC's estimate of
    ΦᵀΦ, which has no noise between columns, and the sum is a mean of the two. Columns of a random projection all have about the
    same mean square, so that for those it would be a ridge and no more.

    Levenberg (1944) added a multiple of the identity to a least-squares problem's normal equations, Marquardt (1963) of their diagonal.
    design/whitening.md has the figures.

    Attributes:
        diagonal: α ≥ 0; 1, by default, counts both alike.
        share, directions: of λ, as in `AutomaticDamping`.
    """

    diagonal: float = 1.0
    share: float = 1000.0
    directions: float | None = 4.0

    def __post_init__(self) -> None:
        number = self.diagonal
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
        if not (is_number and math.isfinite(number) and number >= 0):
            raise InputError(f"diagonal must be a number ≥ 0; got {number!r}")
        self._ridge()  # raises for the others

    def _ridge(self) -> AutomaticDamping:
        return AutomaticDamping(self.share, self.directions)

    def value(self, moments: GroupMoments) -> float:
        """λ of `AutomaticDamping`."""
        return self._ridge().value(moments)

    @property
    def of_diagonal(self) -> float:
        """α."""
        return float(self.diagonal)

    def fingerprint(self) -> dict[str, Any]:
        """The rule, as JSON values."""
        return {
            **self._ridge().fingerprint(),
            "rule": "marquardt",
            "version": 1,
            "diagonal": float(self.diagonal),
        }
