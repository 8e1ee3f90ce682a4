"""What a frontier is made of: a problem, contenders, and points of measured quality and compute.

Legend: N training rows, T targets, S subsets, M models of a budget.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from trak.errors import InputError, StoreError
from trak.evaluation import Bank
from trak.files import write_whole
from trak.methods.base import Attributor
from trak.projection import Projection

FORMAT = "trak frontier 1"
CLOCKS = ("processor", "wall")
READS = ("checkpoints", "runs", "bank", "data", "texts")
"""What a budget counts: checkpoints, training runs with several checkpoints each, models of a bank, or nothing."""


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Time by two clocks.

    Attributes:
        wall: what a person waits.
        processor: time of this process on all of its threads; does not grow when others use the machine, and does not see
            an accelerator.
    """

    wall: float
    processor: float

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(wall=self.wall + other.wall, processor=self.processor + other.processor)

    def __mul__(self, factor: float) -> Seconds:
        return Seconds(wall=self.wall * factor, processor=self.processor * factor)

    def by(self, clock: str) -> float:
        """The seconds of "wall" or "processor"."""
        return self.wall if clock == "wall" else self.processor


@dataclass(frozen=True, eq=False, kw_only=True)
class Problem:
    """What is attributed.

    Attributes:
        model: the architecture.
        train_set: as in `trak.attribute`, N rows.
        targets: the same, T rows: those of the bank, in its order.
        task: as in `trak.attribute`.
        checkpoints: models trained on subsets like the bank's, none of which is in the bank.
        runs: checkpoints from along training, one list for each run; empty if there are none.
        learning_rates: η at each checkpoint of a run, as `TracIn` takes them; None for 1 throughout.
        train_texts: the training examples as strings, for methods that read words; None if they are no texts.
        target_texts: the targets as strings.
        options: further arguments that methods with gradients share: parameters, gradients, device, dtype, batch_size,
            trust_pickle, progress.
    """

    model: nn.Module
    train_set: Any
    targets: Any
    task: Any
    checkpoints: Sequence[Any]
    runs: Sequence[Sequence[Any]] = ()
    learning_rates: Sequence[float] | None = None
    train_texts: Sequence[str] | None = None
    target_texts: Sequence[str] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, kw_only=True)
