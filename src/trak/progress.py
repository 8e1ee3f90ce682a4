"""Progress bars: rows per second and time left on a terminal or in a notebook, silence elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Bar(Protocol):
    """What `bar` yields."""

    def update(self, n: int = 1, /) -> object:
        """N more units are done."""


class _Quiet:
    def update(self, n: int = 1, /) -> None:
        """Nothing to show."""


@contextmanager
def bar(
    total: int | None,
    description: str,
    *,
    unit: str = "rows",
    enabled: bool | None = None,
    initial: int = 0,
    delay: float = 0.0,
) -> Iterator[Bar]:
    """A bar over `total` units.

    Args:
        total: number of units, None if unknown.
        description: what is being done.
        unit: what is counted.
        enabled: True or False to force; None shows the bar only where standard error is a terminal or a notebook is running.
        initial: units that were done in an earlier run.
        delay: seconds before the bar is shown, for stages that are usually short.
    """
    if not (is_interactive() if enabled is None else enabled):
        yield _Quiet()
        return
    from tqdm.auto import tqdm

    with tqdm(
        total=total,
        desc=description,
        unit=f" {unit}",
        initial=initial,
        dynamic_ncols=True,
        smoothing=0.1,
        delay=delay,
    ) as shown:
        yield shown


def is_interactive() -> bool:
    """Whether somebody is watching: standard error is a terminal, or an IPython kernel is running."""
    if "ipykernel" in sys.modules:
        return True
    return bool(getattr(sys.stderr, "isatty", lambda: False)())
