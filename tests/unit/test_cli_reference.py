from pathlib import Path

import pytest
import typer

from trak.cli.reference import markdown

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


def commands():
    from trak.cli import app

    def walk(command, path):
        yield path, command
        for name, inner in getattr(command, "commands", {}).items():
            yield from walk(inner, f"{path} {name}")

    return dict(walk(typer.main.get_command(app), "trak"))


def test_the_page_is_what_help_says():
    if markdown() != PAGE.read_text(encoding="utf-8"):
        pytest.fail("docs/cli.md is out of date: python -m trak.cli.reference > docs/cli.md")


def test_every_command_is_on_the_page_and_explained():
    page = PAGE.read_text(encoding="utf-8")
    for path, command in commands().items():
        assert f"## `{path}`" in page
        assert command.help, path
        assert command.epilog, path
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{path}: {parameter.name} is not explained"


def test_help_fits_a_narrow_terminal():
    for line in markdown().split("## `trak`")[1].splitlines():
        assert len(line) <= 80, line


def test_the_same_flag_everywhere():
    for path in ("trak attribute", "trak top", "trak demo", "trak store info", "trak store verify"):
        options = [option for parameter in commands()[path].params for option in parameter.opts]
        assert "--json" in options, path
