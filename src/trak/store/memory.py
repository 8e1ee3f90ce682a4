"""A folder in memory: the same promises as one on disk, for as long as the process lives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from trak.files import STALE_AFTER_S
from trak.store.folder import Folder, Spec, TensorFile


class MemoryTensorFile(TensorFile):
    """Named tensors that are kept as they are."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        self._tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        self._metadata = dict(metadata)

    @property
    def metadata(self) -> dict[str, str]:
        """Text that was given with the tensors."""
        return self._metadata

    @property
    def specs(self) -> dict[str, Spec]:
        """Dtype and shape of each tensor."""
        return {
            name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in self._tensors.items()
        }

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """A view of the kept tensor."""
        tensor = self._tensors[name]
        return tensor if start is None and stop is None else tensor[start:stop]


class MemoryFolder(Folder):
    """A folder that lives in this object."""

    def __init__(self, where: str = "memory") -> None:
        self._where = where
        self._texts: dict[str, str] = {}
        self._files: dict[str, MemoryTensorFile] = {}
        self._folders: dict[str, MemoryFolder] = {}

    @property
    def where(self) -> str:
        """Its name in messages."""
        return self._where

    @property
    def in_memory(self) -> bool:
        """True."""
        return True

    def folder(self, name: str) -> MemoryFolder:
        """A folder inside this one."""
        return self._folders.setdefault(name, MemoryFolder(f"{self._where}/{name}"))

    def files(self) -> list[str]:
        """Names of texts and files."""
        return sorted([*self._texts, *self._files])

    def folders(self) -> list[str]:
        """Names of folders that hold anything."""
        return sorted(name for name, folder in self._folders.items() if folder.files() or folder.folders())

    def has(self, name: str) -> bool:
        """Whether it is there."""
        return name in self._texts or name in self._files

    def create_text(self, name: str, text: str) -> bool:
        """Keep a text, if the name is free."""
        if name in self._texts:
            return False
        self._texts[name] = text
        return True

    def read_text(self, name: str) -> str | None:
        """The text, or None."""
        return self._texts.get(name)

    def write(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Keep copies of the tensors."""
        self._files[name] = MemoryTensorFile(tensors, metadata)

    @contextmanager
    def open(self, name: str) -> Iterator[MemoryTensorFile]:
        """The kept tensors."""
        if name not in self._files:
            raise FileNotFoundError(f"{self._where}/{name}")
        yield self._files[name]

    def announce(self, name: str) -> None:
        """It is in memory already."""

    def remove(self, name: str) -> None:
        """Forget a file, if it is there."""
        self._texts.pop(name, None)
        self._files.pop(name, None)

    def temporaries(self) -> list[str]:
        """None: nothing here is half written."""
        return []

    def remove_stale(self, older_than_s: float = STALE_AFTER_S) -> list[str]:
        """None."""
        return []
