"""Files of tensors that say what they are and whether they are intact.

Each carries one metadata entry, "trak", a JSON object: what the file is (kind, row set, fingerprint, rows)
and the CRC-32 of each tensor's bytes. One entry, because the order of several is not fixed and equal contents
should be equal files.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trak.errors import CorruptShardError
from trak.store.folder import Folder, Spec, TensorFile

_ENTRY = "trak"


class CheckedFile:
    """An open file of tensors whose checksums are compared whenever a tensor is read as a whole.

    Not so in memory (`trusted`), where nothing comes from outside and the comparison takes longer than the read: there only `verify`
    compares.
    """

    def __init__(self, file: TensorFile, where: str, *, trusted: bool = False) -> None:
        self._file = file
        self._where = where
        self._trusted = trusted
        self.specs: dict[str, Spec] = file.specs
        self.about: dict[str, Any] = self._read_about()

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """Rows start to stop of one tensor (default: all), sharing the file's memory: copy to keep it.

        Raises:
            CorruptShardError: the tensor is not there, or was read as a whole and its checksum is wrong.
        """
        if name not in self.specs:
            raise self.corrupt(f"it has no tensor {name!r}, only {sorted(self.specs)}")
        shape = self.specs[name][1]
        if not shape or (start in (None, 0) and stop in (None, shape[0])):
            tensor = self._file.read(name)
            if not self._trusted and checksum(tensor) != self.about["crc32"].get(name):
                raise self.corrupt(f"the checksum of {name!r} is wrong")
            return tensor
        return self._file.read(name, start, stop)

    def verify(self) -> None:
        """Read every tensor and compare its checksum.

        Raises:
            CorruptShardError: one is wrong.
        """
        self._trusted = False
        for name in self.specs:
            self.read(name)

    def check_specs(self, expected: Mapping[str, Spec]) -> None:
        """Compare names, dtypes and shapes.

        Raises:
            CorruptShardError: they differ.
        """
        if dict(expected) != self.specs:
            raise self.corrupt(f"it should hold {_specs_text(expected)} and holds {_specs_text(self.specs)}")

    def check_about(self, expected: Mapping[str, Any]) -> None:
        """Compare what the file says of itself.

        Raises:
            CorruptShardError: it says something else.
        """
        wrong = {key: self.about.get(key) for key, value in expected.items() if self.about.get(key) != value}
        if wrong:
            raise self.corrupt(
                f"it says {wrong} of itself, expected { ({key: expected[key] for key in wrong}) }"
            )

    def corrupt(self, problem: str) -> CorruptShardError:
        """An error about this file, to be raised."""
        return CorruptShardError(
            f"{self._where} is not what it should be: {problem}. It was damaged, or copied from elsewhere. "
            "Remove the file and run again: only its rows are computed again."
        )

    def _read_about(self) -> dict[str, Any]:
        try:
            about = json.loads(self._file.metadata[_ENTRY])
        except (KeyError, ValueError):
            about = None
        if not isinstance(about, dict) or not isinstance(about.get("crc32"), dict):
            self.about = {}
            raise self.corrupt(f"its metadata has no readable {_ENTRY!r} entry")
        return about


@contextmanager
def open_file(folder: Folder, name: str) -> Iterator[CheckedFile]:
    """Open a file of tensors that `write_file` wrote.

    Raises:
        FileNotFoundError: there is none.
        CorruptShardError: its structure or metadata is damaged.
    """
    with folder.open(name) as file:
        yield CheckedFile(file, f"{folder.where}/{name}", trusted=folder.in_memory)


def write_file(folder: Folder, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors (contiguous, on the CPU, no memory shared) and their checksums, all at once."""
    text = json.dumps(
        {**about, "crc32": {key: checksum(tensor) for key, tensor in tensors.items()}}, sort_keys=True
    )
    folder.write(name, tensors, {_ENTRY: text})


def checksum(tensor: Tensor) -> str:
    """CRC-32 of a tensor's bytes in row-major order, 8 hexadecimal digits."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{zlib.crc32(data):08x}"  # type: ignore[arg-type]


def _specs_text(specs: Mapping[str, Spec]) -> str:
    return ", ".join(f"{name} {dtype}{list(shape)}" for name, (dtype, shape) in sorted(specs.items()))
