"""Scores that are weighted inner products of stored gradient features, summed over checkpoints.

Shape legend: N training rows, R rows of one block, T targets, K projected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trak.scores import Scores


@dataclass(frozen=True, eq=False)
class Part:
    """One checkpoint's summand: factor · ∇(−L(z_i))ᵀ v.

    Attributes:
        rows: training rows of the store: features φ = ∇f and weights q, so that −∇L = q φ.
        targets_TK: what the targets put in place of v, [T, K].
        factor: of the whole summand, such as a learning rate.
    """

    rows: Any
    targets_TK: Tensor
    factor: float


@dataclass(frozen=True, eq=False, repr=False)
class DotScores(Scores):
    """Σ_m factor_m · q_m(z_i) φ_m(z_i)ᵀ v_m(z), computed where it is read.

    Attributes:
        parts: one for each checkpoint.
        device: where products are formed; blocks are returned on the CPU.
        normalise: sign(q) φ/‖φ‖ in place of q φ: every training example's loss gradient has length 1.
        progress: True or False to force a progress bar over blocks; None shows one where somebody watches.
    """

    parts: tuple[Part, ...]
    device: torch.device
    normalise: bool = False
    progress: bool | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, T)."""
        return self.parts[0].rows.num_rows, self.parts[0].targets_TK.shape[0]

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start to stop, [stop − start, T]."""
        total_RT: Tensor | None = None
        for part in self.parts:
            block = part.rows.read(start, stop)
            features_RK = loss_gradients(block.features, block.weights, normalise=self.normalise)
            features_RK = features_RK.to(self.device)
            product_RT = features_RK @ (part.factor * part.targets_TK.to(features_RK)).T
            total_RT = product_RT if total_RT is None else total_RT.add_(product_RT)
        assert total_RT is not None
        return total_RT.cpu()

    def select_targets(self, targets: Tensor) -> Scores:
        """The same checkpoints with fewer targets."""
        parts = tuple(replace(part, targets_TK=part.targets_TK[targets]) for part in self.parts)
        return replace(self, parts=parts)


def loss_gradients(features_RK: Tensor, weights_R: Tensor, *, normalise: bool) -> Tensor:
    """−∇L = q φ of every row, [R, K]; with `normalise` divided by its length (a gradient of zero stays zero).

    The sign of q and the length of φ are taken apart: the length of q φ underflows where the model is sure of an example, which is
    what normalising is for.
    """
    if not normalise:
        return features_RK * weights_R.to(features_RK).unsqueeze(1)
    return unit_rows(features_RK) * weights_R.sign().to(features_RK).unsqueeze(1)


def unit_rows(features_RK: Tensor) -> Tensor:
    """Rows divided by their lengths, [R, K]; rows of zeros stay."""
    # Squares of float32 entries beyond 1e±19 leave its range.
    norms_R1 = torch.linalg.vector_norm(features_RK, dim=1, keepdim=True, dtype=torch.float64)
    norms_R1 = torch.where(norms_R1 > 0, norms_R1, torch.ones_like(norms_R1))
    return (features_RK / norms_R1).to(features_RK.dtype)


def squared_norms(rows: Any, weigh: Callable[[Tensor], Tensor]) -> Tensor:
    """weigh(q_i) ‖φ(z_i)‖² of every training row, [N] float64."""
    total_N = torch.zeros(rows.num_rows, dtype=torch.float64)
    for block in rows.blocks():
        norms_R = torch.linalg.vector_norm(block.features, dim=1, dtype=torch.float64)
        total_N[block.start : block.stop] = weigh(block.weights.double()) * norms_R.square()
    return total_N
