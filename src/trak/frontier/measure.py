"""One point: a contender at a budget, from models to its predictions of the bank, by clocks.

Legend: T targets, S subsets.
"""

from __future__ import annotations

import textwrap

import numpy as np

from trak.errors import InputError, TrakError
from trak.evaluation import Bank, LdsResult, lds, predictions
from trak.frontier.clock import OverTimeError, Stopwatch, time_limit
from trak.frontier.kept import Floats, Measured
from trak.frontier.plan import Plan
from trak.frontier.problem import first_targets
from trak.frontier.values import Contender, FrontierPoint, Seconds, Trial
from trak.logs import logger

NO_TIME = Seconds(wall=0.0, processor=0.0)


def measure(plan: Plan, contender: Contender, budget: int) -> tuple[Measured, bool]:
    """One point, and whether it ran into the time limit."""
    judges = plan.judges_of(contender)
    judged = plan.bank.subset(subsets=judges, targets=slice(0, plan.targets_of(contender)))
    seconds, error, is_over, predicted_ST = NO_TIME, None, False, None
    watch = Stopwatch()
    try:
        with time_limit(plan.limit):
            predicted_ST, seconds = _predict(plan, contender, budget, judged)
        result = judge(plan, predicted_ST, judged)
    except OverTimeError:
        error, is_over, seconds = f"not done after {plan.limit:g} s", True, watch.read()
    except Exception as caught:  # whatever it is, it must not take the other methods' rows with it
        error, seconds = one_line(caught), watch.read()
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


def _predict(plan: Plan, contender: Contender, budget: int, judged: Bank) -> tuple[Floats, Seconds]:
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


def judge(plan: Plan, predicted_ST: Floats, judged: Bank) -> LdsResult:
    """The LDS of predictions that are there already."""
    # "Subset s holds row s only" of S rows whose scores are the predictions: their sum is the prediction.
    own = np.eye(len(predicted_ST), dtype=bool)
    return lds(predicted_ST, own, judged.outputs, num_bootstrap=plan.num_bootstrap, seed=plan.seed)


def one_line(error: Exception) -> str:
    """The message on one line: what was wrong often stands in its later lines."""
    name = "" if isinstance(error, TrakError) else f"{type(error).__name__}: "
    return name + textwrap.shorten(str(error) or "no message", 600)
