"""Dense random signs."""

from __future__ import annotations

from dataclasses import dataclass

from trak.projection.dense import Dense
from trak.projection.kernels.entries import SIGNS, Entries


@dataclass(frozen=True)
class Rademacher(Dense):
    """Pᵀg with independent entries ±1/sqrt(K) (Achlioptas 2003): the dense projection to prefer.

    Var⟨φ, φ'⟩ = (‖g‖²‖g'‖² + ⟨g, g'⟩² − 2 Σ_i g_i² g'_i²) / K.

    Args:
        dim: K, at least 1. It may exceed P, except with `per_layer`.
        seed: any integer.
        per_layer: K is split over layers, each with columns of its own; a layer that fits its share is kept
            exactly, and K is at most P. The formula above then holds layer by layer, with the layer's K.
        cache_bytes: memory for drawn tiles, in bytes, for each state (a bit for each entry). It changes the
            speed and no number, and takes no part in equality and fingerprint.
    """

    @property
    def kind(self) -> str:
        """`"rademacher"`."""
        return "rademacher"

    @property
    def entries(self) -> Entries:
        """How entries are drawn and kept."""
        return SIGNS
