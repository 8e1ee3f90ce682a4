"""What a report says, as values. Nothing here computes or draws.

Report
├── Summary            title, lead, key figures as tiles
└── sections, in the order given
    ├── TargetsSection     a card per target: what raised its output, what lowered it
    ├── ScoresSection      the distribution of all scores
    ├── LdsSection         do the scores predict retraining?
    ├── MislabelSection    do they find wrong labels?
    ├── Provenance         how it was made
    └── HowToRead          what the numbers mean
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from trak.errors import InputError

ExampleKind = Literal["image", "text", "none"]


@dataclass(frozen=True, eq=False)
class Example:
    """One training example or target, as it is to be shown.

    Attributes:
        kind: "image", "text", or "none" where there is nothing to show but row and label.
        content: an image as array, tensor or PIL image ([H, W], [C, H, W] or [H, W, C], C of 1, 3 or 4); or a string; or None.
        label: its label in words.
        caption: a line below it.
        value_range: (black, white) of a float image. None: values within [0, 1] are taken as they are, others are
            stretched from minimum to maximum.
    """

    kind: ExampleKind = "none"
    content: Any = None
    label: str | None = None
    caption: str | None = None
    value_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("image", "text", "none"):
            raise InputError(f'an Example is of kind "image", "text" or "none"; got {self.kind!r}')
        if self.kind == "text" and not isinstance(self.content, str):
            raise InputError(
                f'an Example of kind "text" needs a string as content; got {type(self.content).__name__}'
            )
        if self.kind == "image" and self.content is None:
            raise InputError('an Example of kind "image" needs an array or tensor as content; got None')


@dataclass(frozen=True, eq=False)
class Influence:
    """One training row's effect on one target.

    Attributes:
        row: its number in the training set.
        score: its attribution score, in units of the model output f.
        example: what is shown of it.
        note: a remark on it.
        error: the score's standard error over checkpoints, if known.
    """

    row: int
    score: float
    example: Example = field(default_factory=Example)
    note: str | None = None
    error: float | None = None


@dataclass(frozen=True, eq=False)
class TargetCard:
    """One target and the training rows that mattered most to it.

    Attributes:
        index: the target's row.
        example: the target itself.
        output: the model output f at the target.
        prediction, truth: what the model said and what is right, in words; they differ where the model is wrong.
        proponents: rows with the highest scores, best first.
        opponents: rows with the lowest scores, lowest first.
        note: a remark of yours.
    """

    index: int
    example: Example
    output: float | None = None
    prediction: str | None = None
    truth: str | None = None
    proponents: tuple[Influence, ...] = ()
    opponents: tuple[Influence, ...] = ()
    note: str | None = None

    @property
    def is_wrong(self) -> bool:
        """Whether prediction and truth are both known and differ."""
        return self.prediction is not None and self.truth is not None and self.prediction != self.truth


@dataclass(frozen=True)
class Tile:
    """One key figure: what it is, the figure as you want it printed, and a line of detail."""

    label: str
    value: str
    detail: str | None = None


@dataclass(frozen=True)
class Summary:
    """The head of the report."""

    title: str
    lead: str = ""
    tiles: tuple[Tile, ...] = ()


@dataclass(frozen=True, eq=False)
class TargetsSection:
    """A card per target."""

    kind: ClassVar[str] = "targets"
    cards: tuple[TargetCard, ...]
    title: str = "What made the model say this"
    lead: str = ""

    def __post_init__(self) -> None:
        if not self.cards:
            raise InputError(
                "a TargetsSection needs at least one card; leave the section out if there is no target"
            )

    @property
    def has_errors(self) -> bool:
        """Whether standard errors stand beside scores."""
        entries = (entry for card in self.cards for entry in (*card.proponents, *card.opponents))
        return any(entry.error is not None for entry in entries)


@dataclass(frozen=True)
class ScoresSection:
    """The distribution of scores as a histogram: counts[i] scores in [edges[i], edges[i + 1]]."""

    kind: ClassVar[str] = "scores"
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    title: str = "All scores at a glance"
    lead: str = ""

    def __post_init__(self) -> None:
        if len(self.edges) != len(self.counts) + 1 or not self.counts:
            raise InputError(
                f"a histogram has one edge more than it has counts; got {len(self.edges)} edges and {len(self.counts)} counts"
            )

    @classmethod
    def from_scores(cls, scores: Any, *, bins: int = 81, lead: str = "") -> ScoresSection:
        """Count an array of scores (any shape) into `bins` equal bins around zero.

        Raises:
            InputError: no scores, or one that is not finite.
        """
        values = np.asarray(scores, dtype=np.float64)
        return cls.from_blocks([values], limit=float(np.abs(values).max(initial=0.0)), bins=bins, lead=lead)

    @classmethod
    def from_blocks(
        cls, blocks: Iterable[Any], *, limit: float, bins: int = 81, lead: str = ""
    ) -> ScoresSection:
        """As `from_scores`, for scores that come block by block, with their largest magnitude known before."""
        # Bins of a range near the smallest float would have no width.
        limit = limit if limit > 1e-290 else 1.0
        counts, seen = np.zeros(bins, dtype=np.int64), 0
        for block in blocks:
            values = np.asarray(block, dtype=np.float64).ravel()
            if not np.isfinite(values).all():
                raise InputError("a histogram needs finite scores; got NaN or infinity among them")
            counts += np.histogram(values.clip(-limit, limit), bins=bins, range=(-limit, limit))[0]
            seen += values.size
        if not seen:
            raise InputError("a histogram needs at least one score; got none")
        edges = np.linspace(-limit, limit, bins + 1)
        return cls(tuple(map(float, edges)), tuple(map(int, counts)), lead=lead)


@dataclass(frozen=True)
class MethodLds:
    """One method's linear datamodeling score: the mean over targets and an interval around it."""

    method: str
    mean: float
    low: float | None = None
    high: float | None = None
    detail: str | None = None


