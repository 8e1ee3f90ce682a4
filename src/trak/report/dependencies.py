"""The optional packages of this room."""

from __future__ import annotations

import importlib.util

from trak.errors import MissingDependencyError

NEEDED = {"jinja2": "jinja2", "matplotlib": "matplotlib", "PIL": "pillow"}
"""Module to the package that installs it."""


def require(*modules: str) -> None:
    """Check that these modules can be imported.

    Raises:
        MissingDependencyError: naming every package that is missing and the one command that installs them all.
    """
    missing = [NEEDED[module] for module in modules if not _installed(module)]
    if missing:
        raise MissingDependencyError(
            f"reports need {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed; "
            "pip install 'trak-attribution[report]'"
        )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
