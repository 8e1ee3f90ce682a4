"""What decides a point, so that one which is kept is known again."""

from __future__ import annotations

from typing import Any

import torch

from trak._version import __version__
from trak.frontier.plan import Plan
from trak.frontier.problem import bank_digest, checkpoint_digests, first_targets, problem_digest
from trak.frontier.values import Contender


class Facts:
    """What decides a point, as JSON values; hashes of content are computed once."""

    def __init__(self, plan: Plan) -> None:
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
