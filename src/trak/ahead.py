"""Reading ahead: the next piece is read while the present one is computed with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TypeVar

_Read = TypeVar("_Read")


def read_ahead(calls: Iterable[Callable[[], _Read]]) -> Iterator[_Read]:
    """What the calls return, in order: while one result is used, a thread makes the next.

    Reading waits for a disk, and copying and decoding release the interpreter's lock: both go on beside the products. At most
    two results are there at once. Errors are raised where the result would have come.
    """
    waiting = iter(calls)
    first = next(waiting, None)
    if first is None:
        return
    second = next(waiting, None)
    if second is None:
        yield first()
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="trak-reading") as reading:
        coming = reading.submit(first)
        for call in chain([second], waiting):
            done, coming = coming.result(), reading.submit(call)
            yield done
            del done  # Before the next one is waited for.
        yield coming.result()
