"""`trak frontier`: every method on one bank, quality against compute."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trak.cli.output import AsJson, console, make_table, print_json, prints_aside, say
from trak.cli.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from trak.evaluation import Bank
    from trak.frontier import Contender, Frontier, Problem, Training

EPILOG = """\b
RECIPE is that of trak attribute: its targets must be the bank's, in their
order, and its checkpoints models of the same kind that are not in the bank.
It may also define
  train_part        function that trains one model as the bank's, or the
                    beginning of it, and returns the share it did (or None)
  seconds_per_model in place of train_part, if you know
  passes_per_model  passes over the whole training set that a model takes
  runs              checkpoints from along training, one list for each run
  learning_rates    one for each checkpoint of a run
  train_texts, target_texts   for BM25
BANK is a folder of trak.evaluation.retrain, or bank.npz.

\b
Examples:
  trak frontier recipe.py --bank bank --out frontier
  trak frontier recipe.py --bank bank --methods "trak*,gradient-*,random"
  trak frontier recipe.py --bank bank --checkpoints 1,5 --slow-targets 100
"""


def frontier(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE.py[:FUNCTION]", help="What to attribute, see below.", show_default=False
        ),
    ],
    bank: Annotated[
        Path | None, typer.Option(metavar="BANK", help="Retrained models, see below.  [required]")
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Results, points and features; goes on there.")
    ] = Path("frontier"),
    methods: Annotated[
        list[str] | None,
        typer.Option(metavar="NAMES", help="Some of the methods, such as trak*,random; --list has all."),
    ] = None,
    checkpoints: Annotated[
        list[str] | None, typer.Option(metavar="M,M,...", help="Ensemble sizes.  [default: 1,3,10]")
    ] = None,
    targets: Annotated[int | None, typer.Option(metavar="T", min=1, help="Only the first T targets.")] = None,
    slow_targets: Annotated[
        int | None, typer.Option(metavar="T", min=1, help="The same, for slow methods only.")
    ] = None,
    limit: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0.1, help="Give a point up after so long.")
    ] = None,
    seconds_per_model: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0, help="Training of one model; 0 leaves training out."),
    ] = None,
    clock: Annotated[
        str | None,
        typer.Option(metavar="wall|processor", help="Time shown; by default the processor's on a CPU."),
    ] = None,
    passes: Annotated[
        bool, typer.Option("--passes/--seconds", help="Compute in the figure: plain training passes.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Threads of torch on the CPU.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure these methods again, whatever is kept.")
    ] = False,
    only_kept: Annotated[
        bool, typer.Option("--only-kept", help="Measure nothing: show the points that are there.")
    ] = False,
    list_methods: Annotated[
        bool, typer.Option("--list", help="List the methods and budgets, and stop.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare all methods on one bank: LDS against compute.

    Every method at several budgets, with measured seconds, training of the models it needs included. Writes
    frontier.json, .csv, .md and .png. The same command goes on where it stopped.
    """
    import torch

    from trak.errors import InputError
    from trak.frontier import built_in_contenders, choose_contenders, draw_frontier, run_frontier
    from trak.report.dependencies import require

    sizes = [_whole(word) for word in _words(checkpoints)] or [1, 3, 10]
    if threads is not None:
        torch.set_num_threads(threads)
    chosen = load_recipe(recipe)
    problem = _problem(chosen)
    contenders = choose_contenders(built_in_contenders(problem), _words(methods))
    if list_methods:
        _list(contenders, as_json)
        return
    if bank is None:
        raise InputError("--bank is needed: a folder of trak.evaluation.retrain, or bank.npz")
    require("matplotlib")
    loaded = _load_bank(bank, problem)
    with prints_aside():
        found = run_frontier(
            problem,
            loaded,
            contenders,
            training=_training(chosen, out, seconds_per_model),
            folder=out,
            checkpoints=sizes,
            num_targets=targets,
            slow_targets=slow_targets,
            limit=limit,
            clock=clock,
            fresh=fresh,
            only_kept=only_kept,
            on_point=lambda point: say(str(point)),
        )
    written = _write(found, out)
    if any(point.lds is not None for point in found.points):
        unit = "passes" if passes else "seconds"
        title = chosen.showing.get("title") or ""
        written.append(draw_frontier(found, out / "frontier.png", unit=unit, title=title))
    if as_json:
        print_json(found.to_dict())
    else:
        _print(found)
    for file in written:
        say(f"Wrote {file}")
    if all(point.error is not None for point in found.points):
        raise typer.Exit(1)


