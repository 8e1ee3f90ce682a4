"""How much scores depend on which checkpoints were drawn: jackknife standard errors, and thresholds by them.

With kernels κ_m and weights q_m of checkpoint m, TRAK's score is τ = κ̄ · q̄, a product of two means. The jackknife (Tukey 1958; Efron
and Tibshirani 1993, chapter 11) takes the estimator itself with one checkpoint left out,

    τ₍ₘ₎ = [Σ_{l≠m} κ_l / (M − 1)] · [Σ_{l≠m} q_l / (M − 1)],      SE² = (M − 1)/M · Σ_m (τ₍ₘ₎ − mean of τ₍·₎)²,

and so has the covariance of kernels and weights in it. Of a plain mean it is the sample standard deviation over √M.

Shape legend: N training rows, R rows of one block, T targets, M checkpoints, P pairs of a row and a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trak.errors import InputError
from trak.scores import BLOCK_SCORES, KernelScores, Scores


def jackknife(kernels_M: Tensor, weights_M: Tensor | None) -> Tensor:
    """The standard error of a mean over M, or of a product of two means over M.

    Args:
        kernels_M: [M, ...].
        weights_M: [M, ...], to be broadcast with the kernels; None for a plain mean.

    Returns:
        [...], in the kernels' dtype.
    """
    count = len(kernels_M)
    without_M = (kernels_M.sum(0) - kernels_M) / (count - 1)
    if weights_M is not None:
        weights_M = weights_M.to(kernels_M)
        without_M = without_M * ((weights_M.sum(0) - weights_M) / (count - 1))
    # The variance over M divides by M: times M − 1 it is (M − 1)/M · Σ.
    return (without_M.var(0, correction=0) * (count - 1)).sqrt()


@dataclass(frozen=True, eq=False, repr=False)
class StandardErrors(Scores):
    """Jackknife standard errors of scores that are a mean over checkpoints, computed where they are read.

    Attributes:
        kernels: κ_m of each checkpoint, [N, T] each.
        weights: q_m of each checkpoint, [M, N]; None where scores are a plain mean of the kernels.
        progress: True or False to force a progress bar over blocks; None shows one to those who watch.
    """

    kernels: tuple[Scores, ...]
    weights: Tensor | None = None
    progress: bool | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, T)."""
        return self.kernels[0].shape

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start to stop, [stop − start, T]; few at a time, as each checkpoint's products are held."""
        rows = max(1, BLOCK_SCORES // max(1, len(self.kernels) * self.num_targets))
        parts = [self._read(first, min(first + rows, stop)) for first in range(start, stop, rows)]
        return torch.cat(parts) if parts else torch.zeros(0, self.num_targets)

    def read_pairs(self, rows_P: Tensor, targets_P: Tensor) -> Tensor:
        """The standard errors of some pairs, [P]."""
        kernels_MP = torch.stack([kernel.read_pairs(rows_P, targets_P) for kernel in self.kernels])
        return jackknife(kernels_MP, None if self.weights is None else self.weights[:, rows_P])

    def select_targets(self, targets: Tensor) -> Scores:
        """The same checkpoints with fewer targets."""
        kernels = tuple(kernel.select_targets(targets) for kernel in self.kernels)
        return StandardErrors(kernels, self.weights, self.progress)

    def _read(self, start: int, stop: int) -> Tensor:
        kernels_MRT = torch.stack([kernel.read(start, stop) for kernel in self.kernels])
        weights_MR1 = None if self.weights is None else self.weights[:, start:stop, None]
        return jackknife(kernels_MRT, weights_MR1)


def standard_errors(members: Sequence[Scores]) -> Scores:
    """Standard errors over checkpoints of the scores that these members make together.

    Args:
        members: each checkpoint's own scores. Of TRAK's, kernels and weights are averaged apart; others are averaged as they are.

    Returns:
        [N, T], lazy.

    Raises:
        InputError: fewer than two members.
    """
    if len(members) < 2:
        raise InputError(
            f"a standard error over checkpoints needs at least 2 of them, got {len(members)}: attribute with more checkpoints. A saved "
            "attribution has none, since its members are not saved, nor have methods that are not a mean over checkpoints"
        )
    trak = [member for member in members if isinstance(member, KernelScores) and len(member.members) == 1]
    progress = getattr(members[0], "progress", None)
    if len(trak) < len(members):
        return StandardErrors(tuple(members), None, progress)
    kernels = tuple(
        KernelScores(member.members, torch.ones_like(member.weights), member.device, progress)
        for member in trak
    )
    return StandardErrors(kernels, torch.stack([member.weights for member in trak]), progress)


@dataclass(frozen=True, eq=False, repr=False)
class ThresholdedByError(Scores):
    """sign(τ) · max(|τ| − z · SE, 0), entry by entry.

    Attributes:
        base: τ.
        errors: SE, of the same shape.
        z: how many standard errors are taken off.
    """

    base: Scores
    errors: Scores
    z: float

    @property
    def shape(self) -> tuple[int, int]:
        """(N, T)."""
        return self.base.shape

    @property
    def progress(self) -> bool | None:
        """What the scores themselves say about progress bars."""
        return getattr(self.base, "progress", None)

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start to stop, [stop − start, T]."""
        return _thresholded(self.base.read(start, stop), self.errors.read(start, stop), self.z)

    def read_pairs(self, rows_P: Tensor, targets_P: Tensor) -> Tensor:
        """Some pairs, [P]."""
        pairs = rows_P, targets_P
        return _thresholded(self.base.read_pairs(*pairs), self.errors.read_pairs(*pairs), self.z)

    def select_targets(self, targets: Tensor) -> Scores:
        """Some of the columns."""
        return ThresholdedByError(
            self.base.select_targets(targets), self.errors.select_targets(targets), self.z
        )


def _thresholded(values: Tensor, errors: Tensor, z: float) -> Tensor:
    return values.sign() * (values.abs() - z * errors.to(values)).clamp_min(0)
