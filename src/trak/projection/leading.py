"""Which numbers are the largest."""

from __future__ import annotations

from torch import Tensor


def largest(values_P: Tensor, count: int) -> Tensor:
    """Positions of the largest values in descending order, the first of equal ones first, int64 [count]."""
    least = values_P.topk(count).values[-1]
    candidates_C = (values_P >= least).nonzero().squeeze(1)
    return candidates_C[values_P[candidates_C].sort(descending=True, stable=True).indices[:count]]
