"""Gauss-Newton products from per-example gradients, where the loss is a function of one output f.

    1/B Σ_j ∇f_j L''(f_j) ∇f_jᵀ v,    two matrix products for all vectors at once

With one output, or two classes (f is the difference of their logits), this is JᵀL''J of the predictions, the same matrix as
`LentLoss.product`, which differentiates anew for every vector.

Shape legend: T vectors, B examples of a batch, P parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from trak import batches
from trak.methods.curvature import loss_curvature
from trak.methods.gradient_passes import Passes, State
from trak.methods.whole_gradients import WholeGradients
from trak.setting import prepare


@dataclass(frozen=True, eq=False)
class OuterProduct:
    """Σ_j c_j ∇f_j∇f_jᵀ of a batch.

    Attributes:
        features: ∇f, [B, P].
        factors: c, [B].
    """

    features: Tensor
    factors: Tensor

    def __call__(self, vectors_TP: Tensor) -> Tensor:
        """V [T, P] -> H V, [T, P]."""
        return self._along(vectors_TP) @ self.features

    def add(self, vectors_TP: Tensor, *, to: Tensor, keep: float = 1.0, factor: float = 1.0) -> None:
        """`to` ← keep · `to` + factor · H V, [T, P], without another array of this size; `to` may be V itself."""
        to.addmm_(self._along(vectors_TP), self.features, beta=keep, alpha=factor)

    def largest_eigenvalue(self) -> float:
        """Of H, from the B × B matrix with the same eigenvalues; the factors must not be negative."""
        weighted_BP = self.features * self.factors.sqrt().unsqueeze(1)
        return float(torch.linalg.eigvalsh((weighted_BP @ weighted_BP.T).double())[-1])

    def _along(self, vectors_TP: Tensor) -> Tensor:
        return vectors_TP @ self.features.T * self.factors


@dataclass(frozen=True, eq=False)
class OuterProducts:
    """The Gauss-Newton matrix of f at one checkpoint.

    Attributes:
        passes: the training set.
        state: the checkpoint, on the device.
    """

    passes: Passes
    state: State

    @cached_property
    def _gradients(self) -> WholeGradients:
        return WholeGradients(self.passes.setting, self.state)

    def product(self, batch: Any) -> OuterProduct:
        """H of one prepared batch, whose gradients are computed now; it is valid until the next batch's.

        Raises:
            InputError: a loss that is no function of f.
            NonFiniteError: an output, a weight or a gradient is NaN or infinite.
        """
        features_BP, outputs = self._gradients(batch, label="a batch of the curvature")
        curvature_B = loss_curvature(self.passes.setting.task, outputs.f, outputs.q).to(features_BP)
        return OuterProduct(features_BP, curvature_B / len(curvature_B))

    def mean_product(self, vectors_TP: Tensor) -> Tensor:
        """H V of the whole training set, [T, P], in one pass over it."""
        out_TP, total = torch.zeros_like(vectors_TP), self.passes.train.num_rows
        for _, batch in self.passes.train.batches():
            prepared = prepare(self.passes.setting, batch)
            product, share = self.product(prepared), batches.batch_size(prepared) / total
            product.add(vectors_TP, to=out_TP, factor=share)
        return out_TP
