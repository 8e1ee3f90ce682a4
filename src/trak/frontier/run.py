"""Every contender at every budget: quality by a bank of retrained models, compute by clocks.

Legend: N training rows, T targets, S subsets, M models of a budget.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trak._version import __version__
from trak.datasets import as_rows
from trak.errors import InputError, TrakError
from trak.evaluation import Bank, LdsResult, lds, noise_ceiling, predictions
from trak.frontier.clock import (
    OverTimeError,
    Stopwatch,
    Training,
    default_clock,
    machine_facts,
    time_limit,
)
from trak.frontier.features import Features
from trak.frontier.kept import Floats, Kept, Measured
from trak.frontier.problem import (
    bank_digest,
    check_problem,
    checkpoint_digests,
    first_targets,
    problem_digest,
    split_bank,
)
from trak.frontier.values import CLOCKS, Contender, Frontier, FrontierPoint, Problem, Seconds, Trial
from trak.logs import logger
from trak.progress import bar

NO_TIME = Seconds(wall=0.0, processor=0.0)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Plan:
    """Arguments of a run, checked, and what follows from them."""

    problem: Problem
    bank: Bank
    training: Training
    checkpoints: tuple[int, ...]
    num_targets: int
    slow_targets: int
    estimation: Tensor
    judging: Tensor
    num_bootstrap: int
    seed: int
    limit: float | None
    features: Features

    def targets_of(self, contender: Contender) -> int:
        """T of a contender."""
        return self.slow_targets if contender.is_slow else self.num_targets

    def judges_of(self, contender: Contender) -> Tensor:
        """Positions of the subsets that may judge a contender."""
        return self.judging if contender.reads == "bank" else torch.arange(len(self.bank.masks))

    def models_of(self, contender: Contender, budget: int) -> int:
        """Models that have to be trained."""
        return budget if contender.reads in ("checkpoints", "runs", "bank") else 0


def run_frontier(
    problem: Problem,
    bank: Bank,
    contenders: Sequence[Contender],
    *,
    training: Training,
    folder: str | os.PathLike[str],
    checkpoints: Sequence[int] = (1, 3, 10),
    num_targets: int | None = None,
    slow_targets: int | None = None,
    estimation_share: float = 0.5,
    limit: float | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
    clock: str | None = None,
    fresh: bool = False,
    only_kept: bool = False,
    on_point: Callable[[FrontierPoint], object] | None = None,
    progress: bool | None = None,
) -> Frontier:
    """LDS against compute for every contender at every budget.

    A contender that fails is a point with its error. Every finished point is kept in the folder, known by method, settings, budget,
    targets, checkpoints, training sample, bank and version of the library: the same call goes on where it stopped.

    What is measured, by wall and processor clocks: `attribute_seconds` is everything from the models to the predicted
    outputs of the bank's subsets. Stored features are computed once and charged to every contender that reads them: seconds of featurizing
    at one checkpoint, measured afresh, times the number of checkpoints. `train_seconds` is the number of models times
    `training.seconds`; a run with checkpoints from along training counts as one model.

    Contenders that read the bank are given a random part of its subsets, and judged by the rest. `common_lds` judges all by that
    rest and by the targets that all of them have.

    Args:
        problem: what is attributed.
        bank: the ground truth.
        contenders: `built_in_contenders(problem)`, some of them, or your own.
        training: seconds of training a model; `measure_training` measures them.
        folder: where points and features are kept; made if it is not there.
        checkpoints: budgets M of contenders that read checkpoints; those above the number there is are left out.
        num_targets: the first so many targets only; None for all.
        slow_targets: the same for slow contenders; None for as many as the others.
        estimation_share: of the bank's subsets, for contenders that read it.
        limit: seconds on the wall after which a point is given up, an error; None for no limit.
        num_bootstrap: resamples for intervals.
        seed: of intervals and of the split of the bank.
        clock: "wall" or "processor" for figures and tables; None for processor time on a CPU and wall time otherwise.
        fresh: measure all these points again.
        only_kept: measure nothing: the frontier of the points that are there.
        on_point: is called with every point as it is there.
        progress: True or False to force the bar over points.

    Returns:
        The frontier; points in the order of the contenders.

    Raises:
        InputError: arguments that cannot be, or that do not fit the bank; nothing kept to show.
        CorruptShardError: a damaged file in the folder.
    """
    if fresh and only_kept:
        raise InputError("fresh measures again and only_kept measures nothing: choose one")
    clock = clock or default_clock(problem.options)
    if clock not in CLOCKS:
        raise InputError(f"clock must be one of {', '.join(CLOCKS)}; got {clock!r}")
    place = Path(folder)
    plan = _plan(
        problem,
        bank,
        features=Features(place / "features"),
        training=training,
        checkpoints=checkpoints,
        num_targets=num_targets,
        slow_targets=slow_targets,
        estimation_share=estimation_share,
        num_bootstrap=num_bootstrap,
        seed=seed,
        limit=limit,
    )
    work = [(contender, budget) for contender in contenders for budget in budgets(plan, contender)]
    names = [contender.name for contender in contenders]
    if len(set(names)) < len(names):
        raise InputError(f"contenders need different names; got {', '.join(sorted(names))}")
    kept, facts = Kept(place), _Facts(plan)
    found: dict[tuple[str, int], Measured] = {}
    with bar(len(work), "Frontier", unit="points", enabled=progress) as shown:
        for contender, budget in sorted(work, key=lambda pair: pair[0].is_slow):
            known = facts.of(contender, budget)
            measured = None if fresh else kept.get(known, limit=limit)
            if measured is None and only_kept:
                continue
            if measured is None:
                measured, over = _measure(plan, contender, budget)
                kept.put(known, measured, limit=limit if over else None)
            # Training may have been measured again, or given: no reason to attribute again.
            models = plan.models_of(contender, budget)
            point = replace(measured.point, train_seconds=training.seconds * models)
            found[contender.name, budget] = replace(measured, point=point)
            if on_point is not None:
                on_point(point)
            shown.update(1)
    ordered = [
        found[contender.name, budget] for contender, budget in work if (contender.name, budget) in found
    ]
    if not ordered:
        raise InputError(f"no point of these methods with these settings is kept in {place}")
    return Frontier(
        points=tuple(_with_common(plan, ordered)),
        bank=_about_bank(plan, ordered),
        training={**asdict(training.seconds), "passes_per_model": training.passes},
        machine=machine_facts(),
        clock=clock,
    )


def _plan(
    problem: Problem,
    bank: Bank,
    *,
    checkpoints: Sequence[int],
    num_targets: int | None,
    slow_targets: int | None,
    estimation_share: float,
    seed: int,
    **given: Any,
) -> _Plan:
    """The arguments of `run_frontier`, checked.

    Raises:
        InputError: see there.
    """
    problem, there = check_problem(problem, bank), bank.outputs.shape[2]
    for name, count in (("num_targets", num_targets), ("slow_targets", slow_targets)):
        if count is not None and (not isinstance(count, int) or not 1 <= count <= there):
            raise InputError(f"{name} must be a whole number from 1 to the bank's {there}; got {count!r}")
    if not checkpoints or any(not isinstance(size, int) or size < 1 for size in checkpoints):
        raise InputError(f"checkpoints must be whole numbers ≥ 1; got {list(checkpoints)!r}")
    estimation, judging = split_bank(bank, share=estimation_share, seed=seed)
    num_targets = num_targets or there
    return _Plan(
        problem=first_targets(problem, num_targets),
        bank=bank.subset(targets=slice(0, num_targets)),
        checkpoints=tuple(sorted(set(checkpoints))),
        num_targets=num_targets,
        slow_targets=min(slow_targets or there, num_targets),
        estimation=estimation,
        judging=judging,
        seed=seed,
        **given,
    )


def budgets(plan: _Plan, contender: Contender) -> list[int]:
    """The budgets at which a contender stands; at least one, so that it is never missing.

    Of the bank's models: all of the part to estimate from, and half of it if every training row is then in some of the subsets and
    not in others.
    """
    if contender.reads in ("data", "texts"):
        return [0]
    most = contender.max_models
    if contender.reads == "bank":
        repeats, part = plan.bank.outputs.shape[1], plan.estimation
        seen_N = plan.bank.masks[part[: len(part) // 2]].sum(dim=0)
        varied = len(part) > 1 and bool(((seen_N > 0) & (seen_N < len(part) // 2)).all())
        sizes = [len(part) // 2 * repeats, len(part) * repeats] if varied else [len(part) * repeats]
    else:
        problem = plan.problem
        there = len(problem.runs) if contender.reads == "runs" else len(problem.checkpoints)
        sizes = [size for size in plan.checkpoints if size <= there] or [there]
        if contender.reads == "runs":
            sizes = sorted({*sizes, there})
    return [size for size in sizes if most is None or size <= most] or [most or sizes[0]]


class _Facts:
    """What decides a point, as JSON values; hashes of content are computed once."""

    def __init__(self, plan: _Plan) -> None:
        trusted = bool(plan.problem.options.get("trust_pickle", False))
        self._plan = plan
        self._bank = bank_digest(plan.bank)
        self._problems: dict[int, str] = {}
        self._checkpoints = checkpoint_digests(plan.problem.checkpoints, trust_pickle=trusted)
        self._runs = [checkpoint_digests(run, trust_pickle=trusted) for run in plan.problem.runs]

    def of(self, contender: Contender, budget: int) -> dict[str, Any]:
        """The facts of one point."""
        plan, count = self._plan, self._plan.targets_of(contender)
        if count not in self._problems:
            self._problems[count] = problem_digest(first_targets(plan.problem, count))
        read: list[Any] = []
        if contender.reads == "checkpoints":
            read = self._checkpoints[:budget]
        elif contender.reads == "runs":
            read = self._runs[:budget]
        elif contender.reads == "bank":
            read = plan.estimation.tolist()
        return {
            "method": contender.name,
            "settings": dict(contender.settings),
            "budget": budget,
            "read": read,
            "problem": self._problems[count],
            "bank": self._bank,
            "judges": plan.judges_of(contender).tolist(),
            "bootstrap": [plan.num_bootstrap, plan.seed],
            "threads": torch.get_num_threads(),
            "version": __version__,
        }


def _measure(plan: _Plan, contender: Contender, budget: int) -> tuple[Measured, bool]:
    """One point, and whether it ran into the time limit."""
    judges = plan.judges_of(contender)
    judged = plan.bank.subset(subsets=judges, targets=slice(0, plan.targets_of(contender)))
    seconds, error, is_over, predicted_ST = NO_TIME, None, False, None
    watch = Stopwatch()
    try:
        with time_limit(plan.limit):
            predicted_ST, seconds = _predict(plan, contender, budget, judged)
        result = _lds(plan, predicted_ST, judged)
    except OverTimeError:
        error, is_over, seconds = f"not done after {plan.limit:g} s", True, watch.read()
    except Exception as caught:  # whatever it is, it must not take the other methods' rows with it
        error, seconds = _words(caught), watch.read()
        logger.warning("frontier: %s with budget %d failed: %s", contender.name, budget, error)
    point = FrontierPoint(
        method=contender.name,
        label=contender.label,
        family=contender.family,
        reads=contender.reads,
        budget=budget,
        num_models=plan.models_of(contender, budget),
        settings=contender.settings,
        lds=None if error else result.mean,
        low=None if error else result.low,
        high=None if error else result.high,
        num_subsets=len(judges),
        num_targets=judged.outputs.shape[2],
        train_seconds=NO_TIME,
        attribute_seconds=seconds,
        error=error,
        note=contender.note,
    )
    return Measured(point, None if error else predicted_ST, judges.numpy()), is_over


def _predict(plan: _Plan, contender: Contender, budget: int, judged: Bank) -> tuple[Floats, Seconds]:
    """Σ_{i∈S} τ_i for the subsets that judge, [S, T], and the seconds from models to there."""
    problem = first_targets(plan.problem, judged.outputs.shape[2])
    train_set, targets, checkpoints = problem.train_set, problem.targets, None
    estimation = None
    if contender.reads == "texts":
        if problem.train_texts is None:
            raise InputError(f"{contender.name} reads texts: give train_texts and target_texts")
        train_set, targets = problem.train_texts, problem.target_texts
    elif contender.reads == "checkpoints":
        checkpoints = list(problem.checkpoints[:budget])
    elif contender.reads == "runs":
        checkpoints = [checkpoint for run in problem.runs[:budget] for checkpoint in run]
    elif contender.reads == "bank":
        subsets = plan.estimation[: budget // plan.bank.outputs.shape[1]]
        estimation = plan.bank.subset(subsets=subsets, targets=slice(0, judged.outputs.shape[2]))
    folder, charged = None, NO_TIME
    if contender.projection is not None:
        assert checkpoints is not None
        folder, charged = plan.features.ensure(problem, contender.projection, checkpoints)
        plan.features.forget_derived(folder)
    trial = Trial(problem=problem, estimation=estimation, num_models=budget, features=folder)
    watch = Stopwatch()
    attribution = contender.make(trial).fit(train_set, checkpoints).attribute(targets)
    predicted_ST = predictions(attribution.scores, judged.masks)
    return predicted_ST, watch.read() + charged


def _lds(plan: _Plan, predicted_ST: Floats, judged: Bank) -> LdsResult:
    """The LDS of predictions that are there already."""
    # "Subset s holds row s only" of S rows whose scores are the predictions: their sum is the prediction.
    own = np.eye(len(predicted_ST), dtype=bool)
    return lds(predicted_ST, own, judged.outputs, num_bootstrap=plan.num_bootstrap, seed=plan.seed)


def _with_common(plan: _Plan, measured: Sequence[Measured]) -> Iterator[FrontierPoint]:
    """The points with their LDS over the subsets and targets that judge all of them."""
    subsets, count = _common(measured)
    judged = plan.bank.subset(subsets=subsets, targets=slice(0, count))
    for one in measured:
        if one.predictions is None:
            yield one.point
            continue
        rows = np.flatnonzero(np.isin(one.subsets, subsets.numpy()))
        num_constant = int((np.ptp(one.predictions, axis=0) == 0).sum())
        try:
            result = _lds(plan, one.predictions[rows][:, :count], judged)
        except TrakError as error:  # e.g. none of the common targets varies
            logger.warning("frontier: %s has no common LDS: %s", one.point.method, _words(error))
            yield replace(one.point, num_constant=num_constant)
            continue
        yield replace(
            one.point,
            num_constant=num_constant,
            common_lds=result.mean,
            common_low=result.low,
            common_high=result.high,
        )


def _common(measured: Sequence[Measured]) -> tuple[Tensor, int]:
    """Positions of the subsets, and the number of first targets, that judge every point that did not fail."""
    done = [one for one in measured if one.predictions is not None] or list(measured)
    subsets = set.intersection(*(set(one.subsets.tolist()) for one in done))
    return torch.tensor(sorted(subsets)), min(one.point.num_targets for one in done)


def _about_bank(plan: _Plan, measured: Sequence[Measured]) -> dict[str, Any]:
    num_subsets, num_models, num_targets = plan.bank.outputs.shape
    subsets, count = _common(measured)
    ceiling = None
    if num_models > 1:
        found = noise_ceiling(plan.bank.outputs, num_bootstrap=plan.num_bootstrap, seed=plan.seed)
        ceiling = [found.mean, found.low, found.high]
    return {
        "fingerprint": bank_digest(plan.bank)[:16],
        "num_train": as_rows(plan.problem.train_set).num_rows,
        "num_subsets": num_subsets,
        "models_per_subset": num_models,
        "num_targets": num_targets,
        "common_subsets": len(subsets),
        "common_targets": count,
        "noise_ceiling": ceiling,
    }


def _words(error: Exception) -> str:
    """The message on one line: what was wrong often stands in its later lines."""
    name = "" if isinstance(error, TrakError) else f"{type(error).__name__}: "
    return name + textwrap.shorten(str(error) or "no message", 600)
