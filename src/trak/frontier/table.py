"""A frontier as rows: for spreadsheets, and for pages."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from trak.files import write_whole
from trak.frontier.values import Frontier, FrontierPoint

COLUMNS = (
    "method",
    "label",
    "family",
    "reads",
    "budget",
    "num_models",
    "lds",
    "low",
    "high",
    "num_subsets",
    "num_targets",
    "num_constant",
    "common_lds",
    "common_low",
    "common_high",
    "train_seconds_wall",
    "train_seconds_processor",
    "attribute_seconds_wall",
    "attribute_seconds_processor",
    "error",
    "note",
)
HEADINGS = ("method", "budget", "LDS", "interval", "common", "training", "attribution")
"""Of the table for people, see `cells_of`."""


def write_csv(frontier: Frontier, path: str | Path) -> Path:
    """One line for each point, with the columns `COLUMNS`; numbers in full, nothing where there is none."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    for point in frontier.points:
        values = {
            name: getattr(point, name) for name in COLUMNS if not name.endswith(("_wall", "_processor"))
        }
        for kind in ("train", "attribute"):
            seconds = getattr(point, f"{kind}_seconds")
            values[f"{kind}_seconds_wall"] = round(seconds.wall, 3)
            values[f"{kind}_seconds_processor"] = round(seconds.processor, 3)
        writer.writerow(values)
    path = Path(path)
    write_whole(path, text.getvalue().encode())
    return path


def markdown_table(frontier: Frontier) -> str:
    """A table for a page in Markdown; points that are the best for their compute are bold."""
    heads = [*HEADINGS[:5], *(f"{name}, s" for name in HEADINGS[5:])]
    best = {(point.method, point.budget) for point in frontier.best()}
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for point in frontier.points:
        cells = cells_of(frontier, point)
        if (point.method, point.budget) in best:
            cells[0] = f"**{cells[0]}**"
        lines.append("| " + " | ".join(cells) + " |")
    remarks = [f"- {words}" for words in remarks_of(frontier)]
    return "\n".join([*lines, *(["", *remarks] if remarks else [])]) + "\n"


def remarks_of(frontier: Frontier) -> list[str]:
    """Points that failed, and those that predict nothing for some targets."""
    failed = [str(point) for point in frontier.points if point.error is not None]
    constant = [
        f"{point.label}, {point.budget_words or 'no models'}: {point.num_constant} of {point.num_targets} targets are left out, for which it "
        "predicts the same on every subset"
        for point in frontier.points
        if point.num_constant
    ]
    return failed + constant


def cells_of(frontier: Frontier, point: FrontierPoint) -> list[str]:
    """The cells below `HEADINGS`: an asterisk behind the LDS of a point that fewer subsets or targets judge."""
    star = "*" if frontier.is_judged_by_less(point) else ""
    scores = ["failed", "", ""]
    if point.lds is not None:
        interval = f"[{_short(point.low)}, {_short(point.high)}]"
        scores = [f"{_short(point.lds)}{star}", interval, _short(point.common_lds)]
    clock = frontier.clock
    seconds = [seconds_words(each.by(clock)) for each in (point.train_seconds, point.attribute_seconds)]
    return [point.label, point.budget_words, *scores, *seconds]


def seconds_words(seconds: float) -> str:
    """Two significant digits below 10, whole seconds above."""
    return f"{seconds:.2g}" if seconds < 10 else f"{seconds:,.0f}"


def _short(value: float | None) -> str:
    """.123: no zero before the point, a real minus sign."""
    if value is None:
        return ""
    return f"{value:.3f}".replace("-", "\N{MINUS SIGN}").replace("0.", ".", 1)
