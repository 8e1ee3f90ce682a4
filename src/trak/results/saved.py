"""A saved attribution: a folder of scores, vectors and provenance.

FOLDER/scores.npy             [N, T] float32
FOLDER/vectors.safetensors    weights [N], outputs [T], self_influence [N]: those that there are
FOLDER/attribution.json       format, version, N, T, info; removed first and written last, so that a folder which has it is whole
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trak.errors import StoreError
from trak.scores import ArrayScores, Scores

_FORMAT = "trak-attribution"
_VERSION = 1


@dataclass(frozen=True, eq=False)
class Saved:
    """What a folder holds.

    Attributes:
        scores: [N, T], on disk.
        vectors: weights, outputs, self_influence: those that there are.
        info: how the attribution was computed.
    """

    scores: ArrayScores
    vectors: dict[str, Tensor]
    info: Mapping[str, Any]


def write_folder(
    folder: Path, scores: Scores, vectors: Mapping[str, Tensor | None], info: Mapping[str, Any]
) -> None:
    """Save an attribution; one that was there is replaced.

    Raises:
        StoreError: the folder holds something else.
    """
    check_save_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "attribution.json").unlink(missing_ok=True)
    scores.save(folder / "scores.npy")
    known = {name: vector.contiguous() for name, vector in vectors.items() if vector is not None}
    save_file(known, str(folder / "vectors.safetensors"))
    meta = {
        "format": _FORMAT,
        "version": _VERSION,
        "num_train": scores.num_train,
        "num_targets": scores.num_targets,
        "info": dict(info),
    }
    temporary = folder / f".attribution.json.{os.getpid()}.part"
    temporary.write_text(json.dumps(meta, indent=2, default=str))
    os.replace(temporary, folder / "attribution.json")


def read_folder(folder: Path) -> Saved:
    """Read what `write_folder` wrote.

    Raises:
        StoreError: no attribution there, a damaged one, or one of a newer format.
    """
    meta_path = folder / "attribution.json"
    if not meta_path.is_file():
        hint = (
            "it is a feature store: pass its path to trak.attribute(save_dir=…)"
            if (folder / "manifest.json").exists()
            else "save one with Attribution.save(path)"
        )
        raise StoreError(f"{folder} holds no saved attribution (no attribution.json): {hint}")
    try:
        meta = json.loads(meta_path.read_text())
    except ValueError as error:
        raise _damaged(meta_path, error) from error
    if not isinstance(meta, dict):
        raise _damaged(meta_path, "no JSON object")
    if meta.get("format") != _FORMAT or meta.get("version", 0) > _VERSION:
        raise StoreError(
            f"{meta_path} has format {meta.get('format')!r} version {meta.get('version')!r}; "
            f"this version reads {_FORMAT!r} up to {_VERSION}: update trak"
        )
    absent = [name for name in ("num_train", "num_targets", "info") if name not in meta]
    if absent:
        raise _damaged(meta_path, f"no entry {absent[0]!r}")
    values = _read(folder / "scores.npy", lambda path: np.load(path, mmap_mode="r"))
    if values.shape != (meta["num_train"], meta["num_targets"]):
        raise _damaged(
            folder / "scores.npy",
            f"shape {list(values.shape)}, where attribution.json says [{meta['num_train']}, {meta['num_targets']}]",
        )
    vectors = _read(folder / "vectors.safetensors", lambda path: load_file(str(path)))
    return Saved(ArrayScores(values), vectors, meta["info"])


def _read(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except (OSError, ValueError, EOFError, SafetensorError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: object) -> StoreError:
    return StoreError(
        f"{path} is damaged or missing: {error}. Save the attribution again; with features in a save_dir that is quick"
    )


def check_save_folder(folder: Path) -> None:
    """Refuse a folder that holds anything but a saved attribution.

    Raises:
        StoreError: it holds something else, or is a file.
    """
    if folder.is_file():
        raise StoreError(f"{folder} is a file; an attribution is saved to a folder: give another path")
    known = {"attribution.json", "scores.npy", "vectors.safetensors"}
    others = (
        [
            entry.name
            for entry in folder.iterdir()
            if entry.name not in known and not entry.name.startswith(".")
        ]
        if folder.is_dir()
        else []
    )
    if others:
        raise StoreError(
            f"{folder} holds other files ({', '.join(sorted(others)[:3])}): save the attribution to a folder of its own"
        )
