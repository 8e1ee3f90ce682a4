"""The command line, `trak`: one file per verb."""

from __future__ import annotations

import codecs
import importlib.util
import io
import sys
from typing import Any

NEEDED = ("typer", "rich")


PLAIN = "trak-plain"
"""How signs are written that an encoding does not have: a minus is a hyphen, others are question marks."""


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].replace("−", "-")
    return text.encode("ascii", "replace").decode(), error.end


def main() -> None:
    """Run the command line."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(
            f"Error: the command line needs {' and '.join(missing)}, not installed here. Install with:\n\n"
            "  pip install 'trak-attribution[cli]'\n\n"
            "The Python library works without: import trak; trak.attribute(...)\n"
        )
        raise SystemExit(2)
    from trak.cli.root import app

    codecs.register_error(PLAIN, _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A sign that the encoding does not have (of a file on Windows, say) is no reason to stop.
            stream.reconfigure(errors=PLAIN)
    app(prog_name="trak")


def __getattr__(name: str) -> Any:
    """`app` is made when it is asked for, so that this module can be imported without typer."""
    if name == "app":
        from trak.cli.root import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
