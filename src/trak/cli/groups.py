"""How the commands are listed, and how trak's errors end."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from trak.errors import TrakError

PANELS = ("Start here", "Attribute", "Look inside")
"""Headings of the commands in `trak --help`, in order."""


class Commands(TyperGroup):
    """Commands under their headings; an error of trak is a message on standard error and exit code 2."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """One list for each heading."""
        listed: dict[str, list[tuple[str, str]]] = {panel: [] for panel in PANELS}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            if command is None or command.hidden:
                continue
            panel = getattr(command, "rich_help_panel", None)
            heading = panel if isinstance(panel, str) else "Commands"
            listed.setdefault(heading, []).append((name, command.get_short_help_str(70)))
        width = max((len(name) for rows in listed.values() for name, _ in rows), default=0)
        for panel, rows in listed.items():
            if rows:
                with formatter.section(panel):
                    formatter.write_dl([(name.ljust(width), words) for name, words in rows])

    def invoke(self, ctx: Any) -> Any:
        """Run; what users can put right needs no traceback, unless --debug asks for it."""
        try:
            return super().invoke(ctx)
        except (TrakError, OSError) as error:
            if ctx.find_root().params.get("debug"):
                raise
            if isinstance(error, BrokenPipeError):
                raise
            typer.echo(f"Error: {_message(error)}", err=True)
            raise typer.Exit(2) from error


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and not isinstance(error, TrakError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__
