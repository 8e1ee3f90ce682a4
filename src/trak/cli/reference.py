"""docs/cli.md, from the commands' own help: `python -m trak.cli.reference > docs/cli.md`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

HEAD = """# Command line

`pip install 'trak-attribution[cli]'` brings the command `trak`. Each verb prints tables for people, or JSON on
standard output with `--json`; remarks and progress go to standard error. Exit codes: 0 done, 1 a check failed,
2 something to put right, which the message says, 130 interrupted; an error in your own data set or model shows its
traceback and ends with 1.

This page is what `--help` says; it is written by `python -m trak.cli.reference`.
"""


def markdown() -> str:
    """The page: the help of `trak` and of each of its commands."""
    from trak.cli.root import app

    command: Any = typer.main.get_command(app)
    parts = [HEAD]
    for path, text in _pages(command, "trak", None):
        parts.append(f"## `{path}`\n\n```text\n{text.rstrip()}\n```\n")
    return "\n".join(parts)


def _pages(command: Any, path: str, parent: Any) -> Iterator[tuple[str, str]]:
    context = command.context_class(
        command, info_name=path.split()[-1], parent=parent, terminal_width=80, **command.context_settings
    )
    with context:
        yield path, "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
        for name in getattr(command, "commands", {}):
            yield from _pages(command.commands[name], f"{path} {name}", context)


if __name__ == "__main__":
    import sys

    sys.stdout.write(markdown())
