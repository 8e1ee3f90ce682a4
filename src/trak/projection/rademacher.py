"""Dense random signs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trak.projection.dense import Dense
from trak.projection.philox import Key
from trak.projection.signs import draw_packed_signs, reference_signs, unpack_signs


class _Signs:
    """Kept packed, a bit for each entry."""

    def draw(self, key: Key, rows_n: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        return draw_packed_signs(key, rows_n, columns)

    def expand(self, kept: Tensor, columns: int, dtype: torch.dtype, scratch: Tensor) -> Tensor:
        return unpack_signs(kept, columns, dtype, scratch)

    def reference(self, key: Key, rows_n: Tensor, columns: int) -> Tensor:
        return reference_signs(key, rows_n, columns)


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
    def entries(self) -> _Signs:
        """How entries are drawn and kept."""
        return _Signs()
