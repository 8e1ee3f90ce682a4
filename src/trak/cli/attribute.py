"""`trak attribute`: scores from a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trak.cli.options import parse_damping, parse_projection
from trak.cli.output import AsJson, print_json, prints_aside, say
from trak.cli.rankings import as_values, choose, namer, print_tables, rank
from trak.cli.recipe import SHOWING, Recipe, load_recipe

if TYPE_CHECKING:
    from trak import Attribution

EPILOG = """\b
A recipe is a Python file that defines:
  model        the architecture, a torch.nn.Module
  train_set    a dataset, a DataLoader, or tensors (inputs, labels)
  targets      the same, for the predictions to explain
  task         "image_classification", "text_classification", "regression",
               "causal_lm", "seq2seq_lm", "masked_lm",
               "dense_classification", or a trak.Task
  checkpoints  state dicts or paths; more of them give better scores
and any other argument of trak.attribute. For showing results it may define
train_labels, target_labels, class_names, predictions, show_train,
show_target, title and lead.

\b
Examples:
  trak attribute recipe.py
  trak attribute recipe.py:make --save-dir features --report report.html
  trak attribute recipe.py --projection sparse:2048 --damping relative:0.1
  trak attribute recipe.py --json --top 3 > top.json
"""


def attribute(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE.py[:FUNCTION]", help="What to attribute, see below.", show_default=False
        ),
    ],
    save_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep features there, and go on from them.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Save the attribution, for trak top and report."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a report, one HTML file.")
    ] = None,
    scores: Annotated[
        Path | None, typer.Option(metavar="FILE.npy", help="Write all scores, [training rows, targets].")
    ] = None,
    top: Annotated[int, typer.Option(metavar="K", min=1, help="Proponents and opponents per target.")] = 10,
    as_json: AsJson = False,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, mps. By default the best there is.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="B", min=1, help="Examples at once.")] = None,
    projection: Annotated[
        str | None,
        typer.Option(
            metavar="KIND:DIM",
            help="rademacher, gaussian, sparse, kronecker or eigenbasis, such as kronecker:4096; identity; or whitened:KIND:DIM.",
        ),
    ] = None,
    damping: Annotated[
        str | None,
        typer.Option(metavar="RULE", help="auto, a number, or relative:RATIO of the mean eigenvalue."),
    ] = None,
) -> None:
    """Score training data for predictions, and show what mattered.

    Runs the recipe, computes TRAK scores, and prints the training rows that raised each target's output most
    (proponents) and lowered it most (opponents). Options given here take the place of the recipe's.
    """
    _check_can_be_written(out=out, report=report, scores=scores)
    given = {
        "save_dir": save_dir,
        "device": device,
        "batch_size": batch_size,
        "projection": None if projection is None else parse_projection(projection),
        "damping": None if damping is None else parse_damping(damping),
    }
    chosen = load_recipe(recipe)
    arguments = {**chosen.arguments, **{name: value for name, value in given.items() if value is not None}}
    with prints_aside():
        attribution = _compute(arguments)
        written = _write(
            attribution, chosen, out=out, report=report, scores=scores, command=f"trak attribute {recipe}"
        )
    _show(attribution, chosen, top=top, as_json=as_json, written=written)


def _compute(arguments: dict[str, Any]) -> Attribution:
    import trak

    try:
        return trak.attribute(**arguments)
    except KeyboardInterrupt:
        if arguments.get("save_dir") is not None:
            say(
                f"\nInterrupted. What is done is kept in {arguments['save_dir']}: the same command goes on from there."
            )
        raise


def _check_can_be_written(*, out: Path | None, report: Path | None, scores: Path | None) -> None:
    """Before the work, not after it."""
    from trak.errors import InputError
    from trak.report.dependencies import require
    from trak.results import check_save_folder

    if out is not None:
        check_save_folder(out)
    if report is not None:
        require("jinja2", "matplotlib", "PIL")
    for option, path in (("--report", report), ("--scores", scores)):
        if path is None:
            continue
        if path.is_dir():
            raise InputError(f"{option} {path} is a folder; give the name of a file")
        if option == "--report" and not path.resolve().parent.is_dir():
            raise InputError(f"{option} {path}: there is no folder {path.parent}; create it first")


def _write(
    attribution: Attribution,
    recipe: Recipe,
    *,
    out: Path | None,
    report: Path | None,
    scores: Path | None,
    command: str,
) -> dict[str, str]:
    """Write the files asked for: what each is, to where it is."""
    written: dict[str, str] = {}
    if out is not None:
        written["attribution"] = str(attribution.save(out))
    if scores is not None:
        written["scores"] = str(attribution.scores.save(scores))
    if report is not None:
        written["report"] = str(attribution.report(report, command=command, **report_options(recipe)))
    return written


def report_options(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says about showing, as the report's options."""
    return {
        name: recipe.showing[name]
        for name in SHOWING
        if name in recipe.showing and not name.endswith("_labels")
    }


def _show(
    attribution: Attribution, recipe: Recipe, *, top: int, as_json: bool, written: dict[str, str]
) -> None:
    names = recipe.showing.get("class_names")
    targets = choose(None, attribution.num_targets, everything=as_json)
    rankings = rank(
        attribution,
        targets,
        top,
        train_name=namer(recipe.showing.get("train_labels"), names),
        target_name=namer(recipe.showing.get("target_labels"), names),
    )
    if as_json:
        print_json(
            {
                "num_train": attribution.num_train,
                "num_targets": attribution.num_targets,
                "targets": as_values(rankings),
                "written": written,
            }
        )
        return
    print_tables(rankings)
    if len(targets) < attribution.num_targets:
        say(f"… and {attribution.num_targets - len(targets)} more targets (--json shows all of them)")
    for what, path in written.items():
        say(f"Wrote {what}: {path}")
