"""What goes to standard output: JSON for programs, tables for people. Everything else goes to standard error."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, redirect_stdout
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

AsJson = Annotated[
    bool,
    typer.Option("--json/--table", help="JSON for programs, or tables for people."),
]


def json_text(values: Any) -> str:
    """Indented JSON; NaN and infinity become null."""
    return json.dumps(_finite(values), indent=2, ensure_ascii=False, allow_nan=False)


def print_json(values: Any) -> None:
    """Indented JSON on standard output, in ASCII where that is no UTF-8 (a redirected one on Windows)."""
    text = json_text(values)
    is_unicode = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    typer.echo(text if is_unicode else json.dumps(json.loads(text), indent=2))


def say(words: str) -> None:
    """A remark for people, on standard error, so that standard output stays what was asked for."""
    typer.echo(words, err=True)


def prints_aside() -> AbstractContextManager[Any]:
    """While a user's own code runs: what it prints is a remark, and would break the JSON on standard output."""
    return redirect_stdout(sys.stderr)


def console() -> Console:
    """Standard output: colours on a terminal only, never wider than it."""
    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False)


def make_table(*headings: str, right: Sequence[str] = (), title: str | None = None) -> Table:
    """An empty table. right: headings of the columns of numbers."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        header_style="dim",
    )
    for heading in headings:
        number = heading in right
        table.add_column(heading, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return table


def print_facts(facts: Mapping[str, Any], title: str | None = None) -> None:
    """Names and values, one a line."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, str(value))
    shown = console()
    if title:
        shown.print(title, style="bold")
    shown.print(table)


def _finite(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {str(key): _finite(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_finite(value) for value in values]
    if isinstance(values, float) and not math.isfinite(values):
        return None
    return values
