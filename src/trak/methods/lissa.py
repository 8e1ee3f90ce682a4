"""Influence functions by stochastic Neumann series.

Agarwal, Bullins, Hazan: "Second-Order Stochastic Optimization for Machine Learning in Linear Time", JMLR 2017; as Koh, Liang 2017
("Understanding Black-box Predictions via Influence Functions", section 3) use it.

Shape legend: T targets, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trak import batches
from trak.datasets import DatasetRows, RowSource, TensorRows
from trak.errors import InputError, SingularGramError
from trak.methods.base import Attributor, FittedAttributor
from trak.methods.curvature import LentLoss, Product, check_loss, import_curvlinops, lent_loss
from trak.methods.gradient_passes import Passes, State, influence_attribution, start_passes
from trak.methods.runs import RunOptions
from trak.pipeline import prepare
from trak.progress import bar
from trak.results import Attribution

_POWER_STEPS = 20


@dataclass(frozen=True, eq=False, kw_only=True)
class LiSSAInfluence(RunOptions, Attributor):
    """`InfluenceFunction` with a stochastic solve, for models whose gradients cannot be stored; other arguments as in `trak.attribute`.

        v_0 = ∇f(z),    v_j = ∇f(z) + v_{j−1} − (H_j + λI) v_{j−1} / s,    v_depth / s ≈ (H + λI)⁻¹ ∇f(z)

    H_j is the curvature of the loss on `batch` random training examples. The mean of `repeats` such solves is taken. It converges where
    the eigenvalues of every (H_j + λI) / s lie between 0 and 2, and takes about s/λ steps for the flattest directions: `scale` should be
    no larger than it must be. `info["residuals"]` of the attribution holds ‖(H + λI)v − ∇f‖ / ‖∇f‖ on the whole training set, the largest
    over targets, for each checkpoint: near 0 where the solve is good, near 1 or above where it is not. Needs curvlinops.

    Attributes:
        damping: λ, in the units of the mean loss's second derivative.
        scale: s: at least half of the largest eigenvalue of H_j + λI; the authors' code takes 10.
        depth: steps of a solve.
        batch: training examples of a step.
        repeats: solves whose mean is taken.
        hessian: "gauss_newton" for JᵀL''J with the predictions' Jacobian J, never negative; "exact" for the Hessian.
        seed: of the draws.
    """

    damping: float = 1e-2
    scale: float = 10.0
    depth: int = 1000
    batch: int = 32
    repeats: int = 1
    hessian: str = "gauss_newton"
    seed: int = 0

    def fit(self, train_set: Any, checkpoints: Sequence[Any] | None = None) -> FittedLiSSAInfluence:
        """Checks everything; the work is the targets'.

        Raises:
            InputError: impossible settings, a task whose loss is unknown, or a training set without random access.
            MissingDependencyError: curvlinops is not installed.
            TrakError: anything wrong with the other arguments, the checkpoints or the gradients.
        """
        import_curvlinops("LiSSAInfluence")
        if self.hessian not in ("gauss_newton", "exact"):
            raise InputError(f'hessian must be "gauss_newton" or "exact"; got {self.hessian!r}')
        for name in ("depth", "batch", "repeats"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name} must be a whole number ≥ 1; got {value!r}")
        if not (self.damping >= 0 and math.isfinite(self.damping)):
            raise InputError(f"damping must be a number ≥ 0; got {self.damping!r}")
        if not (self.scale > 0 and math.isfinite(self.scale)):
            raise InputError(f"scale must be a number > 0; got {self.scale!r}")
        passes = start_passes(self, train_set, checkpoints)
        check_loss(passes.setting.task, "LiSSAInfluence")
        draw_batch(passes.train, 1, torch.Generator().manual_seed(self.seed))
        return FittedLiSSAInfluence(self, passes)


@dataclass(frozen=True, eq=False)
class FittedLiSSAInfluence(FittedAttributor):
    """See `LiSSAInfluence`."""

    method: LiSSAInfluence
    passes: Passes

    def attribute(self, targets: Any) -> Attribution:
        """Scores [N, T]: `depth` × `repeats` products with a batch's curvature, then a pass over the training set.

        Raises:
            SingularGramError: the series diverges; the message says which scale to take.
            TrakError: anything wrong with the targets.
        """
        method, residuals = self.method, []

        def solve(index: int, state: State, vectors_TP: Tensor) -> Tensor:
            with lent_loss(self.passes, state, "LiSSAInfluence") as loss:
                solved_TP, residual = self._solve(loss, index, vectors_TP)
            residuals.append(residual)
            return solved_TP

        info: dict[str, Any] = {
            "method": "LiSSA influence function",
            "hessian": method.hessian,
            "damping": method.damping,
            "scale": method.scale,
            "depth": method.depth,
            "batch": method.batch,
            "repeats": method.repeats,
            "seed": method.seed,
            "residuals": residuals,
        }
        return influence_attribution(self.passes, targets, solve, info)

    def _solve(self, loss: LentLoss, index: int, vectors_TP: Tensor) -> tuple[Tensor, float]:
        method, passes = self.method, self.passes
        where = f"checkpoint {index + 1} of {len(passes.sources)}"
        rhs_TP = vectors_TP.to(passes.setting.device)
        generator = torch.Generator().manual_seed(method.seed)
        solved_TP = torch.zeros_like(rhs_TP)
        with bar(
            method.depth * method.repeats, f"LiSSA, {where}", unit="steps", enabled=passes.setting.progress
        ) as shown:

            def products() -> Iterator[Product]:
                for _ in range(method.depth):
                    drawn = prepare(passes.setting, draw_batch(passes.train, method.batch, generator))
                    yield loss.product(method.hessian, drawn)
                    shown.update(1)

            for _ in range(method.repeats):
                solved_TP += lissa(
                    products(), rhs_TP, damping=method.damping, scale=method.scale, where=where
                )
        solved_TP /= method.repeats
        left_TP = loss.product(method.hessian)(solved_TP) + method.damping * solved_TP - rhs_TP
        residual_T = left_TP.norm(dim=1) / rhs_TP.norm(dim=1).clamp_min(torch.finfo(rhs_TP.dtype).tiny)
        return solved_TP.cpu(), float(residual_T.max())


def lissa(products: Iterator[Product], rhs_TP: Tensor, *, damping: float, scale: float, where: str) -> Tensor:
    """(H + λI)⁻¹b for every right-hand side b, [T, P], by one step for each product with a draw of H.

    While no step can lengthen a vector, ‖v_j‖ ≤ (j + 1)‖b‖; a longer one shows that the series diverges.

    Raises:
        SingularGramError: it does.
    """
    limit_T = rhs_TP.norm(dim=1) * (1 + 1e-3)
    vectors_TP = rhs_TP.clone()
    for step, product in enumerate(products, start=1):
        image_TP = product(vectors_TP) + damping * vectors_TP
        previous_TP, vectors_TP = vectors_TP, rhs_TP + vectors_TP - image_TP / scale
        if not bool((vectors_TP.norm(dim=1) <= (step + 1) * limit_T).all()):
            raise SingularGramError(
                _divergence(product, previous_TP, damping, scale, f"{where}, step {step}")
            )
    return vectors_TP / scale


def draw_batch(source: RowSource, size: int, generator: torch.Generator) -> Any:
    """A batch of `size` random examples, drawn with replacement.

    Raises:
        InputError: the source can only be read from the front.
    """
    rows = torch.randint(source.num_rows, (size,), generator=generator)
    if isinstance(source, TensorRows):
        return batches.take(source.data, rows)
    if isinstance(source, DatasetRows):
        return source.collate([source.dataset[row] for row in rows.tolist()])
    raise InputError(
        "LiSSAInfluence draws training examples at random, and this train_set can only be read from the front: pass a dataset with "
        "__getitem__ and __len__, or tensors"
    )


def _divergence(product: Product, start_TP: Tensor, damping: float, scale: float, where: str) -> str:
    """The message: what the step's matrix does to the vector that grew, or else its largest eigenvalue, says what would converge."""
    what = f"{where}: the series diverges with scale={scale:g} and damping={damping:g}."
    vector_TP, image_TP = _unit(start_TP), product(_unit(start_TP))
    along = float((vector_TP * image_TP).sum(1).min())
    if along < -damping:
        return (
            f"{what} The Hessian of this step's batch has an eigenvalue of {along:.3g} or below: set damping={-2 * along:.2g} or larger, or "
            'hessian="gauss_newton"'
        )
    for _ in range(_POWER_STEPS):
        image_TP = product(vector_TP)
        vector_TP = _unit(image_TP)
    size = float(image_TP.norm(dim=1).max())
    if not math.isfinite(size):
        return f"{what} The curvature of this step's batch holds NaN or infinity: look at the loss at this checkpoint"
    return f"{what} The largest eigenvalue of this step's batch is near {size:.3g}: set scale={2 * (size + damping):.2g}, or larger"


def _unit(vectors_TP: Tensor) -> Tensor:
    return vectors_TP / vectors_TP.norm(dim=1, keepdim=True).clamp_min(torch.finfo(vectors_TP.dtype).tiny)
