"""`trak demo`: the whole way, on data that comes along."""

from __future__ import annotations

import os
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from trak.cli.output import AsJson, print_json, say

EPILOG = """\b
Examples:
  trak demo --quick
  trak demo --out demo-report --open
"""


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer models: a first look in less time.")] = False,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where everything goes.")] = Path(
        "demo-report"
    ),
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of all that is random.")] = 0,
    open_report: Annotated[
        bool, typer.Option("--open/--no-open", help="Show the report in the browser afterwards.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train, attribute, evaluate and report, on small real data.

    Needs no download and no GPU. Small networks learn Fashion-MNIST; the report says which training images made
    them say what they say, and tests whether to believe it. An interrupted run goes on where it stopped.
    """
    from trak.report.dependencies import require

    require("jinja2", "matplotlib", "PIL")
    from trak.demo import run

    result = run(quick=quick, out=out, seed=seed)
    path = Path(os.fspath(result)).resolve()
    if as_json:
        print_json(result.to_dict())
    else:
        typer.echo(str(result))
        typer.echo(f"\nReport: {path}")
    if open_report and not webbrowser.open(path.as_uri()):
        say("There is no browser to open here; open the file yourself.")
