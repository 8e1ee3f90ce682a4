"""The contenders that come along: TRAK and every baseline of `trak.methods` that a bank of half-sized subsets can judge in reasonable time.

Settings are the library's defaults unless said in a contender's `settings`. Left out: truncated Monte Carlo Shapley, which trains thousands of
models of its own.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from trak.datasets import as_rows
from trak.errors import InputError
from trak.frontier.values import Contender, Problem, Trial
from trak.gradients import select_parameters
from trak.methods.arnoldi import ArnoldiInfluence
from trak.methods.bm25 import BM25
from trak.methods.damping import damping_for
from trak.methods.datamodel import Datamodel
from trak.methods.ekfac import EKFACInfluence
from trak.methods.empirical_influence import EmpiricalInfluence
from trak.methods.gradient_similarity import GradientSimilarity
from trak.methods.influence_function import InfluenceFunction
from trak.methods.knn_shapley import KNNShapley
from trak.methods.lissa import LiSSAInfluence
from trak.methods.random import RandomScores
from trak.methods.representation_similarity import SIMILARITIES, RepresentationSimilarity
from trak.methods.tracin import TracIn
from trak.methods.trak import TRAK
from trak.methods.weights import resolve_curvature, resolve_exponent
from trak.precondition import RelativeDamping
from trak.projection import Eigenbasis, Identity, Kronecker, Projection, Sparse
from trak.tasks import resolve_task

_REPRESENTATION_OPTIONS = ("device", "dtype", "batch_size", "trust_pickle", "progress")
_HESSIAN_ROWS = 256
"""Training examples whose exact Hessian's eigenpairs are sought: each of a hundred products differentiates all of them twice."""


def built_in_contenders(problem: Problem) -> tuple[Contender, ...]:
    """All that apply to the problem: BM25 is among them where there are texts."""
    found = [*_trak(problem), *_gradients(problem), *_representations(), *_influence(problem), *_others()]
    if problem.train_texts is not None:
        bm25 = Contender(name="bm25", label="BM25", family="data", make=lambda trial: BM25(), reads="texts")
        found.append(bm25)
    return tuple(found)


def choose_contenders(contenders: Sequence[Contender], patterns: Sequence[str]) -> tuple[Contender, ...]:
    """Those whose names match one of the patterns (`trak*`), in their own order; all where there are no patterns.

    Raises:
        InputError: a pattern that matches none.
    """
    names = [contender.name for contender in contenders]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise InputError(f"no method is called {pattern!r}; there are {', '.join(names)}")
    return tuple(
        contender
        for contender in contenders
        if not patterns or any(fnmatch.fnmatch(contender.name, pattern) for pattern in patterns)
    )


def _trak(problem: Problem) -> list[Contender]:
    def one(name: str, label: str, wanted: Sparse | Kronecker | Eigenbasis, **settings: Any) -> Contender:
        projection = _fitting(wanted, problem)

        def make(trial: Trial) -> TRAK:
            return TRAK(**_common(trial.problem), projection=projection, save_dir=trial.features, **settings)

        # Defaults by their values: a point is measured again when they change.
        task = resolve_task(problem.task)
        exponent = resolve_exponent(settings.get("weight_exponent"), task)
        facts = {
            **settings,
            "projection": projection.fingerprint(),
            "damping": damping_for(settings.get("damping", "auto"), projection, task).fingerprint(),
            "weight_exponent": exponent,
            "curvature_exponent": resolve_curvature(settings.get("gram"), task, exponent),
        }
        how = f"K = {wanted.dim}" if projection is wanted else "not projected"
        return Contender(
            name=name,
            label=f"{label}, {how}",
            family="TRAK",
            make=make,
            settings=facts,
            projection=projection,
        )

    undamped = RelativeDamping(1e-6)
    return [
        one("trak", "TRAK", Eigenbasis(4096)),
        one("trak-sparse", "TRAK, random columns", Sparse(4096)),
        one("trak-sparse-1024", "TRAK, random columns", Sparse(1024)),
        one("trak-per-layer", "TRAK per layer", Kronecker(4096), preconditioner="per_layer"),
        # The paper has λ = 0. A millionth of the mean eigenvalue is that, but for Gram matrices without full rank.
        one(
            "trak-paper",
            "TRAK as in the paper",
            Sparse(1024),
            damping=undamped,
            gram="uniform",
            weight_exponent=1.0,
        ),
    ]


def _fitting(projection: Sparse | Kronecker | Eigenbasis, problem: Problem) -> Projection:
    """The projection; one that keeps every gradient entry for models with no more parameters than it has columns."""
    count = _num_parameters(problem)
    if count > projection.dim:
        return projection
    return Sparse(count, per_layer=True) if isinstance(projection, Kronecker) else Identity()


def _num_parameters(problem: Problem) -> int:
    shapes = select_parameters(problem.model, problem.options.get("parameters"))
    return sum(math.prod(shape) for shape in shapes.values())


def _gradients(problem: Problem) -> list[Contender]:
    projection = _fitting(Sparse(4096), problem)
    facts = {"projection": projection.fingerprint()}

    def similarity(kind: str) -> Contender:
        def make(trial: Trial) -> GradientSimilarity:
            options: dict[str, Any] = {
                "projection": projection,
                "save_dir": trial.features,
                "similarity": kind,
            }
            return GradientSimilarity(**_common(trial.problem), **options)

        return Contender(
            name=f"gradient-{kind}",
            label=f"Gradient {kind}",
            family="gradients",
            make=make,
            settings={**facts, "similarity": kind},
            projection=projection,
        )

    rates = list(problem.learning_rates) if problem.learning_rates is not None else None
    note = (
        ""
        if problem.runs
        else "final checkpoints with equal weights: the recipe has none from along training"
    )

    def traced(name: str, label: str, normalise: bool) -> Contender:
        def make(trial: Trial) -> TracIn:
            every = rates * trial.num_models if rates is not None and problem.runs else None
            options: dict[str, Any] = {
                "projection": projection,
                "save_dir": trial.features,
                "normalise": normalise,
            }
            return TracIn(**_common(trial.problem), learning_rates=every, **options)

        return Contender(
            name=name,
            label=label if problem.runs else f"{label} (final)",
            family="gradients",
            make=make,
            settings={**facts, "normalise": normalise, "learning_rates": rates},
            reads="runs" if problem.runs else "checkpoints",
            projection=projection,
            note=note,
        )

    return [
        similarity("dot"),
        similarity("cosine"),
        traced("tracin", "TracIn", False),
        traced("gas", "GAS", True),
    ]


