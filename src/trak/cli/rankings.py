"""Proponents and opponents of targets, as values, as JSON and as tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from trak.cli.output import console, make_table
from trak.errors import InputError
from trak.report.numbers import signed

if TYPE_CHECKING:
    from trak import Attribution

MAX_TABLES = 10
"""Targets shown to people who did not say which."""

Name = Callable[[int], str | None]


@dataclass(frozen=True)
class Entry:
    """A training row, its score, and its label where it is known."""

    row: int
    score: float
    label: str | None = None


@dataclass(frozen=True)
class TargetRanking:
    """One target's strongest training rows; a side that was not asked for is None."""

    target: int
    output: float | None
    label: str | None
    proponents: tuple[Entry, ...] | None
    opponents: tuple[Entry, ...] | None


def rank(
    attribution: Attribution,
    targets: Sequence[int],
    k: int,
    *,
    proponents: bool = True,
    opponents: bool = True,
    train_name: Name = lambda row: None,
    target_name: Name = lambda target: None,
) -> list[TargetRanking]:
    """The k strongest training rows of each of the targets.

    Raises:
        InputError: a target that is not there.
    """
    wrong = [target for target in targets if not 0 <= target < attribution.num_targets]
    if wrong:
        raise InputError(
            f"there is no target {wrong[0]}; this attribution has targets 0 to {attribution.num_targets - 1}"
        )
    scores = attribution.scores.select_targets(torch.tensor(list(targets), dtype=torch.int64))
    width = min(k, attribution.num_train)
    top = scores.top(width) if proponents else None
    bottom = scores.bottom(width) if opponents else None

    def side(ranking: Any, place: int) -> tuple[Entry, ...] | None:
        if ranking is None:
            return None
        pairs = zip(ranking.rows[place].tolist(), ranking.scores[place].tolist())
        return tuple(Entry(row, score, train_name(row)) for row, score in pairs)

    return [
        TargetRanking(
            target=target,
            output=None if attribution.outputs is None else float(attribution.outputs[target]),
            label=target_name(target),
            proponents=side(top, place),
            opponents=side(bottom, place),
        )
        for place, target in enumerate(targets)
    ]


def as_values(rankings: Sequence[TargetRanking]) -> list[dict[str, Any]]:
    """For JSON: what is not known is left out."""
    values = []
    for ranking in rankings:
        one: dict[str, Any] = {"target": ranking.target}
        if ranking.label is not None:
            one["label"] = ranking.label
        if ranking.output is not None:
            one["output"] = ranking.output
        for name, side in (("proponents", ranking.proponents), ("opponents", ranking.opponents)):
            if side is not None:
                one[name] = [_entry(entry) for entry in side]
        values.append(one)
    return values


def print_tables(rankings: Sequence[TargetRanking]) -> None:
    """A table for each target: proponents on the left, opponents on the right."""
    shown = console()
    for ranking in rankings:
        shown.print(_table(ranking))


def choose(targets: Sequence[int] | None, num_targets: int, *, everything: bool) -> list[int]:
    """The targets asked for; else all of them, or the first few for people to read."""
    if targets:
        return list(targets)
    return list(range(num_targets if everything else min(num_targets, MAX_TABLES)))


def namer(labels: Any, class_names: Sequence[str] | None) -> Name:
    """From a row to its label in words, None where labels are not known."""
    if labels is None:
        return lambda row: None
    values = labels.tolist() if hasattr(labels, "tolist") else list(labels)

    def name(row: int) -> str | None:
        if row >= len(values):
            raise InputError(f"the recipe's labels end at row {len(values) - 1}; row {row} has none")
        value = values[row]
        known = isinstance(value, int) and class_names is not None and 0 <= value < len(class_names)
        return str(class_names[value]) if known and class_names is not None else str(value)

    return name


def _entry(entry: Entry) -> Mapping[str, Any]:
    values: dict[str, Any] = {"row": entry.row, "score": entry.score}
    return values if entry.label is None else {**values, "label": entry.label}


def _table(ranking: TargetRanking) -> Any:
    title = f"Target {ranking.target}" + (f": {ranking.label}" if ranking.label is not None else "")
    if ranking.output is not None:
        title += f"   f = {signed(ranking.output)}"
    sides = [
        (heading, side)
        for heading, side in (("proponents", ranking.proponents), ("opponents", ranking.opponents))
        if side is not None
    ]
    labelled = any(entry.label is not None for _, side in sides for entry in side)
    headings, right = [""], [""]
    for heading, _ in sides:
        # Column names are told apart by spaces, which do not show.
        pad = " " * len(headings)
        headings += [heading, f"score{pad}"] + ([f"label{pad}"] if labelled else [])
        right += [heading, f"score{pad}"]
    table = make_table(*headings, right=right, title=title)
    for place in range(max((len(side) for _, side in sides), default=0)):
        cells = [str(place + 1)]
        for _, side in sides:
            entry = side[place]
            cells += [f"row {entry.row}", signed(entry.score)] + ([entry.label or ""] if labelled else [])
        table.add_row(*cells)
    return table
