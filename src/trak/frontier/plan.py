"""The arguments of a frontier, checked, and what follows from them: who is judged by what, at which budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trak.errors import InputError
from trak.evaluation import Bank
from trak.frontier.clock import Training
from trak.frontier.features import Features
from trak.frontier.problem import check_problem, first_targets, split_bank
from trak.frontier.values import Contender, Problem


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
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


def make_plan(
    problem: Problem,
    bank: Bank,
    *,
    checkpoints: Sequence[int],
    num_targets: int | None,
    slow_targets: int | None,
    estimation_share: float,
    seed: int,
    **given: Any,
) -> Plan:
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
    return Plan(
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


def budgets(plan: Plan, contender: Contender) -> list[int]:
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
