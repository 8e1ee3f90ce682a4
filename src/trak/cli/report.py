"""`trak report`: the report of a saved attribution."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trak.cli.attribute import report_options
from trak.cli.output import prints_aside
from trak.cli.recipe import load_recipe

EPILOG = """\b
Examples:
  trak report attribution -o report.html
  trak report attribution -o report.html --recipe recipe.py --target 3
"""


def report(
    attribution: Annotated[
        Path,
        typer.Argument(
            metavar="ATTRIBUTION", help="Folder that trak attribute --out wrote.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The HTML file.")] = Path(
        "report.html"
    ),
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE.py[:FUNCTION]", help="Show the examples themselves, from this recipe's data."
        ),
    ] = None,
    target: Annotated[
        list[int] | None,
        typer.Option("--target", "-t", metavar="T", help="A target's row; may be given again."),
    ] = None,
    k: Annotated[
        int, typer.Option("--k", "-k", metavar="K", min=1, help="Proponents and opponents per target.")
    ] = 8,
) -> None:
    """Write a saved attribution as one self-contained HTML file."""
    import trak

    chosen = None if recipe is None else load_recipe(recipe)
    loaded = trak.Attribution.load(
        attribution,
        train_set=None if chosen is None else chosen.arguments["train_set"],
        targets=None if chosen is None else chosen.arguments["targets"],
    )
    options = {} if chosen is None else report_options(chosen)
    with prints_aside():
        written = loaded.report(out, k=k, targets=target or None, **options)
    typer.echo(written)
