"""The report of an attribution: whatever has scores, rankings and, perhaps, the examples themselves."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from trak.errors import InputError
from trak.report.build import example_of, ranking_report, target_cards
from trak.report.data import Example, Report, ScoresSection
from trak.report.dependencies import require
from trak.report.html import write_report

MAX_CARDS = 20
"""Cards shown where nobody says which."""


class _Scores(Protocol):
    def select_targets(self, targets: Tensor) -> Any: ...


class _Rows(Protocol):
    def example(self, row: int) -> Any: ...


class AttributionLike(Protocol):
    """What of an attribution a report needs."""

    @property
    def scores(self) -> _Scores:
        """Has `select_targets(targets)` with `extremes(k)` and `blocks()`."""

    @property
    def num_train(self) -> int:
        """N."""

    @property
    def num_targets(self) -> int:
        """T."""

    @property
    def outputs(self) -> Tensor | None:
        """F of each target, [T]."""

    @property
    def info(self) -> Mapping[str, Any]:
        """Provenance."""

    @property
    def train_rows(self) -> _Rows | None:
        """The training examples: `example(row)` is a batch of one."""

    @property
    def target_rows(self) -> _Rows | None:
        """The targets: `example(row)` is a batch of one."""


Show = Callable[[int], Any]
"""From a row to what `example_of` can show: an `Example`, an image, a string, an (input, label) pair."""


def attribution_report(
    attribution: AttributionLike,
    path: str | os.PathLike[str],
    *,
    k: int = 8,
    targets: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
    title: str | None = None,
    lead: str | None = None,
    show_train: Show | None = None,
    show_target: Show | None = None,
    predictions: Sequence[Any] | None = None,
    output: str | None = None,
    command: str | None = None,
) -> Path:
    """Write the report of an attribution as one HTML file; see `build_attribution_report` for the arguments."""
    require("jinja2", "matplotlib", "PIL")
    report = build_attribution_report(
        attribution,
        k=k,
        targets=targets,
        class_names=class_names,
        title=title,
        lead=lead,
        show_train=show_train,
        show_target=show_target,
        predictions=predictions,
        output=output,
        command=command,
    )
    return write_report(report, path)


def build_attribution_report(
    attribution: AttributionLike,
    *,
    k: int = 8,
    targets: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
    title: str | None = None,
    lead: str | None = None,
    show_train: Show | None = None,
    show_target: Show | None = None,
    predictions: Sequence[Any] | None = None,
    output: str | None = None,
    command: str | None = None,
) -> Report:
    """Key figures, a card per target, a histogram of the scores, how to read it, how it was made.

    Args:
        attribution: what to show.
        k: proponents and opponents per target.
        targets: which targets get a card; None for the first 20.
        class_names: names for integer labels and predictions.
        title: the head of the report.
        lead: the paragraph below it; None says what was attributed.
        show_train: from a training row to what is shown of it: an `Example`, an image, a string, an
            (input, label) pair. None takes the data set's own examples where they are at hand.
        show_target: the same for targets.
        predictions: what the model says of each of the T targets: words, or integers for `class_names`.
        output: what f is, in a sentence.
        command: the line that makes the report again.

    Raises:
        InputError: targets that do not exist, k below 1, or something to show that is no function.
    """
    chosen = _choose(targets, attribution.num_targets)
    for name, show in (("show_train", show_train), ("show_target", show_target)):
        if show is not None and not callable(show):
            raise InputError(
                f"{name} is a function from a row to what is shown of it; got {type(show).__name__}: for a list write {name}=texts.__getitem__"
            )
    if k < 1:
        raise InputError(f"k is how many proponents and opponents a card shows, at least 1; got {k}")
    scores = attribution.scores.select_targets(torch.tensor(chosen, dtype=torch.int64))
    width = min(k, attribution.num_train)
    top, bottom = scores.extremes(width)
    train = _shower(show_train, attribution.train_rows, class_names)
    target = _shower(show_target, attribution.target_rows, class_names)
    shown = [target(row) for row in chosen]
    said = _words(predictions, class_names, attribution.num_targets)
    cards = target_cards(
        (top.rows, top.scores),
        (bottom.rows, bottom.scores),
        indices=chosen,
        train_example=train,
        target_example=lambda place: shown[place],
        outputs=None if attribution.outputs is None else attribution.outputs[chosen],
        predictions=None if said is None else [said[row] for row in chosen],
        # A label of the target is the truth only beside a prediction; alone it is just its name.
        truths=None
        if said is None or any(one.label is None for one in shown)
        else [str(one.label) for one in shown],
        errors=ranked_errors(attribution, chosen, top.rows, bottom.rows),
    )
    limit = max(
        (float(part.abs().max()) for part in (top.scores, bottom.scores) if part.numel()), default=0.0
    )
    histogram = (
        ScoresSection.from_blocks(_values(scores), limit=limit) if chosen and attribution.num_train else None
    )
    return ranking_report(
        cards,
        num_train=attribution.num_train,
        num_targets=attribution.num_targets,
        lead=lead,
        histogram=histogram,
        info=attribution.info,
        command=command,
        output=output,
        title=title,
    )


def ranked_errors(attribution: Any, targets: Sequence[int], *rankings_Tk: Any) -> Any:
    """Standard errors over checkpoints of ranked scores, as `target_cards(errors=…)` takes them.

    Args:
        attribution: a `trak.Attribution`.
        targets: the T targets that the rankings are of.
        rankings_Tk: the training rows of each ranking, [T, k].

    Returns:
        [T, k] for each ranking; None where there are not two checkpoints.
    """
    if not targets or len(getattr(attribution, "members", ())) < 2:
        return None
    errors = attribution.standard_error.select_targets(torch.tensor(list(targets), dtype=torch.int64))
    return tuple(errors.at(rows_Tk) for rows_Tk in rankings_Tk)


def _values(scores: Any) -> Iterator[Any]:
    for _, block_RT in scores.blocks():
        yield block_RT.detach().cpu().double().numpy()


def _choose(targets: Sequence[int] | None, num_targets: int) -> list[int]:
    if targets is None:
        return list(range(min(MAX_CARDS, num_targets)))
    chosen = [int(target) for target in targets]
    wrong = [target for target in chosen if not 0 <= target < num_targets]
    if wrong:
        raise InputError(f"there are targets 0 to {num_targets - 1}; got {', '.join(map(str, wrong[:5]))}")
    return chosen


def _words(
    predictions: Sequence[Any] | None, class_names: Sequence[str] | None, num_targets: int
) -> list[str] | None:
    if predictions is None:
        return None
    if len(predictions) != num_targets:
        raise InputError(f"predictions are one for each of the {num_targets} targets; got {len(predictions)}")
    return [
        example_of((None, prediction), class_names).label or str(prediction) for prediction in predictions
    ]


def _shower(
    show: Show | None, rows: _Rows | None, class_names: Sequence[str] | None
) -> Callable[[int], Example]:
    """From a row to an `Example`, each made once: strong training rows come up on many cards."""
    made: dict[int, Example] = {}

    def example(row: int) -> Example:
        if row not in made:
            if show is not None:
                made[row] = example_of(show(row), class_names)
            elif rows is not None:
                made[row] = example_of(_only(rows.example(row)), class_names)
            else:
                made[row] = Example()
        return made[row]

    return example


def _only(batch: Any) -> Any:
    """The one example of a batch of one: leading dimensions of 1 go, and lists of one string."""
    if isinstance(batch, Mapping) or hasattr(batch, "keys"):
        keys = batch.keys()  # not every such class iterates over its keys
        return {key: _only(batch[key]) for key in keys}
    if isinstance(batch, (list, tuple)):
        if len(batch) == 1 and isinstance(batch[0], str):
            return batch[0]
        return tuple(_only(part) for part in batch)
    shape: tuple[int, ...] = tuple(getattr(batch, "shape", ()))
    return batch[0] if shape[:1] == (1,) else batch