@dataclass(frozen=True)
class LdsScatter:
    """One target: what was predicted for each subset, and what the models retrained on it gave. Equally long."""

    label: str
    predicted: tuple[float, ...]
    actual: tuple[float, ...]
    correlation: float | None = None

    def __post_init__(self) -> None:
        if len(self.predicted) != len(self.actual) or not self.predicted:
            raise InputError(
                "a scatter needs as many predicted as actual outputs, and at least one; "
                f"got {len(self.predicted)} and {len(self.actual)}"
            )


@dataclass(frozen=True)
class LdsSection:
    """Linear datamodeling score: the rank correlation between predicted and actual outputs of retrained models.

    Attributes:
        methods: one entry per method, in the order to be shown.
        scatters: predicted against actual for a few targets.
        num_subsets, num_models: how many random subsets, and models retrained on all of them together.
        num_targets: how many targets the mean is over.
        subset_fraction: the part of the training set that is in a subset.
        interval: what `low` and `high` are.
    """

    kind: ClassVar[str] = "lds"
    methods: tuple[MethodLds, ...]
    scatters: tuple[LdsScatter, ...] = ()
    num_subsets: int | None = None
    num_models: int | None = None
    num_targets: int | None = None
    subset_fraction: float | None = None
    interval: str = "95 % bootstrap interval"
    title: str = "Do the scores predict retraining?"
    lead: str = ""

    def __post_init__(self) -> None:
        if not self.methods:
            raise InputError(
                "an LdsSection needs at least one method; leave the section out if none was evaluated"
            )


@dataclass(frozen=True)
class MislabelCurve:
    """One method: after inspecting a fraction of the rows, the fraction of the wrong labels that was found."""

    method: str
    inspected: tuple[float, ...]
    found: tuple[float, ...]
    auc: float | None = None

    def __post_init__(self) -> None:
        if len(self.inspected) != len(self.found) or not self.found:
            raise InputError(f"a curve needs as many x as y; got {len(self.inspected)} and {len(self.found)}")

    def found_at(self, inspected: float) -> float:
        """The fraction found after this fraction was inspected, read off the curve (which starts at 0, 0)."""
        return float(np.interp(inspected, (0.0, *self.inspected), (0.0, *self.found)))


@dataclass(frozen=True, eq=False)
class Suspect:
    """A training row whose label looks wrong: the label it was given, and the true one where it is known."""

    row: int
    score: float
    example: Example
    given: str
    true: str | None = None


@dataclass(frozen=True, eq=False)
class MislabelSection:
    """How well scores find wrong labels. Random inspection (the diagonal) is always drawn beside the curves."""

    kind: ClassVar[str] = "mislabels"
    curves: tuple[MislabelCurve, ...]
    suspects: tuple[Suspect, ...] = ()
    num_rows: int | None = None
    num_corrupted: int | None = None
    title: str = "Do they find wrong labels?"
    lead: str = ""

    def __post_init__(self) -> None:
        if not self.curves and not self.suspects:
            raise InputError("a MislabelSection needs curves or suspects; got neither")


@dataclass(frozen=True)
class Provenance:
    """How the numbers were made. entries: name to value (nested mappings are flattened); command: a line to make them again."""

    kind: ClassVar[str] = "provenance"
    entries: Mapping[str, Any]
    command: str | None = None
    title: str = "How this was made"
    lead: str = ""


@dataclass(frozen=True)
class HowToRead:
    """What the numbers mean. output: what f is in this report, in a sentence."""

    kind: ClassVar[str] = "how"
    output: str | None = None
    title: str = "How to read this"
    lead: str = ""


Section = TargetsSection | ScoresSection | LdsSection | MislabelSection | Provenance | HowToRead


@dataclass(frozen=True, eq=False)
class Report:
    """A whole report."""

    summary: Summary
    sections: tuple[Section, ...] = ()
