"""`trak store`: what a folder of features holds, and whether it is whole."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trak.cli.groups import Commands
from trak.cli.output import AsJson, console, make_table, print_facts, print_json

if TYPE_CHECKING:
    from trak.store import Report, Store

app = typer.Typer(
    cls=Commands,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Look into a folder of features, and check it.",
    epilog="\b\nExamples:\n  trak store info features\n  trak store verify features --json\n",
)

Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="The folder given as --save-dir.", show_default=False)
]


@app.command(epilog="\b\nExample:\n  trak store info features\n")
def info(folder: Folder, as_json: AsJson = False) -> None:
    """Show what is stored: settings, checkpoints, and how many rows of each."""
    from trak.store import load_store

    store = load_store(folder)
    if as_json:
        print_json(_describe(store))
    else:
        _print_info(_describe(store))


@app.command(
    epilog="\b\nExit codes: 0 whole, 1 damaged or incomplete, 2 no store at all.\n\n"
    "\b\nExamples:\n  trak store verify features\n  trak store verify features --quick --json\n"
)
def verify(
    folder: Folder,
    quick: Annotated[
        bool, typer.Option("--quick", help="Sizes and shapes only; do not read every byte.")
    ] = False,
    remove_stale: Annotated[
        bool, typer.Option("--remove-stale", help="Remove what killed writers left behind.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check every file against its checksum, and find missing rows."""
    from trak.store import verify as check

    found = check(folder, read=not quick, remove_stale=remove_stale)
    if as_json:
        print_json(_findings(found))
    else:
        _print_findings(found)
    if not found.complete:
        raise typer.Exit(1)


def _describe(store: Store) -> dict[str, Any]:
    header = store.header
    return {
        "folder": store.where,
        "num_rows": header.num_rows,
        "dim": header.dim,
        "num_parameters": sum(prod(shape) for shape in header.parameters.values()),
        "num_tensors": len(header.parameters),
        "projection": dict(header.projection),
        "task": dict(header.task),
        "compute_dtype": header.compute_dtype,
        "feature_dtype": header.feature_dtype,
        "format_version": header.format_version,
        "extra": dict(header.extra),
        "checkpoints": [_checkpoint(store, model_id) for model_id in store.checkpoints()],
        "experiments": [
            {"name": name, "num_rows": store.experiment_num_rows(name)} for name in store.experiments()
        ],
    }


def _checkpoint(store: Store, model_id: int) -> dict[str, Any]:
    return {
        "checkpoint": model_id,
        "fingerprint": store.checkpoint_fingerprint(model_id),
        "train": _rows(store, model_id),
        "experiments": {name: _rows(store, model_id, name) for name in store.experiments()},
    }


def _rows(store: Store, model_id: int, experiment: str | None = None) -> dict[str, int]:
    rows = store.rows(model_id, experiment)
    return {"num_rows": rows.num_rows, "missing": sum(stop - start for start, stop in rows.missing())}


def _print_info(facts: dict[str, Any]) -> None:
    settings = {
        "training rows": facts["num_rows"],
        "features per row": facts["dim"],
        "parameters": f"{facts['num_parameters']} in {facts['num_tensors']} tensors",
        "projection": _line(facts["projection"]),
        "task": _line(facts["task"]),
        "computed in": facts["compute_dtype"],
        "stored in": facts["feature_dtype"],
        "format version": facts["format_version"],
    }
    if facts["extra"]:
        settings["extra"] = _line(facts["extra"])
    print_facts(settings, title=f"Features in {facts['folder']}")
    table = make_table(
        "checkpoint", "rows of", "stored", "missing", "fingerprint", right=("stored", "missing")
    )
    for one in facts["checkpoints"]:
        for name, rows in {"training set": one["train"], **one["experiments"]}.items():
            stored = rows["num_rows"] - rows["missing"]
            cells = (str(one["checkpoint"]), name, str(stored), str(rows["missing"]), one["fingerprint"][:12])
            table.add_row(*cells)
    console().print(table)


def _findings(found: Report) -> dict[str, Any]:
    return {
        "folder": found.where,
        "ok": found.ok,
        "complete": found.complete,
        "shards": found.shards,
        "other_files": found.others,
        "read_in_full": found.read,
        "corrupt": [{"file": one.file, "problem": one.problem} for one in found.corrupt],
        "missing": [
            {"rows_of": gap.label, "ranges": [list(part) for part in gap.ranges]} for gap in found.missing
        ],
        "unknown": list(found.unknown),
        "temporaries": list(found.temporaries),
        "removed": list(found.removed),
    }


def _print_findings(found: Report) -> None:
    typer.echo(str(found))
    if found.complete:
        typer.echo("Whole: nothing is damaged, nothing is missing.")
    elif found.ok:
        typer.echo(
            "Incomplete: run the same attribution again with this --save-dir, and it computes what is missing."
        )
    else:
        typer.echo(
            "Damaged: delete the files named above and run the same attribution again with this --save-dir."
        )


def _line(values: dict[str, Any]) -> str:
    return ", ".join(
        _short(value) if name in ("kind", "task") else f"{name.replace('_', ' ')} {_short(value)}"
        for name, value in values.items()
    )


def _short(value: Any) -> str:
    """Digests are cut as fingerprints are; --json has them in full."""
    words = str(value)
    return words[:12] if re.fullmatch(r"[0-9a-f]{64}", words) else words
