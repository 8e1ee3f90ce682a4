"""`trak top`: the strongest training rows of a saved attribution."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trak.cli.output import AsJson, print_json, say
from trak.cli.rankings import as_values, choose, print_tables, rank

EPILOG = """\b
Examples:
  trak top attribution
  trak top attribution --target 3 --target 7 --k 20
  trak top attribution --bottom --json
"""


def top(
    attribution: Annotated[
        Path,
        typer.Argument(
            metavar="ATTRIBUTION", help="Folder that trak attribute --out wrote.", show_default=False
        ),
    ],
    target: Annotated[
        list[int] | None,
        typer.Option("--target", "-t", metavar="T", help="A target's row; may be given again."),
    ] = None,
    k: Annotated[int, typer.Option("--k", "-k", metavar="K", min=1, help="How many training rows.")] = 10,
    bottom: Annotated[
        bool, typer.Option("--bottom", help="Opponents, with the lowest scores, instead.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show the strongest training rows for each target."""
    import trak

    loaded = trak.Attribution.load(attribution)
    targets = choose(target, loaded.num_targets, everything=as_json)
    rankings = rank(loaded, targets, k, proponents=not bottom, opponents=bottom)
    if as_json:
        print_json(
            {"num_train": loaded.num_train, "num_targets": loaded.num_targets, "targets": as_values(rankings)}
        )
        return
    print_tables(rankings)
    if not target and len(targets) < loaded.num_targets:
        say(f"… and {loaded.num_targets - len(targets)} more targets (--target chooses, --json shows all)")
