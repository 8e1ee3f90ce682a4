"""Kronecker factors of a parameter's gradients: the bases in which they are nearly uncorrelated, and how large they are there.

A parameter's gradient as a matrix M [R, C] is turned into the eigenvectors of its two second moments:

    UᵀMV,    E[ρ M Mᵀ] = U L Uᵀ,    E[ρ MᵀM] = V S Vᵀ,    ρ = w / Σ w

with Λ = E[ρ (UᵀMV)²] entry by entry (EK-FAC: George et al., "Fast Approximate Natural Gradient Descent in a Kronecker-factored
Eigenbasis", NeurIPS 2018, arXiv 1806.03884) or Λ = L Sᵀ / Σ S (K-FAC: Martens and Grosse, ICML 2015, arXiv 1503.05671).

Other than in Martens and Grosse's factors the positions of one example (of a sequence, of a convolution) are not taken for independent, so that
all layers are treated alike: for a layer with one position, inputs a and output gradients g, E[ρ M Mᵀ] is E[ρ |a|² g gᵀ]. A bias is a
matrix of one column, and its factors are all of its covariance. A side longer than `largest_side` (an embedding's vocabulary) is not
turned; there K-FAC has EK-FAC's Λ.

Where a projection keeps few entries, only so many have to be measured: K-FAC's Λ says which may be among them (`FactorOptions.candidates`), and
stays for the others, scaled so that the parameter's sum, which is the trace of either moment, is what it was.

Shape legend: R rows and C columns of a parameter as a matrix, k of its entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from trak.errors import ProjectionError
from trak.projection.base import Shapes

LARGEST_VECTOR = 512
"""A longer bias or norm is not turned: R × R numbers, and R³ multiplications for eigenvectors, for R entries of few that are kept."""
FLOOR = 1e-4
"""Of the mean eigenvalue of all parameters, added to every damping: some gradients are zero but for rounding (the bias of an attention's
keys), and divided by their own size they would be noise as large as the rest."""


@dataclass(frozen=True)
class FactorOptions:
    """How factors are fitted.

    Attributes:
        kind: "ekfac" or "kfac".
        sample: training rows that they are fitted to, None for all.
        largest_side: a longer side of a parameter is not turned; of a vector, one longer than `LARGEST_VECTOR`.
        candidates: of EK-FAC: Λ is measured for so many entries, those with K-FAC's largest over all parameters (of a side that is not turned with
            the diagonal of its moment); None, or no fewer than there are entries: for all.
    """

    kind: str
    sample: int | None
    largest_side: int
    candidates: int | None = None

    def turns(self, size: int, *, is_vector: bool) -> bool:
        """Whether a side of this length is turned."""
        return size <= (min(self.largest_side, LARGEST_VECTOR) if is_vector else self.largest_side)


@dataclass(frozen=True, eq=False)
class Factors:
    """One parameter's factors at one checkpoint.

    Attributes:
        rows: U [R, R], None for a side that is not turned.
        columns: V [C, C], likewise.
        eigenvalues: Λ [R, C], at least 0.
        floor: the least damping, `FLOOR` times the mean eigenvalue of all parameters.
    """

    rows: Tensor | None
    columns: Tensor | None
    eigenvalues: Tensor
    floor: float = 0.0

    def scale(self, whitening: float | None, *, least: float = 0.0) -> Tensor:
        """1 / sqrt(Λ + λ), [R, C], with λ = whitening · mean(Λ) + floor, or `least` if that is more; ones for None."""
        if whitening is None:
            return torch.ones_like(self.eigenvalues)
        damping = whitening * self.eigenvalues.mean() + self.floor
        return (self.eigenvalues + damping.clamp_min(least)).rsqrt()

    def to(self, device: torch.device, dtype: torch.dtype) -> Factors:
        """The factors on a device, in a dtype."""
        moved = [
            None if tensor is None else tensor.to(device=device, dtype=dtype)
            for tensor in (self.rows, self.columns, self.eigenvalues)
        ]
        assert moved[2] is not None
        return Factors(moved[0], moved[1], moved[2], self.floor)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(R, C): a parameter seen as a matrix, as in `Block.matrix_shape`."""
    return (shape[0], prod(shape[1:])) if shape else (1, 1)


def with_floor(factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """The factors of all parameters with the floor that they have in common.

    Raises:
        ProjectionError: all eigenvalues are zero, or one is not finite.
    """
    total = sum(float(found.eigenvalues.double().sum()) for found in factors.values())
    mean = total / sum(found.eigenvalues.numel() for found in factors.values())
    if not 0 < mean < float("inf"):
        raise ProjectionError(
            f"the mean square of the gradients that factors are fitted to is {mean}, expected a finite number above 0: look at the "
            "model's outputs for these rows, and at parameters="
        )
    return {name: replace(found, floor=FLOOR * mean) for name, found in factors.items()}


def factors_to_tensors(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """All factors as named tensors, to be kept."""
    tensors = {"floor": torch.tensor(next(iter(factors.values())).floor, dtype=torch.float64)}
    for name, found in factors.items():
        tensors[f"eigenvalues:{name}"] = found.eigenvalues
        if found.rows is not None:
            tensors[f"rows:{name}"] = found.rows
        if found.columns is not None:
            tensors[f"columns:{name}"] = found.columns
    return tensors


def factors_from_tensors(tensors: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Factors]:
    """Factors from what `factors_to_tensors` made of them.

    Raises:
        ProjectionError: they belong to other parameters.
    """
    try:
        factors = {
            name: Factors(
                tensors.get(f"rows:{name}"),
                tensors.get(f"columns:{name}"),
                tensors[f"eigenvalues:{name}"],
                float(tensors["floor"]),
            )
            for name in shapes
        }
    except KeyError as error:
        raise ProjectionError(
            f"kept factors have no tensor {error}: they belong to other parameters"
        ) from None
    check_factors(factors, shapes)
    return factors


def check_factors(factors: Mapping[str, Factors], shapes: Shapes) -> None:
    """Raise ProjectionError unless there are factors of the right size for every parameter."""
    for name, shape in shapes.items():
        if name not in factors:
            raise ProjectionError(
                f"no factors for parameter {name!r}: they were fitted for {len(factors)} others; fit them with the same parameters="
            )
        rows, columns = matrix_shape(shape)
        found = factors[name]
        sizes = [None if side is None else tuple(side.shape) for side in (found.rows, found.columns)]
        good = sizes[0] in (None, (rows, rows)) and sizes[1] in (None, (columns, columns))
        if not good or tuple(found.eigenvalues.shape) != (rows, columns):
            raise ProjectionError(
                f"factors of parameter {name!r} have sizes {sizes[0]}, {sizes[1]} and {tuple(found.eigenvalues.shape)}, expected "
                f"{(rows, rows)}, {(columns, columns)} and {(rows, columns)}; fit them for this model"
            )
