"""Damping chosen from the features themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trak.errors import InputError
from trak.precondition.damping import Damping, GroupMoments

_BISECTIONS = 60


@dataclass(frozen=True)
class AutomaticDamping(Damping):
    """The larger of two: a thousandth of the trace, and what keeps the number of directions in proportion to the data.

        λ = max(trace(ΦᵀΦ) / (share · √M),  λ_d),      Σ_k w_k / (w_k + λ_d) = directions · √N · M^⅓

    The trace is the training set's total squared gradient norm. It does not depend on the projection dimension K, so neither does its
    part of λ: a larger K resolves more directions and damps them as much. The other part bounds the effective dimension, w being
    the eigenvalues of ΦᵀΦ: where they fall off slowly, as in models that were trained for a short time, a thousandth of the trace would
    invert more directions than N examples determine. It is 0 where no λ > 0 exceeds the bound. Damping trades noise for
    bias, and averaging M checkpoints takes noise away too, so an ensemble wants less of it. A group of columns of its own (one
    layer's) is damped by its own trace and eigenvalues.

    The rule is within 3% of the best fixed damping's linear datamodeling score on four banks of retrained models; on a fifth, of models
    trained for ten steps on 150 examples, more damping is better by a fifth. design/defaults.md has the figures.

    Attributes:
        share: the larger, the less damping by the trace.
        directions: the larger, the less damping by the effective dimension; None for no bound on it. 4 is for random columns.
    """

    share: float = 1000.0
    directions: float | None = 4.0

    def __post_init__(self) -> None:
        for name in ("share", "directions"):
            number = getattr(self, name)
            if name == "directions" and number is None:
                continue
            if (
                isinstance(number, bool)
                or not isinstance(number, (int, float))
                or not (math.isfinite(number) and number > 0)
            ):
                raise InputError(f"{name} must be a positive number; got {number!r}")

    def value(self, moments: GroupMoments) -> float:
        """λ by the formula above; one decomposition in float32 for its eigenvalues where the bound may matter."""
        trace = float(moments.gram.diagonal().sum())
        by_trace = trace / (self.share * math.sqrt(moments.num_checkpoints))
        if self.directions is None or trace == 0:
            return by_trace
        bound = self.directions * math.sqrt(moments.num_rows) * moments.num_checkpoints ** (1 / 3)
        # Σ w / (w + λ) is less than the number of columns, and than trace / λ.
        if bound >= min(moments.gram.shape[0], trace / by_trace):
            return by_trace
        # w / (w + λ) is concave, so that the diagonal in place of the eigenvalues can only have more of it (Peierls, 1938); where columns are
        # nearly uncorrelated, not much more.
        if not _exceeds(moments.gram.diagonal(), bound, by_trace):
            return by_trace
        eigenvalues_k = torch.linalg.eigvalsh(moments.gram.float()).double().clamp_min(0)
        return _least_damping(eigenvalues_k, bound, by_trace)

    def fingerprint(self) -> dict[str, Any]:
        """The rule, as JSON values."""
        directions = None if self.directions is None else float(self.directions)
        return {"rule": "automatic", "version": 3, "share": float(self.share), "directions": directions}


def _exceeds(eigenvalues_k: Tensor, bound: float, damping: float) -> bool:
    """Whether the effective dimension Σ w / (w + λ) is more than the bound."""
    return float((eigenvalues_k / (eigenvalues_k + damping)).sum()) > bound


def _least_damping(eigenvalues_k: Tensor, bound: float, least: float) -> float:
    """The smallest λ ≥ `least` at which the effective dimension is at most `bound`."""

    if not _exceeds(eigenvalues_k, bound, least):
        return least
    low, high = least, float(eigenvalues_k.sum()) / bound
    for _ in range(_BISECTIONS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _exceeds(eigenvalues_k, bound, middle) else (low, middle)
    return high
