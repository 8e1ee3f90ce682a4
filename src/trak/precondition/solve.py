"""(ΦᵀΦ + λI)⁻¹, applied to targets; never to training rows.

A rule may add a multiple of the diagonal, α diag(ΦᵀΦ), which is not written out below.

Shape legend: T targets, R rows, K projected, k columns of one group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trak.errors import SingularGramError
from trak.precondition.damping import Damping, GroupMoments
from trak.precondition.gram import Group, Moments

_POWER_STEPS = 12


@dataclass(frozen=True, eq=False)
class Preconditioner:
    """Cholesky factors of ΦᵀΦ + λI, one per column group.

    Attributes:
        groups: column slices.
        factors: lower triangular L with L Lᵀ = ΦᵀΦ + λI, [k, k] float64.
        dampings: λ of each group.
    """

    groups: tuple[Group, ...]
    factors: tuple[Tensor, ...]
    dampings: tuple[float, ...]

    def solve(self, features_TK: Tensor) -> Tensor:
        """(ΦᵀΦ + λI)⁻¹ φ(z) for each target, [T, K] float64."""
        solved_TK = torch.empty(features_TK.shape, dtype=torch.float64, device=self.factors[0].device)
        for (start, stop), factor in zip(self.groups, self.factors):
            part_kT = features_TK[:, start:stop].to(solved_TK).T
            solved_TK[:, start:stop] = torch.cholesky_solve(part_kT, factor).T
        return solved_TK

    def leverage(self, features_RK: Tensor) -> Tensor:
        """φᵀ (ΦᵀΦ + λI)⁻¹ φ of each row, [R] float64, in [0, 1] for rows that are in the Gram."""
        total_R = torch.zeros(features_RK.shape[0], dtype=torch.float64, device=self.factors[0].device)
        for (start, stop), factor in zip(self.groups, self.factors):
            part_kR = features_RK[:, start:stop].to(total_R).T
            total_R += torch.linalg.solve_triangular(factor, part_kR, upper=False).square().sum(0)
        return total_R


def fit_preconditioner(
    moments: Moments, damping: Damping, *, num_checkpoints: int = 1, where: str = ""
) -> Preconditioner:
    """Factorise ΦᵀΦ + λI for every column group.

    Args:
        moments: from `accumulate_moments`.
        damping: the rule for λ.
        num_checkpoints: M, over which scores will be averaged; a rule may look at it.
        where: names the checkpoint in messages.

    Raises:
        SingularGramError: λ = 0 with fewer rows than columns, or a matrix that is singular in working precision.
    """
    factors, dampings = [], []
    for group, gram, cross in zip(moments.groups, moments.grams, moments.cross):
        size = gram.shape[0]
        value = damping.value(
            GroupMoments(gram, cross, moments.num_rows, moments.outputs_square, num_checkpoints)
        )
        if value == damping.of_diagonal == 0 and moments.num_rows < size:
            raise SingularGramError(
                f"the Gram matrix{_at(where, group)} has {size} columns but only {moments.num_rows} training rows, so without damping "
                f'it has no inverse. Use damping="auto" or a positive number, or a projection dimension below {moments.num_rows}'
            )
        added_k = value + damping.of_diagonal * gram.diagonal()
        factors.append(_factorise(gram, added_k, value, moments.product_dtype, where=_at(where, group)))
        dampings.append(value)
    return Preconditioner(moments.groups, tuple(factors), tuple(dampings))


def _factorise(
    gram: Tensor, added_k: Tensor, damping: float, product_dtype: torch.dtype, *, where: str
) -> Tensor:
    """The Cholesky factor of the Gram matrix with something added to its diagonal; λ for messages."""
    damped = gram.clone()
    damped.diagonal().add_(added_k)
    factor, info = torch.linalg.cholesky_ex(damped)
    tolerance = torch.finfo(product_dtype).eps * (gram.shape[0] if product_dtype == torch.float64 else 1)
    if int(info) == 0 and float(added_k.min()) > tolerance * float(damped.diagonal().sum()):
        return factor  # no eigenvalue is less than what was added, and none is more than the trace
    reciprocal = 0.0 if int(info) > 0 else _reciprocal_condition(damped, factor)
    if not reciprocal > tolerance:
        raise SingularGramError(
            f"the Gram matrix{where} is singular in working precision: smallest/largest eigenvalue is about {reciprocal:.1e} with "
            f'damping {damping:.3g} (below {tolerance:.1e}). Some features are zero, repeated, or depend on others: use damping="auto" '
            "or a larger number, a smaller projection dimension, or leave parameters that receive no gradient out with parameters=…"
        )
    return factor


def _reciprocal_condition(matrix: Tensor, factor: Tensor) -> float:
    """Smallest over largest eigenvalue, by power and inverse iteration from a fixed start: an estimate within a small factor."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[0], 4, dtype=torch.float64, generator=generator).to(matrix)
    high, low = start, start
    for _ in range(_POWER_STEPS):
        high = matrix @ (high / high.norm(dim=0))
        low = torch.cholesky_solve(low / low.norm(dim=0), factor)
    largest, smallest_inverse = float(high.norm(dim=0).max()), float(low.norm(dim=0).max())
    if largest == 0 or not smallest_inverse < float("inf"):
        return 0.0
    return 1.0 / (largest * smallest_inverse)


def _at(where: str, group: Sequence[int]) -> str:
    place = f" of {where}" if where else ""
    return f"{place} (columns {group[0]} to {group[1] - 1})"
