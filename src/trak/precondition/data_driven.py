"""Damping from the spectrum of the Gram matrix and the model outputs, by the rules of ridge regression.

They take f for the outcome of a regression on the features, f ≈ Φβ with penalty λ‖β‖², and need the eigenvalues w of ΦᵀΦ, the
coefficients b = VᵀΦᵀf in its eigenvectors V, ‖f‖² and N, all of which are kept from the one pass over the features.
None of them predicts retrained models as well as `AutomaticDamping` on the banks at hand (design/defaults.md): they are here to be
compared, and for whoever knows that one fits their problem.

Shape legend: N training rows, k columns of one group, G values of λ.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trak.errors import InputError
from trak.precondition.damping import Damping, GroupMoments

_GRID = 241
_LOWEST, _HIGHEST = 1e-9, 1e1  # of the trace


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A column group's moments in the eigenvectors of its Gram matrix.

    Attributes:
        eigenvalues: w ≥ 0, [k] float64.
        coefficients: b = VᵀΦᵀf, [k] float64.
        outputs_square: ‖f‖².
        num_rows: N.
    """

    eigenvalues: Tensor
    coefficients: Tensor
    outputs_square: float
    num_rows: int

    @classmethod
    def of(cls, moments: GroupMoments) -> Spectrum:
        """By one eigendecomposition, after which any number of λ are free."""
        eigenvalues, vectors = torch.linalg.eigh(moments.gram.double().cpu())
        coefficients = vectors.T @ moments.cross.double().cpu()
        return cls(eigenvalues.clamp_min(0), coefficients, moments.outputs_square, moments.num_rows)

    def effective_dimension(self, dampings_G: Tensor) -> Tensor:
        """Σ w / (w + λ), the trace of the hat matrix, [G]."""
        return (self.eigenvalues / (self.eigenvalues + dampings_G.unsqueeze(1))).sum(1)


class SpectralDamping(Damping):
    """A rule that minimises something over λ, given the spectrum."""

    @abstractmethod
    def criterion(self, spectrum: Spectrum, dampings_G: Tensor) -> Tensor:
        """What to minimise, [G]."""

    def value(self, moments: GroupMoments) -> float:
        """The λ with the least criterion, on a grid of 24 points per decade from 1e-9 to 10 times the trace.

        Raises:
            InputError: a Gram matrix that is zero.
        """
        spectrum = Spectrum.of(moments)
        trace = float(spectrum.eigenvalues.sum())
        if trace == 0:
            raise InputError("damping cannot be chosen from features that are all zero: give a number")
        grid_G = trace * torch.logspace(math.log10(_LOWEST), math.log10(_HIGHEST), _GRID, dtype=torch.float64)
        return float(grid_G[int(self.criterion(spectrum, grid_G).argmin())])


@dataclass(frozen=True)
class CrossValidationDamping(SpectralDamping):
    """Generalised cross-validation (Golub, Heath and Wahba 1979): ‖f − f̂‖² / (1 − tr H / N)², the leave-one-out error with equal leverages."""

    def criterion(self, spectrum: Spectrum, dampings_G: Tensor) -> Tensor:
        """N times the mean squared leave-one-out error of f, [G]."""
        w, b = spectrum.eigenvalues, spectrum.coefficients
        damped = w + dampings_G.unsqueeze(1)
        residual_G = spectrum.outputs_square - (b.square() * (2 / damped - w / damped.square())).sum(1)
        freedom_G = 1 - spectrum.effective_dimension(dampings_G) / spectrum.num_rows
        return residual_G.clamp_min(0) / freedom_G.clamp_min(1e-12).square()

    def fingerprint(self) -> dict[str, Any]:
        """The rule, as JSON values."""
        return {"rule": "generalised_cross_validation", "version": 1}


@dataclass(frozen=True)
class EvidenceDamping(SpectralDamping):
    """The marginal likelihood (MacKay 1992) of f ~ N(0, σ² (ΦΦᵀ/λ + I)), with σ² at its maximum."""

    def criterion(self, spectrum: Spectrum, dampings_G: Tensor) -> Tensor:
        """−2 log p(f | λ) up to a constant, [G]."""
        w, b = spectrum.eigenvalues, spectrum.coefficients
        damped = w + dampings_G.unsqueeze(1)
        noise_G = (spectrum.outputs_square - (b.square() / damped).sum(1)) / spectrum.num_rows
        determinant_G = (w / dampings_G.unsqueeze(1)).log1p().sum(1)
        return spectrum.num_rows * noise_G.clamp_min(torch.finfo(torch.float64).tiny).log() + determinant_G

    def fingerprint(self) -> dict[str, Any]:
        """The rule, as JSON values."""
        return {"rule": "evidence", "version": 1}


@dataclass(frozen=True)
class EffectiveDimensionDamping(SpectralDamping):
    """The λ at which Σ w / (w + λ) is a given number.

    Attributes:
        dimension: that number, at most the number of columns.
    """

    dimension: float = 100.0

    def __post_init__(self) -> None:
        if not (isinstance(self.dimension, (int, float)) and 0 < self.dimension < math.inf):
            raise InputError(f"dimension must be a positive number; got {self.dimension!r}")

    def criterion(self, spectrum: Spectrum, dampings_G: Tensor) -> Tensor:
        """How far the effective dimension is from the wanted one, [G]."""
        return (spectrum.effective_dimension(dampings_G).log() - math.log(self.dimension)).abs()

    def fingerprint(self) -> dict[str, Any]:
        """The rule, as JSON values."""
        return {"rule": "effective_dimension", "version": 1, "dimension": float(self.dimension)}
