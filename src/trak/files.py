"""Files that are there whole or not at all: a temporary name in the same folder, flush, rename, flush the folder."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

TEMPORARY_PREFIX = ".tmp-"
"""Names of files in writing begin so."""

STALE_AFTER_S = 3600.0
"""Temporary files untouched for this long belong to writers that are gone: a file takes seconds to write."""


def write_whole(path: Path, data: bytes) -> None:
    """Write a file atomically and durably, replacing what was there. Its folder must exist."""
    temporary = temporary_path(path)
    try:
        write_flushed(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        # A disk that is full must not also keep the half of a file that no one will read.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def temporary_path(path: Path) -> Path:
    """A name beside the file that no other process or thread uses."""
    return path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{uuid4().hex[:12]}-{path.name}")


def write_flushed(path: Path, data: bytes) -> None:
    """Write a file in place and make its contents durable."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Make the names in a folder durable. Windows has no such call; its renames are journalled."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems refuse to flush a folder: nothing more can be done there.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)
