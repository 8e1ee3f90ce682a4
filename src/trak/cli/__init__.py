"""The command line, `trak`: one file per verb."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

NEEDED = ("typer", "rich")


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

    app(prog_name="trak")


def __getattr__(name: str) -> Any:
    """`app` is made when it is asked for, so that this module can be imported without typer."""
    if name == "app":
        from trak.cli.root import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
