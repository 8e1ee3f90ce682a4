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
from trak.methods.outer_products import OuterProduct, OuterProducts
from trak.methods.runs import RunOptions
from trak.progress import bar
from trak.results import Attribution
from trak.setting import prepare

_POWER_STEPS = 20
_SCALE_DRAWS, _LEAST_SCALE = 8, 10.0
MOST_PREDICTIONS = 2
"""Up to so many a loss is a function of one output: one prediction, or the difference of two classes' logits."""


@dataclass(frozen=True, eq=False, kw_only=True)
class LiSSAInfluence(RunOptions, Attributor):
    """`InfluenceFunction` with a stochastic solve, for models whose gradients cannot be stored; other arguments as in `trak.attribute`.

        v_0 = ∇f(z),    v_j = ∇f(z) + v_{j−1} − (H_j + λI) v_{j−1} / s,    v_depth / s ≈ (H + λI)⁻¹ ∇f(z)

    H_j is the curvature of the loss on `batch` random training examples. The mean of `repeats` such solves is taken. It converges where
    the eigenvalues of every (H_j + λI) / s lie between 0 and 2, and takes about s/λ steps for the flattest directions: `scale` should be
    no larger than it must be. `info["residuals"]` of the attribution holds ‖(H + λI)v − ∇f‖ / ‖∇f‖ on the whole training set, the largest
    over targets, for each checkpoint: near 0 where the solve is good, near 1 or above where it is not. Needs curvlinops.

    All targets step together. Where the loss is a function of one output (regression, log losses, two classes) a step of the Gauss-Newton
    matrix is the gradients of its examples, once, and two matrix products; else the loss is differentiated anew for every target. Three
    [T, P] arrays are in memory, and a batch's gradients.

    Attributes:
        damping: λ, in the units of the mean loss's second derivative.
        scale: s: at least half of the largest eigenvalue of H_j + λI. The authors' code takes 10, which diverges for many networks; "auto"
            takes the largest eigenvalue of the first eight draws plus λ, but 10 at least. `info["scales"]` says what it was.
        depth: steps of a solve.
        batch: training examples of a step.
        repeats: solves whose mean is taken.
        hessian: "gauss_newton" for JᵀL''J with the predictions' Jacobian J, never negative; "exact" for the Hessian.
        seed: of the draws.
    """

    damping: float = 1e-2
    scale: float | str = 10.0
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
        is_number = not isinstance(self.scale, str) and self.scale > 0 and math.isfinite(self.scale)
        if not (is_number or self.scale == "auto"):
            raise InputError(f'scale must be a number > 0, or "auto"; got {self.scale!r}')
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
        method = self.method
        residuals: list[float] = []
        scales: list[float] = []

        def solve(index: int, state: State, vectors_TP: Tensor) -> Tensor:
            with lent_loss(self.passes, state, "LiSSAInfluence") as loss:
                is_single = method.hessian == "gauss_newton" and loss.num_predictions <= MOST_PREDICTIONS
                if not is_single:
                    curvature: Curvature = _Differentiated(loss, method.hessian)
                    solved_TP, residual, scale = self._solve(curvature, index, vectors_TP)
            if is_single:
                curvature = OuterProducts(self.passes, state)
                solved_TP, residual, scale = self._solve(curvature, index, vectors_TP)
            residuals.append(residual)
            scales.append(scale)
            return solved_TP

        info: dict[str, Any] = {
            "method": "LiSSA influence function",
            "hessian": method.hessian,
            "damping": method.damping,
            "scale": method.scale,
            "scales": scales,
            "depth": method.depth,
            "batch": method.batch,
            "repeats": method.repeats,
            "seed": method.seed,
            "residuals": residuals,
        }
        return influence_attribution(self.passes, targets, solve, info)

    def _solve(self, curvature: Curvature, index: int, vectors_TP: Tensor) -> tuple[Tensor, float, float]:
        method, passes = self.method, self.passes
        scale = self._largest(curvature) if isinstance(method.scale, str) else method.scale
        where = f"checkpoint {index + 1} of {len(passes.sources)}"
        rhs_TP = vectors_TP.to(passes.setting.device)
        generator = torch.Generator().manual_seed(method.seed)
        solved_TP: Tensor | None = None
        with bar(
            method.depth * method.repeats, f"LiSSA, {where}", unit="steps", enabled=passes.setting.progress
        ) as shown:

            def products() -> Iterator[Product]:
                for _ in range(method.depth):
                    drawn = prepare(passes.setting, draw_batch(passes.train, method.batch, generator))
                    yield curvature.product(drawn)
                    shown.update(1)

            for _ in range(method.repeats):
                found_TP = lissa(products(), rhs_TP, damping=method.damping, scale=scale, where=where)
                solved_TP = found_TP if solved_TP is None else solved_TP.add_(found_TP)
        assert solved_TP is not None
        solved_TP /= method.repeats
        left_TP = curvature.mean_product(solved_TP).add_(solved_TP, alpha=method.damping).sub_(rhs_TP)
        residual_T = left_TP.norm(dim=1) / rhs_TP.norm(dim=1).clamp_min(torch.finfo(rhs_TP.dtype).tiny)
        return solved_TP.cpu(), float(residual_T.max()), scale

    def _largest(self, curvature: Curvature) -> float:
        """The scale of "auto"."""
        method, passes = self.method, self.passes
        generator = torch.Generator().manual_seed(method.seed)  # the solve's: these are its first draws
        largest = 0.0
        for _ in range(_SCALE_DRAWS):
            product = curvature.product(
                prepare(passes.setting, draw_batch(passes.train, method.batch, generator))
            )
            if isinstance(product, OuterProduct):
                found = product.largest_eigenvalue()
            else:
                start_P = torch.randn(
                    passes.num_parameters, generator=torch.Generator().manual_seed(method.seed)
                )
                start_P = start_P.to(passes.setting.device, passes.setting.sum_dtype)
                found = _power_iteration(product, start_P.unsqueeze(0))
            largest = max(largest, found)
        return max(largest + method.damping, _LEAST_SCALE)