def _write(found: Frontier, out: Path) -> list[Path]:
    """The points as JSON, CSV and a table for pages."""
    from trak.files import write_whole
    from trak.frontier import markdown_table, write_csv

    write_whole(out / "frontier.md", markdown_table(found).encode())
    return [
        found.save(out / "frontier.json"),
        write_csv(found, out / "frontier.csv"),
        out / "frontier.md",
    ]


def _words(given: list[str] | None) -> list[str]:
    """Words of an option that may be given again, each time with several words between commas or blanks."""
    return [word for part in given or [] for word in part.replace(",", " ").split()]


def _whole(word: str) -> int:
    from trak.errors import InputError

    if not word.isdecimal() or int(word) < 1:
        raise InputError(f"--checkpoints takes whole numbers ≥ 1, such as 1,3,10; got {word!r}")
    return int(word)


def _problem(recipe: Recipe) -> Problem:
    from trak.frontier import Problem

    own = {"model", "train_set", "targets", "task", "checkpoints"}
    # What contenders differ in is theirs to set.
    dropped = {"projection", "damping", "preconditioner", "save_dir", "feature_dtype", "check"}
    arguments, measuring = recipe.arguments, recipe.measuring
    ignored = sorted(dropped & set(arguments))
    if ignored:
        say(f"Note: the recipe's {', '.join(ignored)} have no effect here: every method has its own")
    return Problem(
        model=arguments["model"],
        train_set=arguments["train_set"],
        targets=arguments["targets"],
        task=arguments["task"],
        checkpoints=list(arguments.get("checkpoints") or [arguments["model"]]),
        runs=[list(run) for run in measuring.get("runs") or ()],
        learning_rates=measuring.get("learning_rates"),
        train_texts=measuring.get("train_texts"),
        target_texts=measuring.get("target_texts"),
        options={name: value for name, value in arguments.items() if name not in own | dropped},
    )


def _load_bank(path: Path, problem: Problem) -> Bank:
    from trak.datasets import as_rows
    from trak.evaluation import Bank

    return Bank.load(path, num_train=as_rows(problem.train_set).num_rows)


def _training(recipe: Recipe, out: Path, given: float | None) -> Training:
    """What a model costs: as said, or as the recipe trains it."""
    from trak.errors import InputError
    from trak.frontier import Seconds, Training, measure_training

    measuring = recipe.measuring
    passes = measuring.get("passes_per_model")
    if given is None:
        given = measuring.get("seconds_per_model")
    if given is not None:
        return Training(seconds=Seconds(wall=float(given), processor=float(given)), passes=passes)
    if "train_part" not in measuring:
        raise InputError(
            "how long a model trains is not known: define train_part or seconds_per_model in the recipe, or pass --seconds-per-model "
            "(0 leaves training out)"
        )
    training = measure_training(measuring["train_part"], folder=out, passes=passes)
    say(
        f"Training a model takes {training.seconds.wall:.1f} s ({training.seconds.processor:.1f} processor seconds)"
    )
    return training


def _list(contenders: tuple[Contender, ...], as_json: bool) -> None:
    if as_json:
        print_json(
            [
                {
                    "name": one.name,
                    "label": one.label,
                    "reads": one.reads,
                    "slow": one.is_slow,
                    "note": one.note,
                }
                for one in contenders
            ]
        )
        return
    table = make_table("name", "method", "reads", "slow", "note")
    for one in contenders:
        table.add_row(one.name, one.label, one.reads, "slow" if one.is_slow else "", one.note)
    console().print(table)


def _print(found: Frontier) -> None:
    from trak.frontier.table import HEADINGS, cells_of, remarks_of

    table = make_table(*HEADINGS, right=HEADINGS[1:])
    best = {(point.method, point.budget) for point in found.best()}
    for point in found.points:
        style = "bold" if (point.method, point.budget) in best else None
        table.add_row(*cells_of(found, point), style=style)
    console().print(table)
    bank, training, machine = found.bank, found.training, found.machine
    for words in remarks_of(found):
        say(words)
    say(
        f"LDS with 95% intervals over {bank['num_subsets']} subsets and {bank['num_targets']} targets; * over fewer: those that may judge the "
        f"method. common: over the {bank['common_subsets']} subsets and {bank['common_targets']} targets that judge all. Bold: the best for "
        "its compute"
    )
    say(
        f"Seconds by the {found.clock} clock, {machine['threads']} thread{'s' if machine['threads'] != 1 else ''} of torch; training a model "
        f"takes {training[found.clock]:.1f} s"
    )
    if bank["noise_ceiling"] is not None:
        say(f"Noise ceiling {bank['noise_ceiling'][0]:.3f}: the highest LDS possible")
