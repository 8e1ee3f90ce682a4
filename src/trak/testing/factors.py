"""Features in the eigenbasis of Kronecker factors, written out densely: the readable reference of `trak.Eigenbasis` and `trak.Whitened`.

Legend: N examples, P parameters, R rows and C columns of a parameter as a matrix, K features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from trak.blocks import Block
from trak.projection import Columns, Factors, FittedProjection, Projection, ProjectionState, Shapes
from trak.projection.factors import FLOOR, LARGEST_VECTOR, matrix_shape


def reference_factors(
    gradients_NP: Tensor,
    weights_N: Tensor,
    shapes: Shapes,
    *,
    kind: str = "ekfac",
    largest_side: int = 2048,
    largest_vector: int = LARGEST_VECTOR,
    candidates: int | None = None,
) -> dict[str, Factors]:
    """The factors of every parameter from dense gradients, parameters side by side in the order of `shapes`."""
    weights_N = (weights_N / weights_N.sum()).to(gradients_NP)
    found, products, first = {}, {}, 0
    for name, shape in shapes.items():
        rows, columns = matrix_shape(shape)
        matrices_NRC = gradients_NP[:, first : first + rows * columns].reshape(-1, rows, columns)
        first += rows * columns
        moment_RR = torch.einsum("n,nrc,nsc->rs", weights_N, matrices_NRC, matrices_NRC)
        moment_CC = torch.einsum("n,nrc,nrd->cd", weights_N, matrices_NRC, matrices_NRC)
        values_R, basis_RR = torch.linalg.eigh(moment_RR)
        values_C, basis_CC = torch.linalg.eigh(moment_CC)
        most = min(largest_side, largest_vector) if columns == 1 else largest_side
        is_long = [size > most for size in (rows, columns)]
        basis_RR = torch.eye(rows).to(basis_RR) if is_long[0] else basis_RR
        basis_CC = torch.eye(columns).to(basis_CC) if is_long[1] else basis_CC
        turned_NRC = basis_RR.T @ matrices_NRC @ basis_CC
        eigenvalues_RC = torch.einsum("n,nrc->rc", weights_N, turned_NRC**2)
        if kind == "ekfac" or not any(is_long):
            values_R = moment_RR.diagonal() if is_long[0] else values_R
            values_C = moment_CC.diagonal() if is_long[1] else values_C
            products[name] = torch.outer(values_R, values_C) / values_C.sum()
        found[name] = Factors(basis_RR, basis_CC, eigenvalues_RC)
    if kind == "kfac":
        found |= {name: replace(found[name], eigenvalues=product) for name, product in products.items()}
    elif candidates is not None and candidates < gradients_NP.shape[1]:
        found |= _with_candidates(found, products, candidates)
    mean = torch.cat([one.eigenvalues.flatten() for one in found.values()]).mean()
    return {name: replace(one, floor=FLOOR * float(mean)) for name, one in found.items()}


def _with_candidates(
    found: Mapping[str, Factors], products: Mapping[str, Tensor], count: int
) -> dict[str, Factors]:
    """Λ of the `count` entries with the largest products, and for the others the products, scaled so that each parameter's sum stays."""
    matrices = {name: product for name, product in products.items() if product.shape[1] > 1}
    every_P = torch.cat([product.flatten() for product in matrices.values()])
    least = every_P.sort(descending=True).values[min(count, len(every_P)) - 1]
    mixed = {}
    for name, product_RC in matrices.items():
        measured_RC, is_measured_RC = found[name].eigenvalues, product_RC >= least
        rest_RC = torch.where(is_measured_RC, 0, product_RC)
        left = measured_RC.sum() - measured_RC[is_measured_RC].sum()
        if rest_RC.sum() > 0:
            rest_RC = rest_RC * (left / rest_RC.sum())
        mixed[name] = replace(found[name], eigenvalues=torch.where(is_measured_RC, measured_RC, rest_RC))
    return mixed


