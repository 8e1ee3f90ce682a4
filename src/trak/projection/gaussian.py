"""Dense normal entries."""

from __future__ import annotations

from dataclasses import dataclass
from math import pi

import torch
from torch import Tensor

from trak.projection.dense import Dense
from trak.projection.philox import Key, draw_words

CALL_COLUMNS = 4
"""Columns served by one Philox call."""

CHUNK_CALLS = 1 << 14
"""Philox calls drawn at once: their scratch stays in cache."""


class _Normals:
    """Kept as they are, in the dtype of the state.

    Words (w0, w1, w2, w3) of counter (row, block) give columns 4·block to 4·block + 3 by Box–Muller, twice:
    u = (w0 + 1/2) / 2^32, v = (w1 + 1/2) / 2^32; sqrt(−2 ln u) cos 2πv and sqrt(−2 ln u) sin 2πv; then (w2,
    w3) alike. All in float64, then rounded to float32 for every dtype, so that a float64 state holds the same
    matrix.
    """

    def draw(self, key: Key, rows_n: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        step = max(1, CHUNK_CALLS * CALL_COLUMNS // columns)
        out_nK = torch.empty(rows_n.numel(), columns, dtype=dtype, device=rows_n.device)
        for start in range(0, rows_n.numel(), step):
            out_nK[start : start + step] = self.reference(key, rows_n[start : start + step], columns)
        return out_nK

    def expand(self, kept: Tensor, columns: int, dtype: torch.dtype, scratch: Tensor) -> Tensor:
        return kept

    def reference(self, key: Key, rows_n: Tensor, columns: int) -> Tensor:
        words = draw_words(key, rows_n, -(-columns // CALL_COLUMNS))
        out_nc4 = torch.empty(*words[0].shape, CALL_COLUMNS, device=rows_n.device, dtype=torch.float32)
        for first, second in ((0, 1), (2, 3)):
            radius = words[first].double().add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
            angle = words[second].double().add_(0.5).mul_(2 * pi * 2.0**-32)
            out_nc4[..., first] = torch.cos(angle).mul_(radius)
            out_nc4[..., second] = angle.sin_().mul_(radius)
        return out_nc4.reshape(rows_n.shape[0], -1)[:, :columns]


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
    def entries(self) -> _Normals:
        """How entries are drawn and kept."""
        return _Normals()
