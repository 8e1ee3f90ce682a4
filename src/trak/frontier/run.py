"""Every contender at every budget: quality by a bank of retrained models, compute by clocks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trak.datasets import as_rows
from trak.errors import InputError, TrakError
from trak.evaluation import Bank, noise_ceiling
from trak.frontier.clock import Training, default_clock, machine_facts
from trak.frontier.facts import Facts
from trak.frontier.features import Features
from trak.frontier.kept import Kept, Measured
from trak.frontier.measure import judge, measure, one_line
from trak.frontier.plan import Plan, budgets, make_plan
from trak.frontier.problem import bank_digest
from trak.frontier.values import CLOCKS, Contender, Frontier, FrontierPoint, Problem
from trak.logs import logger
from trak.progress import bar


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
    plan = make_plan(
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
    kept, facts = Kept(place), Facts(plan)
    found: dict[tuple[str, int], Measured] = {}
    with bar(len(work), "Frontier", unit="points", enabled=progress) as shown:
        for contender, budget in sorted(work, key=lambda pair: pair[0].is_slow):
            known = facts.of(contender, budget)
            measured = None if fresh else kept.get(known, limit=limit)
            if measured is None and only_kept:
                continue
            if measured is None:
                measured, over = measure(plan, contender, budget)
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
        raise InputError(
            f"no point of these methods with these settings is kept in {place}: measure them, without only_kept"
        )
    return Frontier(
        points=tuple(_with_common(plan, ordered)),
        bank=_about_bank(plan, ordered),
        training={**asdict(training.seconds), "passes_per_model": training.passes},
        machine=machine_facts(),
        clock=clock,
    )


def _with_common(plan: Plan, measured: Sequence[Measured]) -> Iterator[FrontierPoint]:
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
            result = judge(plan, one.predictions[rows][:, :count], judged)
        except TrakError as error:  # e.g. none of the common targets varies
            logger.warning("frontier: %s has no common LDS: %s", one.point.method, one_line(error))
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


def _about_bank(plan: Plan, measured: Sequence[Measured]) -> dict[str, Any]:
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
