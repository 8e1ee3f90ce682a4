"""`trak` itself: the list of verbs and the options before them."""

from __future__ import annotations

from typing import Annotated

import typer

from trak._version import __version__
from trak.cli import attribute, demo, evaluate, frontier, report, store, top
from trak.cli.groups import Commands

EPILOG = """\b
Examples:
  trak demo --quick
  trak attribute recipe.py --top 5 --report report.html --out attribution
  trak top attribution --target 3 --json
  trak store verify features
"""

# Plain help: the same text on a terminal, in a pipe and in the documentation.
app = typer.Typer(
    name="trak",
    cls=Commands,
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    epilog=EPILOG,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"trak {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show an error's traceback. Goes before the command.")
    ] = False,
) -> None:
    """Which training data made my model do this?

    TRAK scores every training example for every prediction of a PyTorch model:
    positive where the example raised the model's output, negative where it lowered it.
    """


app.command("demo", rich_help_panel="Start here", epilog=demo.EPILOG)(demo.demo)
app.command("attribute", rich_help_panel="Attribute", epilog=attribute.EPILOG)(attribute.attribute)
app.command("evaluate", rich_help_panel="Attribute", epilog=evaluate.EPILOG)(evaluate.evaluate)
app.command("frontier", rich_help_panel="Attribute", epilog=frontier.EPILOG)(frontier.frontier)
app.command("top", rich_help_panel="Look inside", epilog=top.EPILOG)(top.top)
app.command("report", rich_help_panel="Look inside", epilog=report.EPILOG)(report.report)
app.add_typer(store.app, name="store", rich_help_panel="Look inside")
