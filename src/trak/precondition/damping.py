"""How much to damp: λ in ΦᵀΦ + λI, or λ and α in ΦᵀΦ + α diag(ΦᵀΦ) + λI."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trak.errors import InputError


@dataclass(frozen=True, eq=False)
class GroupMoments:
    """One column group's moments: see `trak.precondition.gram.Moments`; and how many checkpoints scores are averaged over."""

    gram: Tensor
    cross: Tensor
    num_rows: int
    outputs_square: float
    num_checkpoints: int = 1


class Damping(ABC):
    """A rule for λ, in units of squared gradient norm (the units of the Gram matrix's eigenvalues)."""

    @abstractmethod
    def value(self, moments: GroupMoments) -> float:
        """λ ≥ 0 for one column group of one checkpoint."""

    @property
    def of_diagonal(self) -> float:
        """α ≥ 0 in ΦᵀΦ + α diag(ΦᵀΦ) + λI."""
        return 0.0

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """The rule, as JSON values."""


@dataclass(frozen=True)
class FixedDamping(Damping):
    """λ itself."""

    damping: float

    def __post_init__(self) -> None:
        _check(self.damping, "damping")

    def value(self, moments: GroupMoments) -> float:
        """λ as given."""
        return float(self.damping)

    def fingerprint(self) -> dict[str, Any]:
        """The rule, as JSON values."""
        return {"rule": "fixed", "damping": float(self.damping)}


@dataclass(frozen=True)
class RelativeDamping(Damping):
    """λ = ratio × the mean eigenvalue of the Gram matrix, trace / K: the same ratio means the same for every checkpoint's scale."""

    ratio: float

    def __post_init__(self) -> None:
        _check(self.ratio, "ratio")

    def value(self, moments: GroupMoments) -> float:
        """Ratio · trace(ΦᵀΦ) / K."""
        return float(self.ratio * moments.gram.diagonal().mean())

    def fingerprint(self) -> dict[str, Any]:
        """The rule, as JSON values."""
        return {"rule": "relative", "ratio": float(self.ratio)}


def _check(number: float, name: str) -> None:
    if not (isinstance(number, (int, float)) and math.isfinite(number) and number >= 0):
        raise InputError(f"{name} must be a finite number ≥ 0; got {number!r}")