@dataclass(frozen=True, eq=False)
class _Differentiated:
    """A curvature matrix by differentiating the loss for every vector: the reference for `OuterProducts`, for any number of classes."""

    loss: LentLoss
    matrix: str

    def product(self, batch: Any) -> Product:
        """V [T, P] -> H V, [T, P], of one prepared batch."""
        return self.loss.product(self.matrix, batch)

    def mean_product(self, vectors_TP: Tensor) -> Tensor:
        """H V of the whole training set, [T, P]."""
        return self.loss.product(self.matrix)(vectors_TP)


Curvature = OuterProducts | _Differentiated


def lissa(products: Iterator[Product], rhs_TP: Tensor, *, damping: float, scale: float, where: str) -> Tensor:
    """(H + λI)⁻¹b for every right-hand side b, [T, P], by one step for each product with a draw of H.

    While no step can lengthen a vector, ‖v_j‖ ≤ (j + 1)‖b‖; a longer one shows that the series diverges.

    Raises:
        SingularGramError: it does.
    """
    limit_T = rhs_TP.norm(dim=1) * (1 + 1e-3)
    vectors_TP = rhs_TP.clone()
    for step, product in enumerate(products, start=1):
        # In place: for a large model every copy is gigabytes.
        if isinstance(product, OuterProduct):
            product.add(vectors_TP, to=vectors_TP, keep=1 - damping / scale, factor=-1 / scale)
        else:
            image_TP = product(vectors_TP)
            vectors_TP.mul_(1 - damping / scale).sub_(image_TP, alpha=1 / scale)
        vectors_TP += rhs_TP
        if not bool((vectors_TP.norm(dim=1) <= (step + 1) * limit_T).all()):
            raise SingularGramError(_divergence(product, vectors_TP, damping, scale, f"{where}, step {step}"))
    return vectors_TP.div_(scale)


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
    size = _power_iteration(product, vector_TP)
    if not math.isfinite(size):
        return f"{what} The curvature of this step's batch holds NaN or infinity: look at the loss at this checkpoint"
    return f"{what} The largest eigenvalue of this step's batch is near {size:.3g}: set scale={2 * (size + damping):.2g}, or larger"


def _power_iteration(product: Product, start_TP: Tensor) -> float:
    """The largest |eigenvalue|, nearly."""
    vector_TP = _unit(start_TP)
    for _ in range(_POWER_STEPS):
        image_TP = product(vector_TP)
        vector_TP = _unit(image_TP)
    return float(image_TP.norm(dim=1).max())


def _unit(vectors_TP: Tensor) -> Tensor:
    return vectors_TP / vectors_TP.norm(dim=1, keepdim=True).clamp_min(torch.finfo(vectors_TP.dtype).tiny)