def _representations() -> list[Contender]:
    def alike(kind: str) -> Contender:
        def make(trial: Trial) -> RepresentationSimilarity:
            problem = trial.problem
            return RepresentationSimilarity(
                model=problem.model, task=problem.task, similarity=kind, **_representation_options(problem)
            )

        return Contender(
            name=f"representation-{kind}",
            label=f"Representation {kind}",
            family="representations",
            make=make,
            settings={"similarity": kind},
        )

    def neighbours(trial: Trial) -> KNNShapley:
        problem = trial.problem
        return KNNShapley(model=problem.model, task=problem.task, **_representation_options(problem))

    shapley = Contender(
        name="knn-shapley", label="KNN-Shapley", family="representations", make=neighbours, settings={"k": 5}
    )
    return [*map(alike, SIMILARITIES), shapley]


def _influence(problem: Problem) -> list[Contender]:
    def one(
        name: str, label: str, make: Callable[[Problem], Any], settings: dict[str, Any], **options: Any
    ) -> Contender:
        return Contender(
            name=f"influence-{name}",
            label=f"Influence, {label}",
            family="influence",
            make=lambda trial: make(trial.problem),
            settings=settings,
            **options,
        )

    solve: dict[str, Any] = {"damping": 1e-3, "tolerance": 1e-2, "space": _solving_space(problem)}
    series: dict[str, Any] = {"damping": 1e-2, "scale": "auto", "depth": 300, "batch": 32}
    leading: dict[str, Any] = {
        "rank": max(1, min(50, _num_parameters(problem) // 2)),
        # One Lanczos run of about 2 × rank steps, as the authors' of a fixed number.
        "tolerance": 0.1,
        "hessian_rows": _HESSIAN_ROWS,
    }
    kronecker: dict[str, Any] = {"damping": RelativeDamping(0.1)}

    return [
        one(
            "ekfac",
            "EK-FAC",
            lambda problem: EKFACInfluence(**_covered_by_kfac(problem), **kronecker),
            {"damping": kronecker["damping"].fingerprint()},
            # The gradients of all targets are in memory at once.
            is_slow=_num_parameters(problem) > 1_000_000,
            note="Linear and Conv2d layers only, unless the recipe chooses parameters",
        ),
        one(
            "cg",
            "conjugate gradients",
            lambda problem: InfluenceFunction(**_common(problem), **solve),
            solve,
            is_slow=True,
            max_models=3,
        ),
        one(
            "arnoldi",
            "Arnoldi",
            lambda problem: ArnoldiInfluence(**_common(problem), **leading),
            leading,
            is_slow=True,
            max_models=1,
        ),
        one(
            "lissa",
            "LiSSA",
            lambda problem: LiSSAInfluence(**_common(problem), **series),
            series,
            is_slow=True,
            max_models=1,
        ),
    ]


def _others() -> list[Contender]:
    def empirical(trial: Trial) -> EmpiricalInfluence:
        assert trial.estimation is not None
        return EmpiricalInfluence(masks=trial.estimation.masks, outputs=trial.estimation.outputs)

    def datamodel(trial: Trial) -> Datamodel:
        assert trial.estimation is not None
        return Datamodel(masks=trial.estimation.masks, outputs=trial.estimation.outputs)

    half = "estimated from one part of the bank, judged on the other"
    return [
        Contender(
            name="empirical-influence",
            label="Empirical influence",
            family="retraining",
            make=empirical,
            reads="bank",
            note=half,
        ),
        Contender(
            name="datamodel",
            label="Datamodel (lasso)",
            family="retraining",
            make=datamodel,
            reads="bank",
            is_slow=True,
            note=half,
        ),
        Contender(
            name="random",
            label="Random scores",
            family="data",
            make=lambda trial: RandomScores(),
            settings={"seed": 0},
            reads="data",
        ),
    ]


def _common(problem: Problem) -> dict[str, Any]:
    return {"model": problem.model, "task": problem.task, **problem.options}


def _representation_options(problem: Problem) -> dict[str, Any]:
    return {name: problem.options[name] for name in _REPRESENTATION_OPTIONS if name in problem.options}


def _covered_by_kfac(problem: Problem) -> dict[str, Any]:
    """The arguments, with the parameters of Linear and Conv2d layers where the recipe leaves the choice open."""
    common = _common(problem)
    if common.get("parameters") is None:
        names = [name for name, module in problem.model.named_modules() if _is_kronecker(module)]
        covered = {f"{name}.{leaf}" if name else leaf for name in names for leaf in ("weight", "bias")}
        common["parameters"] = lambda name, parameter: parameter.requires_grad and name in covered
    return common


def _is_kronecker(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (
        isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros"
    )


def _solving_space(problem: Problem) -> str:
    """Where conjugate gradients have fewer numbers: in the parameters, or in the span of the training gradients."""
    rows = as_rows(problem.train_set, what="train_set").num_rows
    return "gradients" if rows < _num_parameters(problem) else "parameters"
