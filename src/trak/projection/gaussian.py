"""Dense normal entries."""

from __future__ import annotations

from dataclasses import dataclass

from trak.projection.dense import Dense
from trak.projection.kernels.entries import NORMALS, Entries


@dataclass(frozen=True)
class Gaussian(Dense):
    """Pᵀg with independent entries N(0, 1/K): the projection of the TRAK paper.

    Var⟨φ, φ'⟩ = (‖g‖²‖g'‖² + ⟨g, g'⟩²) / K: never below `Rademacher`, which is faster to draw and 32 times
    smaller to keep.

    Args:
        dim: K, at least 1. It may exceed P, except with `per_layer`.
        seed: any integer.
        per_layer: K is split over layers, each with columns of its own; a layer that fits its share is kept
            exactly, and K is at most P. The formula above then holds layer by layer, with the layer's K.
        cache_bytes: memory for drawn tiles, in bytes, for each state (4 or 8 for each entry). It changes the
            speed and no number, and takes no part in equality and fingerprint.
    """

    @property
    def kind(self) -> str:
        """`"gaussian"`."""
        return "gaussian"

    @property
    def entries(self) -> Entries:
        """How entries are drawn and kept."""
        return NORMALS
