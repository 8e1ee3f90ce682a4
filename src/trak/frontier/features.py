"""Stored features that contenders with the same projection share, and what they cost."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from trak.files import TEMPORARY_PREFIX, write_whole
from trak.frontier.clock import Stopwatch, machine_facts
from trak.frontier.problem import problem_digest
from trak.frontier.values import Problem, Seconds
from trak.methods.gradient_similarity import GradientSimilarity
from trak.projection import Projection
from trak.store.layout import DERIVED_PREFIX


@dataclass(frozen=True, eq=False)
class Features:
    """A folder with a store of features for each projection."""

    folder: Path

    def ensure(
        self, problem: Problem, projection: Projection, checkpoints: Sequence[Any]
    ) -> tuple[Path, Seconds]:
        """Compute what is not there, of training examples and targets.

        Returns:
            The store's folder, and what featurizing at these checkpoints costs: seconds at the first of them, measured once and
            without anything stored, times their number.
        """
        place = self.folder / self._name(projection)
        seconds = self._seconds(problem, projection, checkpoints[0], place)
        _featurize(problem, projection, checkpoints, place)
        return place, seconds * len(checkpoints)

    @staticmethod
    def forget_derived(place: Path) -> None:
        """Remove what earlier contenders computed from the features (Gram matrices): each must pay for its own."""
        for file in place.rglob(f"{DERIVED_PREFIX}*"):
            file.unlink(missing_ok=True)

    def _name(self, projection: Projection) -> str:
        facts = projection.fingerprint()
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return f"{facts.get('kind', 'projection')}-{facts.get('dim', 0)}-{digest[:6]}"

    def _seconds(self, problem: Problem, projection: Projection, checkpoint: Any, place: Path) -> Seconds:
        machine = machine_facts()
        machine.pop("date")
        known = {"problem": problem_digest(problem), "machine": machine}
        digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
        file = place.with_name(f"{place.name}-{digest[:12]}.json")
        if file.is_file():
            return Seconds(**json.loads(file.read_text(encoding="utf-8"))["seconds"])
        self.folder.mkdir(parents=True, exist_ok=True)
        # Where nothing is stored yet, what is timed can stay; otherwise features would be found and cost nothing.
        temporary = place if not place.exists() else place.with_name(f"{TEMPORARY_PREFIX}{uuid4().hex[:12]}")
        watch = Stopwatch()
        try:
            _featurize(problem, projection, [checkpoint], temporary)
            seconds = watch.read()
        finally:
            if temporary != place:
                shutil.rmtree(temporary, ignore_errors=True)
        write_whole(file, json.dumps({**known, "seconds": asdict(seconds)}, indent=1).encode())
        return seconds


def _featurize(problem: Problem, projection: Projection, checkpoints: Sequence[Any], folder: Path) -> None:
    method = GradientSimilarity(
        model=problem.model, task=problem.task, projection=projection, save_dir=folder, **problem.options
    )
    method.fit(problem.train_set, checkpoints).attribute(problem.targets)
