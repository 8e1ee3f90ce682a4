"""Influence functions with an explicit solve.

Koh, Liang: "Understanding Black-box Predictions via Influence Functions", ICML 2017. Damping, and a Gauss-Newton matrix in the Hessian's
place, as Bae et al. 2022 ("If Influence Functions are the Answer, Then What is the Question?") use them.

Shape legend: N training rows, R rows of one block, B examples of a batch, T targets, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trak.datasets import as_rows
from trak.errors import InputError
from trak.gradients import lend
from trak.gradients.base import random_state_kept
from trak.methods.base import Attributor, FittedAttributor
from trak.methods.conjugate_gradients import Product, conjugate_gradients
from trak.methods.curvature import loss_curvature
from trak.methods.dot_scores import DotScores, Part
from trak.methods.gradient_passes import start_passes
from trak.methods.influence_span import FittedSpanInfluence, fit_in_span
from trak.methods.runs import Run, RunOptions, featurize_targets, start_run
from trak.projection import Identity
from trak.results import Attribution
from trak.setting import prepare


@dataclass(frozen=True, eq=False, kw_only=True)
class InfluenceFunction(RunOptions, Attributor):
    """What a training example's presence does to f, to first order; other arguments as in `trak.attribute`.

        τ(z_i, z) = −1/(M N) Σ_m ∇f_m(z)ᵀ (H_m + λI)⁻¹ ∇L_m(z_i),    H_m = 1/N Σ_j ∇²L_m(z_j)

    L is the loss that the task's weight belongs to, −∂L/∂f = q: cross-entropy for the classification tasks, half the squared error
    for regression. Positive: the example's presence raises f(z). The scores estimate changes of f themselves, not only their order.

    Each target needs a solve by conjugate gradients. With space="parameters" all P numbers of each example's gradient are kept, and each
    step reads them: for small models, or for a few layers (`parameters=`). With space="gradients" the N × N inner products of the
    training gradients stand for them, which is exact, and every step is P/N times cheaper: for fewer examples than parameters, some ten
    thousand at the most. Gradients are then computed where they are needed, N²P/2 multiplications in all, and none are kept. For more
    see `EKFACInfluence`, `ArnoldiInfluence` and `LiSSAInfluence`.

    Attributes:
        damping: λ, in the units of the mean loss's second derivative. Weight decay of wd/2 ‖θ‖² in training adds wd to it.
        hessian: "gauss_newton" for 1/N Σ_j L''(f_j) ∇f_j∇f_jᵀ, never negative and equal to the Hessian where f is linear in the
            parameters; "exact" for the Hessian, by differentiating twice, which for a neural network often has negative eigenvalues.
        tolerance: the residual at which a solve stops, relative to ‖∇f(z)‖.
        max_iter: steps of a solve, at the most.
        space: "parameters" or "gradients": where the solve is done. The latter is for the Gauss-Newton matrix, and has no use for
            `save_dir` and `feature_dtype`.
    """

    damping: float = 1e-3
    hessian: str = "gauss_newton"
    tolerance: float = 1e-5
    max_iter: int = 1000
    space: str = "parameters"

    def fit(
        self, train_set: Any, checkpoints: Sequence[Any] | None = None
    ) -> FittedInfluenceFunction | FittedSpanInfluence:
        """Gradients of the training set at every checkpoint, or their inner products.

        Raises:
            InputError: impossible settings, a projection, or a task whose q is not a function of f.
            TrakError: anything wrong with the other arguments, the checkpoints, the gradients or the store.
        """
        self._check_settings()
        if self.projection is not None and not isinstance(self.projection, Identity):
            raise InputError(
                f"InfluenceFunction solves in the parameters themselves and takes no projection; got {self.projection!r}. Choose fewer "
                "parameters=, or use TRAK"
            )
        if self.space == "gradients":
            passes = start_passes(self, train_set, checkpoints)
            return fit_in_span(passes, solver=self._solver(), info=self._info())
        run = start_run(replace(self, projection=Identity()), train_set, checkpoints)
        curvatures = []
        for model_id in run.model_ids:
            rows = run.store.rows(model_id)
            curvatures.append(loss_curvature(run.setting.task, rows.outputs(), rows.weights()))
        return FittedInfluenceFunction(self, run, tuple(curvatures))

    def _check_settings(self) -> None:
        if self.hessian not in ("gauss_newton", "exact"):
            raise InputError(f'hessian must be "gauss_newton" or "exact"; got {self.hessian!r}')
        if self.space not in ("parameters", "gradients"):
            raise InputError(f'space must be "parameters" or "gradients"; got {self.space!r}')
        if self.space == "gradients" and self.hessian != "gauss_newton":
            raise InputError(
                f'space="gradients" holds the Gauss-Newton matrix and no other: hessian={self.hessian!r} needs space="parameters"'
            )
        if not (self.damping >= 0 and math.isfinite(self.damping)):
            raise InputError(f"damping must be a number ≥ 0; got {self.damping!r}")
        if not (0 < self.tolerance < 1 and self.max_iter >= 1):
            raise InputError(
                f"tolerance must lie between 0 and 1 and max_iter be ≥ 1; got {self.tolerance!r} and {self.max_iter!r}"
            )

    def _solver(self) -> dict[str, Any]:
        return {"damping": self.damping, "tolerance": self.tolerance, "max_iter": self.max_iter}

    def _info(self) -> dict[str, Any]:
        return {
            "method": "influence function",
            "hessian": self.hessian,
            **self._solver(),
            "space": self.space,
        }


@dataclass(frozen=True, eq=False)
class FittedInfluenceFunction(FittedAttributor):
    """See `InfluenceFunction`.

    Attributes:
        curvatures: L''(f) of each training row, [N] float64, for each checkpoint.
    """

    method: InfluenceFunction
    run: Run
    curvatures: tuple[Tensor, ...]

    def attribute(self, targets: Any) -> Attribution:
        """Solves (H_m + λI) v = ∇f_m(z) for every target now; the scores [N, T] are computed where they are read.

        Raises:
            SingularGramError: H_m + λI is not positive definite, or a solve does not converge.
            TrakError: anything wrong with the targets.
        """
        run, method = self.run, self.method
        target_rows = as_rows(targets, batch_size=run.options.batch_size, what="targets")
        experiment = featurize_targets(run, target_rows)
        factor = 1 / (run.train.num_rows * len(run.model_ids))
        parts, outputs = [], []
        for index, (model_id, state) in enumerate(run.states()):
            rows = run.store.rows(model_id, experiment)
            block = rows.read(0, rows.num_rows)
            product = self._product(model_id, state, self.curvatures[index])
            solved_TP = conjugate_gradients(
                product,
                block.features.double(),
                where=f"checkpoint {index + 1} of {len(run.model_ids)}",
                **method._solver(),
            )
            parts.append(Part(run.store.rows(model_id), solved_TP.to(block.features.dtype), factor))
            outputs.append(block.outputs)
        return Attribution(
            scores=DotScores(tuple(parts), run.setting.device, progress=run.setting.progress),
            weights=torch.stack([part.rows.weights() for part in parts]).mean(0),
            outputs=torch.stack(outputs).mean(0),
            info={
                **method._info(),
                "checkpoints": [run.store.checkpoint_fingerprint(model_id) for model_id in run.model_ids],
                "task": dict(run.store.header.task),
            },
            train_rows=run.train,
            target_rows=target_rows,
        )

    def _product(self, model_id: int, state: Mapping[str, Tensor], curvature_N: Tensor) -> Product:
        if self.method.hessian == "exact":
            return lambda vectors: hessian_product(self.run, state, curvature_N, vectors)
        return lambda vectors: gauss_newton_product(self.run.store.rows(model_id), curvature_N, vectors)


def gauss_newton_product(rows: Any, curvature_N: Tensor, vectors_TP: Tensor) -> Tensor:
    """1/N Σ_j L''(f_j) ∇f_j (∇f_jᵀv) of every vector v, [T, P] float64, from stored gradients."""
    out_TP = torch.zeros_like(vectors_TP)
    for block in rows.blocks():
        features_RP = block.features.double()
        along_TR = vectors_TP @ features_RP.T * curvature_N[block.start : block.stop]
        out_TP.addmm_(along_TR, features_RP)
    return out_TP / rows.num_rows


def hessian_product(run: Run, state: Mapping[str, Tensor], curvature_N: Tensor, vectors_TP: Tensor) -> Tensor:
    """1/N Σ_j ∇²L(z_j) v of every vector v, [T, P] float64, by differentiating twice."""
    setting = run.setting
    # The order of the stored features' columns.
    placements = Identity().init(setting.shapes).placements
    names = sorted(setting.shapes, key=lambda name: placements[name].start)
    attributed = [state[name].detach().requires_grad_() for name in names]
    out_TP = torch.zeros_like(vectors_TP)
    for rows_B, batch in run.train.batches():
        with (
            random_state_kept(state),
            lend(setting.model, {**state, **dict(zip(names, attributed))}) as lent,
            torch.enable_grad(),
        ):
            outputs_B, weights_B = setting.task.output_and_weight(lent, prepare(setting, batch))
            # The same q, with its derivative: the task gives it detached.
            slope_B = curvature_N[rows_B].to(outputs_B)
            weights_B = weights_B - slope_B * (outputs_B - outputs_B.detach())
            gradients = torch.autograd.grad(
                outputs_B, attributed, -weights_B, create_graph=True, materialize_grads=True
            )
            flat_P = torch.cat([gradient.reshape(-1) for gradient in gradients])
            if not flat_P.requires_grad:
                continue  # neither f nor q bends: the loss is linear
            for out_P, vector_P in zip(out_TP, vectors_TP):
                parts = torch.autograd.grad(
                    flat_P, attributed, vector_P.to(flat_P), retain_graph=True, materialize_grads=True
                )
                out_P += torch.cat([part.reshape(-1) for part in parts]).to(out_P)
    return out_TP / run.train.num_rows
