"""Influence functions on the leading eigenvectors of the Hessian.

Schioppa, Zablotskaia, Vilar, Sokolov: "Scaling Up Influence Functions", AAAI 2022.

Shape legend: N training rows, T targets, P parameters, R eigenpairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trak.datasets import as_rows
from trak.errors import InputError, MissingDependencyError, NonFiniteError, SingularGramError
from trak.methods.base import Attributor, FittedAttributor
from trak.methods.curvature import LentLoss, check_loss, import_curvlinops, lent_loss
from trak.methods.gradient_passes import Passes, Products, about, start_passes
from trak.methods.runs import RunOptions
from trak.methods.samples import some_rows, spread_rows
from trak.results import Attribution
from trak.scores import ArrayScores


@dataclass(frozen=True, eq=False, kw_only=True)
class ArnoldiInfluence(RunOptions, Attributor):
    """Influence functions within the span of the R eigenvectors of largest |eigenvalue|; other arguments as in `trak.attribute`.

        τ(z_i, z) = −1/(M N) Σ_m Σ_r (v_rᵀ∇f_m(z)) (v_rᵀ∇L_m(z_i)) / (λ_r + λ),    H_m v_r = λ_r v_r,    |λ_1| ≥ |λ_2| ≥ …

    What a gradient has outside of these directions, where the loss is flat and H⁻¹ would be largest, is dropped; the authors find that
    ten to a hundred or two eigenpairs rank best. Negative eigenvalues are kept, as they do. Eigenpairs come from the implicitly
    restarted Lanczos iteration of SciPy (ARPACK), each step of which reads the training set, rather than from one unrestarted Arnoldi
    run as the authors': they are those of H to `tolerance`, not Ritz values of a given number of steps. Where that is too slow, H may be
    the curvature of the loss on some of the training examples, as the authors' is. Needs curvlinops and SciPy.

    After fit() N × R numbers are kept for each checkpoint, and more targets cost a pass over themselves only. `save_dir`, `projection`
    and `feature_dtype` have no use.

    Attributes:
        rank: R.
        hessian: "exact" for the mean loss's Hessian, as the authors; "gauss_newton" for JᵀL''J with the predictions' Jacobian J.
        damping: λ, added to every eigenvalue.
        tolerance: of the eigenvalues, relative.
        max_iter: restarts, at the most.
        seed: of the first vector.
        hessian_rows: training examples that H is taken of, one drawn from each of so many equal parts of the training set (the same for
            every checkpoint); None for all of them. Scores are of all training examples in any case.
    """

    rank: int = 100
    hessian: str = "exact"
    damping: float = 0.0
    tolerance: float = 1e-4
    max_iter: int = 100
    seed: int = 0
    hessian_rows: int | None = None

    def fit(self, train_set: Any, checkpoints: Sequence[Any] | None = None) -> FittedArnoldiInfluence:
        """The eigenpairs at every checkpoint, and the training gradients' coefficients.

        Raises:
            InputError: impossible settings, or a task whose loss is unknown.
            SingularGramError: no convergence, or an eigenvalue that cannot be divided by.
            MissingDependencyError: curvlinops is not installed.
            TrakError: anything wrong with the other arguments, the checkpoints or the gradients.
        """
        import_curvlinops("ArnoldiInfluence")
        self._check_settings()
        passes = start_passes(self, train_set, checkpoints)
        check_loss(passes.setting.task, "ArnoldiInfluence")
        if self.rank > passes.num_parameters:
            raise InputError(
                f"rank={self.rank} is more than the {passes.num_parameters} attributed parameters: take fewer eigenpairs"
            )
        chosen = spread_rows(passes.train.num_rows, self.hessian_rows)
        sampled = replace(passes, train=some_rows(passes.train, chosen))
        members = []
        for index, state in enumerate(passes.states()):
            where = f"checkpoint {index + 1} of {len(passes.sources)}"
            with lent_loss(sampled, state, "ArnoldiInfluence") as loss:
                values_R, vectors_PR = self._eigenpairs(loss, passes.num_parameters, where)
            _check_divisors(values_R + self.damping, where)
            train = passes.products(state, passes.train, vectors_PR, label=f"Training gradients, {where}")
            members.append(Eigenspace(values_R, vectors_PR, train))
        return FittedArnoldiInfluence(self, passes, tuple(members))

    def _check_settings(self) -> None:
        if self.hessian not in ("gauss_newton", "exact"):
            raise InputError(f'hessian must be "gauss_newton" or "exact"; got {self.hessian!r}')
        optional = () if self.hessian_rows is None else ("hessian_rows",)
        for name in ("rank", "max_iter", *optional):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name} must be a whole number ≥ 1; got {value!r}")
        if not (self.damping >= 0 and math.isfinite(self.damping)):
            raise InputError(f"damping must be a number ≥ 0; got {self.damping!r}")
        if not 0 <= self.tolerance < 1:
            raise InputError(f"tolerance must lie between 0 and 1; got {self.tolerance!r}")

    def _eigenpairs(self, loss: LentLoss, num_parameters: int, where: str) -> tuple[Tensor, Tensor]:
        operator = loss.operator(self.hessian)
        if 2 * self.rank >= num_parameters:
            # The iteration would need a basis of the whole space.
            like = loss.parameters[0].detach()
            matrix_PP = operator @ torch.eye(num_parameters, dtype=like.dtype, device=like.device)
            values_P, vectors_PP = torch.linalg.eigh(
                loss.scale * (matrix_PP + matrix_PP.T).double().cpu() / 2
            )
            chosen_R = values_P.abs().argsort(descending=True)[: self.rank]
            return values_P[chosen_R], vectors_PP[:, chosen_R]
        values, vectors = leading_eigenpairs(
            operator.to_scipy(),
            self.rank,
            tolerance=self.tolerance,
            max_iter=self.max_iter,
            seed=self.seed,
            where=where,
        )
        return loss.scale * torch.from_numpy(values).double(), torch.from_numpy(vectors)


@dataclass(frozen=True, eq=False)
class Eigenspace:
    """One checkpoint's leading eigenpairs.

    Attributes:
        values: [R] float64, of the mean loss, largest |value| first.
        vectors: [P, R].
        train: vᵀ∇f of the training examples, [N, R], with their f and q.
    """

    values: Tensor
    vectors: Tensor
    train: Products


@dataclass(frozen=True, eq=False)
class FittedArnoldiInfluence(FittedAttributor):
    """See `ArnoldiInfluence`."""

    method: ArnoldiInfluence
    passes: Passes
    members: tuple[Eigenspace, ...]

    def attribute(self, targets: Any) -> Attribution:
        """Scores [N, T].

        Raises:
            TrakError: anything wrong with the targets.
        """
        passes, method = self.passes, self.method
        target_rows = as_rows(targets, batch_size=passes.options.batch_size, what="targets")
        count = len(self.members)
        scores_NT = torch.zeros(passes.train.num_rows, target_rows.num_rows, dtype=passes.setting.sum_dtype)
        outputs = []
        for index, (member, state) in enumerate(zip(self.members, passes.states())):
            label = f"Targets, checkpoint {index + 1} of {count}"
            found = passes.products(state, target_rows, member.vectors, label=label)
            divided_TR = (found.values.double() / (member.values + method.damping)).to(scores_NT)
            own_NR = member.train.weights.unsqueeze(1) * member.train.values
            scores_NT.addmm_(own_NR, divided_TR.T, alpha=1 / (passes.train.num_rows * count))
            outputs.append(found.outputs)
        info = {
            "method": "Arnoldi influence function",
            "rank": method.rank,
            "hessian": method.hessian,
            "damping": method.damping,
            "tolerance": method.tolerance,
            "seed": method.seed,
            "hessian_rows": method.hessian_rows,
            "eigenvalues": [member.values.tolist() for member in self.members],
        }
        return Attribution(
            scores=ArrayScores(scores_NT),
            weights=torch.stack([member.train.weights for member in self.members]).mean(0),
            outputs=torch.stack(outputs).mean(0),
            info=about(passes, info),
            train_rows=passes.train,
            target_rows=target_rows,
        )


def leading_eigenpairs(
    operator: Any, rank: int, *, tolerance: float, max_iter: int, seed: int, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues [R] of largest magnitude, largest first, and eigenvectors [P, R] of a symmetric SciPy operator.

    Raises:
        NonFiniteError: a product is NaN or infinite.
        SingularGramError: they did not converge.
        MissingDependencyError: SciPy is not installed.
    """
    try:
        from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, eigsh
    except ImportError as error:
        raise MissingDependencyError(
            "ArnoldiInfluence needs SciPy: pip install 'trak-attribution[curvature]'"
        ) from error
    first_P = np.random.default_rng(seed).standard_normal(operator.shape[0]).astype(operator.dtype)
    if not np.isfinite(operator @ first_P).all():
        raise NonFiniteError(
            f"{where}: the Hessian holds NaN or infinity; look at the loss at this checkpoint"
        )
    try:
        values, vectors = eigsh(operator, k=rank, which="LM", v0=first_P, tol=tolerance, maxiter=max_iter)
    except ArpackNoConvergence as error:
        raise SingularGramError(
            f"{where}: {len(error.eigenvalues)} of {rank} eigenpairs converged to {tolerance:g} in {max_iter} restarts: raise max_iter or "
            "tolerance, or lower rank"
        ) from error
    except ArpackError as error:
        raise SingularGramError(
            f"{where}: no eigenpairs of the Hessian were found ({error}): lower rank, or raise max_iter or tolerance"
        ) from error
    order = np.argsort(-np.abs(values), kind="stable")
    return values[order], np.ascontiguousarray(vectors[:, order])


def _check_divisors(values_R: Tensor, where: str) -> None:
    largest, smallest = float(values_R.abs().max()), float(values_R.abs().min())
    if not smallest > 1e-7 * largest:
        kept = int((values_R.abs() > 1e-7 * largest).sum())
        raise SingularGramError(
            f"{where}: eigenvalues run down to {smallest:.3g} from {largest:.3g}, and dividing by them would leave rounding errors: set "
            f"rank to {max(kept, 1)} or less, or damping > 0"
        )
