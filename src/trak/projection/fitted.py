"""Projections that are fitted to training gradients at every checkpoint, and what their options may be.

Ordinary kinds are a pure function of seed, checkpoint and names. A fitted kind takes `factors` besides, which the run finds from a sample of
the training set before anything is featurized at a checkpoint, and keeps in the store: training rows and targets have to meet the same.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trak.errors import ProjectionError
from trak.projection.base import Projection, ProjectionState, Shapes
from trak.projection.checks import check_integer
from trak.projection.entries import Leading
from trak.projection.factors import FactorOptions, Factors, check_factors

DEFAULT_SAMPLE = 2000
"""Training rows that factors are fitted to; design/whitening.md has the figures."""
LARGEST_SIDE = 2048


@dataclass(frozen=True, kw_only=True)
class FittedProjection(Projection):
    """A projection whose matrix depends on Kronecker factors of the training gradients (`trak.projection.factors`).

    It is a linear map all the same, but no random one: inner products of features are not those of gradients.

    Attributes:
        whitening: λ over the mean of the parameter's Λ; None does not divide, where a kind allows that.
        factors: "ekfac", Λ as measured, or "kfac", the product of the two factors' eigenvalues.
        sample: training rows that factors are fitted to, one drawn from each of so many equal parts of the training set; None for all.
        largest_side: a side of a parameter longer than that is not turned.
    """

    whitening: float | None = 1.0
    factors: str = "ekfac"
    sample: int | None = DEFAULT_SAMPLE
    largest_side: int = LARGEST_SIDE

    def __post_init__(self) -> None:
        check_fitted_options(self.whitening, self.factors, self.sample, self.largest_side)

    @property
    @abstractmethod
    def candidates(self) -> int | None:
        """Entries whose mean squares are measured (`FactorOptions.candidates`)."""

    @property
    def factor_options(self) -> FactorOptions:
        """How its factors are fitted."""
        return FactorOptions(self.factors, self.sample, self.largest_side, self.candidates)

    def fingerprint(self) -> dict[str, Any]:
        """What decides the numbers, but for the factors; kinds add what they have besides."""
        return {
            "kind": self.kind,
            "version": self.version,
            "whitening": self.whitening,
            "factors": self.factors,
            "sample": self.sample,
            "largest_side": self.largest_side,
        }

    @abstractmethod
    def init(
        self,
        shapes: Shapes,
        *,
        checkpoint: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        factors: Mapping[str, Factors | Leading] | None = None,
    ) -> ProjectionState:
        """The matrix for one checkpoint, from its factors or from what `from_kept` gives.

        Raises:
            ProjectionError: no factors, or those of other parameters; or as for other kinds.
        """

    @abstractmethod
    def to_keep(self, shapes: Shapes, factors: Mapping[str, Factors]) -> dict[str, Tensor]:
        """What `init` needs of factors, as named tensors.

        Raises:
            ProjectionError: factors of other parameters.
        """

    @abstractmethod
    def from_kept(self, shapes: Shapes, tensors: Mapping[str, Tensor]) -> Mapping[str, Factors | Leading]:
        """What `to_keep` gave, for `init`.

        Raises:
            ProjectionError: it belongs to other parameters, or to another kind.
        """


def require_factors(
    projection: FittedProjection, factors: Mapping[str, Factors | Leading] | None, shapes: Shapes
) -> Mapping[str, Factors]:
    """The whole factors, or ProjectionError if there are none or they do not fit the parameters."""
    if factors is None:
        raise ProjectionError(
            f"{projection!r} is fitted to training gradients, and there are no factors: trak.attribute and trak.TRAK fit them by themselves, "
            "with trak.TRAKer call fit_factors(train_set) after load_checkpoint(), and give what you have to init(..., factors=...)"
        )
    whole = {name: found for name, found in factors.items() if isinstance(found, Factors)}
    if len(whole) < len(factors):
        raise ProjectionError(
            f"{projection!r} needs whole factors, and there are kept entries of an Eigenbasis: fit factors for it"
        )
    check_factors(whole, shapes)
    return whole


def check_fitted_options(whitening: Any, factors: Any, sample: Any, largest_side: Any) -> None:
    """Raise ProjectionError unless these are options of a fitted kind."""
    is_number = isinstance(whitening, (int, float)) and not isinstance(whitening, bool)
    if whitening is not None and not (is_number and 0 <= whitening < math.inf):
        raise ProjectionError(
            f"whitening must be a number ≥ 0, the damping in units of the mean eigenvalue; got {whitening!r}"
        )
    if factors not in ("ekfac", "kfac"):
        raise ProjectionError(f'factors must be "ekfac" or "kfac"; got {factors!r}')
    if sample is not None:
        check_integer("sample (training rows to fit factors to; None for all)", sample, at_least=1)
    check_integer("largest_side", largest_side, at_least=1)