def reference_features(
    gradients_NP: Tensor,
    factors: Mapping[str, Factors],
    shapes: Shapes,
    *,
    dim: int | None = None,
    whitening: float | None = 1.0,
) -> Tensor:
    """UᵀMV / sqrt(Λ + λ) of every parameter, [N, P], or the `dim` entries with the largest Λ, in descending order, λ being no less than those."""
    eigenvalues_P = torch.cat([factors[name].eigenvalues.flatten() for name in shapes])
    order_P = eigenvalues_P.argsort(descending=True, stable=True)[:dim]
    least = float(eigenvalues_P[order_P[-1]])
    parts, first = [], 0
    for name, shape in shapes.items():
        rows, columns = matrix_shape(shape)
        matrices_NRC = gradients_NP[:, first : first + rows * columns].reshape(-1, rows, columns)
        first += rows * columns
        own = factors[name]
        assert own.rows is not None and own.columns is not None
        turned_NRC = own.rows.T @ matrices_NRC @ own.columns
        if whitening is not None:
            damping = max(whitening * float(own.eigenvalues.mean()) + own.floor, least)
            turned_NRC = turned_NRC / (own.eigenvalues + damping).sqrt()
        parts.append(turned_NRC.flatten(1))
    features_NP = torch.cat(parts, 1)
    return features_NP if dim is None else features_NP[:, order_P]


def reference_kernel(
    gradients_NP: Tensor, factors: Mapping[str, Factors], shapes: Shapes, *, whitening: float
) -> Tensor:
    """Σ_p g_p(i)ᵀ (F_p + λ_p I)⁻¹ g_p(j), [N, N]: EK-FAC influence, with each F = (U ⊗ V) Λ (U ⊗ V)ᵀ formed and inverted."""
    kernel_NN, first = gradients_NP.new_zeros(len(gradients_NP), len(gradients_NP)), 0
    for name, shape in shapes.items():
        part_NP = gradients_NP[:, first : first + prod(shape)]
        first += prod(shape)
        own = factors[name]
        assert own.rows is not None and own.columns is not None
        basis_PP = torch.kron(own.rows.contiguous(), own.columns.contiguous())
        fisher_PP = basis_PP @ own.eigenvalues.flatten().diag() @ basis_PP.T
        damping = whitening * fisher_PP.trace() / len(fisher_PP) + own.floor
        damped_PP = fisher_PP + damping * torch.eye(len(fisher_PP)).to(fisher_PP)
        kernel_NN += part_NP @ torch.linalg.solve(damped_PP, part_NP.T)
    return kernel_NN


class Known(Projection):
    """A fitted projection with its factors in hand: an ordinary one, to which `trak.testing.projection.CHECKS` apply."""

    def __init__(self, fitted: FittedProjection, factors: Mapping[str, Factors]) -> None:
        self.fitted, self.factors = fitted, factors

    def __repr__(self) -> str:
        return repr(self.fitted)

    @property
    def kind(self) -> str:
        """That of the fitted projection."""
        return self.fitted.kind

    @property
    def version(self) -> int:
        """That of the fitted projection."""
        return self.fitted.version

    def columns(self, shapes: Shapes) -> tuple[Columns, ...]:
        """Those of the fitted projection."""
        return self.fitted.columns(shapes)

    def init(self, shapes: Shapes, **options: Any) -> ProjectionState:
        """With the factors."""
        return self.fitted.init(shapes, factors=self.factors, **options)

    def add(self, state: ProjectionState, block: Block, out_BK: Tensor) -> None:
        """As the fitted projection."""
        self.fitted.add(state, block, out_BK)

    def matrix(self, state: ProjectionState, name: str) -> Tensor:
        """As the fitted projection."""
        return self.fitted.matrix(state, name)

    def fingerprint(self) -> dict[str, Any]:
        """As the fitted projection."""
        return self.fitted.fingerprint()