class Trial:
    """What a contender's attributor is made from.

    Attributes:
        problem: with the targets of this trial.
        estimation: the part of the bank that may be read; None for contenders that read none.
        num_models: the budget: how many checkpoints, runs or models of the bank it will be given.
        features: folder of features that contenders with the same projection share; None for those without one.
    """

    problem: Problem
    estimation: Bank | None = None
    num_models: int = 0
    features: Path | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Contender:
    """A method with its settings, for any budget.

    Attributes:
        name: for commands and files: lower-case letters, digits and hyphens.
        label: for people: a line of the figure.
        family: contenders of one family share a colour.
        make: trial -> attributor.
        settings: JSON values that decide its scores; a point is measured again when they change.
        reads: "checkpoints", "runs", "bank", "data" or "texts"; see `READS`.
        projection: of the stored features that `make` reads from `trial.features`; None if it reads none.
        is_slow: it gets the smaller number of targets, and its turn after the others.
        max_models: the largest budget; None for no limit.
        note: what a reader of its row must know.
    """

    name: str
    label: str
    family: str
    make: Callable[[Trial], Attributor]
    settings: Mapping[str, Any] = field(default_factory=dict)
    reads: str = "checkpoints"
    projection: Projection | None = None
    is_slow: bool = False
    max_models: int | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.reads not in READS:
            raise InputError(f"reads must be one of {', '.join(READS)}; got {self.reads!r}")
        if not self.name or not set(self.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-"):
            raise InputError(
                f"a contender's name is of lower-case letters, digits and hyphens; got {self.name!r}"
            )


@dataclass(frozen=True, kw_only=True)
class FrontierPoint:
    """One method at one budget.

    Attributes:
        method: the contender's name.
        label: its label.
        family: its family.
        reads: what the budget counts.
        budget: how many of them; 0 where nothing is read.
        num_models: models that had to be trained for it.
        settings: the contender's.
        lds: the linear datamodeling score over all subsets that may judge the method; None if it failed.
        low: lower end of the 95% bootstrap interval.
        high: upper end.
        num_subsets: subsets that judge it: all of the bank, or the part that it has not read.
        num_targets: targets that judge it.
        common_lds: LDS over the subsets and targets that judge every method, to compare by; None if it failed.
        common_low: lower end of its interval.
        common_high: upper end.
        train_seconds: training the models.
        attribute_seconds: everything from the models to the predictions for the bank's subsets.
        error: why it failed; None if it did not.
        note: the contender's.
        num_constant: targets for which it predicts the same on every subset: they have no rank correlation and are left out of the LDS.
    """

    method: str
    label: str
    family: str
    reads: str
    budget: int
    num_models: int
    settings: Mapping[str, Any]
    lds: float | None
    low: float | None
    high: float | None
    num_subsets: int
    num_targets: int
    common_lds: float | None = None
    common_low: float | None = None
    common_high: float | None = None
    train_seconds: Seconds
    attribute_seconds: Seconds
    error: str | None = None
    note: str = ""
    num_constant: int = 0

    @property
    def seconds(self) -> Seconds:
        """Training and attribution."""
        return self.train_seconds + self.attribute_seconds

    @property
    def budget_words(self) -> str:
        """M = 3, 1 run, 40 models; nothing where nothing is read."""
        if self.reads == "checkpoints":
            return f"M = {self.budget}"
        if self.reads in ("runs", "bank"):
            noun = "run" if self.reads == "runs" else "model"
            return f"{self.budget} {noun}" + ("s" if self.budget != 1 else "")
        return ""

    def __str__(self) -> str:
        """One line: what was measured, or why not."""
        name = f"{self.label}, {self.budget_words}" if self.budget else self.label
        if self.lds is None:
            return f"{name}: failed: {self.error}"
        return (
            f"{name}: LDS {self.lds:.3f} [{self.low:.3f}, {self.high:.3f}], "
            f"training {self.train_seconds.wall:.0f} s, attribution {self.attribute_seconds.wall:.1f} s"
        )


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """Every method at every budget.

    Attributes:
        points: in the order of the contenders, then of budgets.
        bank: sizes and fingerprint of the bank; the numbers of common subsets and targets.
        training: seconds of one model by both clocks, and how many plain passes over the training set they are (None if
            not known).
        machine: threads, processor, versions, date.
        clock: which of the two clocks figures and tables show.
    """

    points: tuple[FrontierPoint, ...]
    bank: Mapping[str, Any]
    training: Mapping[str, Any]
    machine: Mapping[str, Any]
    clock: str = "wall"

    @property
    def seconds_per_pass(self) -> float | None:
        """Seconds of a plain training pass over the whole training set; None if not known."""
        passes = self.training.get("passes_per_model")
        return self.training[self.clock] / passes if passes and self.training[self.clock] else None

    def best(self) -> tuple[FrontierPoint, ...]:
        """The frontier itself, by rising compute: points whose LDS no cheaper one reaches."""
        found: list[FrontierPoint] = []
        best = -math.inf
        done = [(point, point.lds) for point in self.points if point.lds is not None]
        for point, lds in sorted(done, key=lambda pair: (pair[0].seconds.by(self.clock), -pair[1])):
            if lds > best:
                found.append(point)
                best = lds
        return tuple(found)

    def is_judged_by_less(self, point: FrontierPoint) -> bool:
        """Whether a point has fewer subsets or targets than the bank."""
        sizes = self.bank["num_subsets"], self.bank["num_targets"]
        return (point.num_subsets, point.num_targets) != sizes

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"format": FORMAT, **asdict(self)}

    def save(self, path: str | Path) -> Path:
        """Write `to_dict()` as JSON, atomically."""
        path = Path(path)
        write_whole(path, (json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n").encode())
        return path

    @classmethod
    def load(cls, path: str | Path) -> Frontier:
        """Read what `save` wrote.

        Raises:
            StoreError: no such file, or another format.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise StoreError(
                f"there is no frontier at {path}: give the file that Frontier.save wrote"
            ) from error
        except ValueError as error:
            raise StoreError(f"{path} is no JSON: {error}. Write it again with Frontier.save") from error
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise StoreError(f"{path} is no frontier that this version reads: expected format {FORMAT!r}")
        values["points"] = tuple(point_from_dict(point) for point in values["points"])
        return cls(**values)


def point_from_dict(values: Mapping[str, Any]) -> FrontierPoint:
    """A point from its JSON values."""
    seconds = {name: Seconds(**values[name]) for name in ("train_seconds", "attribute_seconds")}
    return FrontierPoint(**{**values, **seconds})
