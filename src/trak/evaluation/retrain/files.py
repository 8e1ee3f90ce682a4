"""Small files that are there whole or not at all, for what a run that was killed goes on from: tensors, and settings that must fit."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from trak.errors import CorruptShardError, StoreError
from trak.files import STALE_AFTER_S, TEMPORARY_PREFIX, write_whole


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically. Tensors that share memory are written once each."""
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_whole(path, save(copies, dict(metadata)))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file.

    Raises:
        CorruptShardError: it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            return tensors, dict(handle.metadata() or {})
    except SafetensorError as error:
        raise CorruptShardError(
            f"{path} is damaged: {error}. It was truncated or changed after it was written. "
            "Remove the file and run again: only what it held is computed again."
        ) from error


def read_settings(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CorruptShardError: it is damaged.
    """
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptShardError(f"{file} is damaged: {error}. Give another folder.") from error
    if not isinstance(settings, dict):
        raise CorruptShardError(f"{file} is damaged: no JSON object. Give another folder.")
    return settings


def differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, str]:
    """Settings that differ, by name, as lines of a message."""
    return {
        name: f"  {name}: stored {stored.get(name, '(absent)')!r}, asked for {asked.get(name, '(absent)')!r}"
        for name in {**asked, **stored}
        if name not in stored or name not in asked or stored[name] != asked[name]
    }


def make_folder(path: Path) -> None:
    """Create a folder, with those above it, and remove temporary files that a killed run left an hour ago.

    Raises:
        StoreError: something else than a folder has that name.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise StoreError(f"{path} is no folder ({error}). Give another folder.") from error
    for temporary in path.glob(f"{TEMPORARY_PREFIX}*"):
        # Another process may remove it at the same moment.
        with suppress(FileNotFoundError):
            if time.time() - temporary.stat().st_mtime > STALE_AFTER_S:
                temporary.unlink()
