"""Where files are kept: one small interface, with a folder on disk and a folder in memory behind it.

The protocol of the store is written once, in terms of this interface; design/store.md has it step by step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager

from torch import Tensor

from trak.files import STALE_AFTER_S

Spec = tuple[str, tuple[int, ...]]
"""Dtype (as torch names it, without the "torch.") and shape of a tensor."""


class TensorFile(ABC):
    """An open file of named tensors."""

    @property
    @abstractmethod
    def metadata(self) -> dict[str, str]:
        """Text that was written beside the tensors."""

    @property
    @abstractmethod
    def specs(self) -> dict[str, Spec]:
        """Dtype and shape of each tensor; no data is read."""

    @abstractmethod
    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """Rows start to stop (default: all) of one tensor, sharing the file's memory: copy to keep it."""


class Folder(ABC):
    """A folder of files that appear whole or not at all, and never change once they are there."""

    @property
    @abstractmethod
    def where(self) -> str:
        """The folder's place, for messages."""

    @property
    @abstractmethod
    def in_memory(self) -> bool:
        """Whether it goes away with the process."""

    @abstractmethod
    def folder(self, name: str) -> Folder:
        """A folder inside this one; it need not exist yet."""

    @abstractmethod
    def files(self) -> list[str]:
        """Names of complete files, sorted, temporary ones left out. Empty if there is no such folder."""

    @abstractmethod
    def folders(self) -> list[str]:
        """Names of folders inside this one, sorted. Empty if this one does not exist."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether a complete file of that name exists."""

    @abstractmethod
    def create_text(self, name: str, text: str) -> bool:
        """Write a text file that must not exist yet; False, and nothing changed, if it does.

        Of several that do so at the same moment, one wins.
        """

    @abstractmethod
    def read_text(self, name: str) -> str | None:
        """A text file; None if there is none.

        Raises:
            UnicodeDecodeError: it is no text.
        """

    @abstractmethod
    def write(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write a file of tensors, durably and all at once, in place of one of the same name."""

    @abstractmethod
    def open(self, name: str) -> AbstractContextManager[TensorFile]:
        """Open a file of tensors.

        Raises:
            FileNotFoundError: there is none.
            CorruptShardError: its structure is damaged.
        """

    @abstractmethod
    def announce(self, name: str) -> None:
        """Say that this file, if it is there, will soon be read from front to end: some folders can make use of it."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file; nothing if it is gone already."""

    @abstractmethod
    def temporaries(self) -> list[str]:
        """Names of temporary files: of writers at work, or left by killed ones."""

    @abstractmethod
    def remove_stale(self, older_than_s: float = STALE_AFTER_S) -> list[str]:
        """Remove temporary files not touched for so many seconds; their names."""
