"""Whether a task looks at a batch's values while it computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_is_looking = ContextVar("is_looking", default=True)


@contextmanager
def values_unseen() -> Iterator[None]:
    """Within it `is_true` answers no: every look at a value would wait for the device to finish what it was given so far.

    What tasks look for makes their outputs NaN as well. Whoever finds NaN afterwards calls the task again outside of this, for the message.
    """
    token = _is_looking.set(False)
    try:
        yield
    finally:
        _is_looking.reset(token)


def is_true(flag: Tensor) -> bool:
    """Whether it is; no where it cannot be looked at (under vmap) or is not to be (within `values_unseen`)."""
    if not _is_looking.get():
        return False
    try:
        return bool(flag)
    except RuntimeError:
        return False
