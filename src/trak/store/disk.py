"""A folder on disk. Files are written to a temporary name in the same folder, flushed, then renamed."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from trak.errors import CorruptShardError
from trak.files import (
    STALE_AFTER_S,
    TEMPORARY_PREFIX,
    flush_folder,
    temporary_path,
    write_flushed,
    write_whole,
)
from trak.store.folder import Folder, Spec, TensorFile

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}
_NO_HARD_LINKS = {
    errno.EPERM,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EMLINK,
    errno.EXDEV,
    errno.EACCES,
}


class DiskTensorFile(TensorFile):
    """A safetensors file, mapped into memory: only the rows that are read are loaded."""

    def __init__(self, path: Path, handle: Any) -> None:
        self._path = path
        self._handle = handle

    @property
    def metadata(self) -> dict[str, str]:
        """Text that was written beside the tensors."""
        return self._handle.metadata() or {}

    @property
    def specs(self) -> dict[str, Spec]:
        """Dtype and shape of each tensor, from the file's header."""
        slices = {name: self._handle.get_slice(name) for name in self._handle.keys()}  # noqa: SIM118
        return {
            name: (_DTYPES.get(s.get_dtype(), s.get_dtype()), tuple(s.get_shape()))
            for name, s in slices.items()
        }

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """Rows of one tensor, mapped."""
        try:
            if start is None and stop is None:
                return self._handle.get_tensor(name)
            return self._handle.get_slice(name)[start:stop]
        except SafetensorError as error:
            raise CorruptShardError(_corrupt(self._path, error)) from error


class DiskFolder(Folder):
    """A folder of the file system."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def where(self) -> str:
        """The folder's path."""
        return str(self._path)

    @property
    def in_memory(self) -> bool:
        """False."""
        return False

    def folder(self, name: str) -> DiskFolder:
        """A folder inside this one."""
        return DiskFolder(self._path / name)

    def files(self) -> list[str]:
        """One scan; names with a leading dot are temporary or hidden."""
        return sorted(name for name in self._scan(folders=False) if not name.startswith("."))

    def folders(self) -> list[str]:
        """One scan; hidden ones are left out."""
        return sorted(name for name in self._scan(folders=True) if not name.startswith("."))

    def has(self, name: str) -> bool:
        """Whether the file is there, hence complete."""
        return (self._path / name).is_file()

    def create_text(self, name: str, text: str) -> bool:
        """Write to a temporary name, then link: of several processes exactly one wins."""
        self._make()
        target = self._path / name
        temporary = temporary_path(target)
        try:
            write_flushed(temporary, text.encode())
            try:
                # A hard link fails where the name is taken: of several processes exactly one wins.
                os.link(temporary, target)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_HARD_LINKS:
                    raise
                if not _create_exclusively(target, text.encode()):
                    return False
        finally:
            temporary.unlink(missing_ok=True)
        flush_folder(self._path)
        return True

    def read_text(self, name: str) -> str | None:
        """The text, or None."""
        try:
            return (self._path / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def write(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write to a temporary name, flush, rename, flush the folder."""
        self._make()
        write_whole(self._path / name, save(dict(tensors), dict(metadata)))

    @contextmanager
    def open(self, name: str) -> Iterator[DiskTensorFile]:
        """Map a file into memory."""
        path = self._path / name
        try:
            handle = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise CorruptShardError(_corrupt(path, error)) from error
        with handle:
            yield DiskTensorFile(path, handle)

    def announce(self, name: str) -> None:
        """Have the system start to read the file into its cache, where it can (Linux): the disk works while others compute."""
        if not hasattr(os, "posix_fadvise"):
            return
        with suppress(OSError):
            file = os.open(self._path / name, os.O_RDONLY)
            try:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(file)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        (self._path / name).unlink(missing_ok=True)

    def temporaries(self) -> list[str]:
        """Names of temporary files."""
        return sorted(name for name in self._scan(folders=False) if name.startswith(TEMPORARY_PREFIX))

    def remove_stale(self, older_than_s: float = STALE_AFTER_S) -> list[str]:
        """Remove temporary files by age. A living writer that lost one would fail at its rename."""
        removed = []
        for name in self.temporaries():
            path = self._path / name
            # Another process may remove the file at the same moment.
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > older_than_s:
                    path.unlink()
                    removed.append(name)
        return removed

    def _scan(self, *, folders: bool) -> list[str]:
        try:
            with os.scandir(self._path) as entries:
                return [entry.name for entry in entries if entry.is_dir() == folders]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _make(self) -> None:
        """Create the folder and those above it, each flushed into its parent to outlive a power failure."""
        missing = []
        path = self._path
        while not path.is_dir():
            missing.append(path)
            path = path.parent
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            flush_folder(path.parent)


def _create_exclusively(path: Path, data: bytes) -> bool:
    """Without hard links the name is claimed before the text is there: readers retry a torn one."""
    try:
        with open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    return True


def _corrupt(path: Path, error: Exception) -> str:
    return (
        f"{path} is damaged: {error}. It was truncated or changed after it was written. "
        "Remove the file and run again: only its rows are computed again."
    )
