"""Finished points in a folder, so that the same command goes on where it stopped.

FOLDER/points/trak-3-0123456789ab.safetensors   predictions [S, T] for the subsets that judge it; written before the point
FOLDER/points/trak-3-0123456789ab.json          the point; where it is, it is done
FOLDER/features/sparse-4096/                    stored features, shared by the contenders with this projection
FOLDER/features/sparse-4096.json                seconds of featurizing at one checkpoint
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

from trak.errors import CorruptShardError
from trak.files import write_whole
from trak.frontier.values import FrontierPoint, point_from_dict

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class Measured:
    """A point, and what it predicts.

    Attributes:
        point: as measured.
        predictions: [S, T] float64 for the subsets that judge it; None if it failed.
        subsets: [S] positions of those in the bank.
    """

    point: FrontierPoint
    predictions: Floats | None
    subsets: np.ndarray[Any, np.dtype[np.int64]]


class Kept:
    """Points by the digest of everything that decides them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "points"
        self._folder.mkdir(parents=True, exist_ok=True)

    def get(self, facts: Mapping[str, Any], *, limit: float | None) -> Measured | None:
        """The point, if it is done.

        One that failed is tried again, unless it ran into a time limit that has not become longer.

        Raises:
            CorruptShardError: a damaged file.
        """
        file = self._file(facts)
        if not file.is_file():
            return None
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            point, stored_limit = point_from_dict(values["point"]), values["limit"]
            if point.error is not None and (stored_limit is None or limit is None or limit > stored_limit):
                return None
            subsets = np.array(values["subsets"], dtype=np.int64)
            found = None
            if point.error is None:
                found = load(file.with_suffix(".safetensors").read_bytes())["predictions"].numpy()
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            raise CorruptShardError(f"{file} is damaged: {error}. Remove it and run again.") from error
        return Measured(point, found, subsets)

    def put(self, facts: Mapping[str, Any], measured: Measured, *, limit: float | None) -> None:
        """Keep a point. limit: the time limit that it ran into, if it did."""
        file = self._file(facts)
        if measured.predictions is not None:
            tensors = {"predictions": torch.from_numpy(measured.predictions)}
            write_whole(file.with_suffix(".safetensors"), save(tensors))
        values = {
            "point": asdict(measured.point),
            "subsets": measured.subsets.tolist(),
            "limit": limit,
            "facts": dict(facts),
        }
        write_whole(file, json.dumps(values, indent=1).encode())

    def _file(self, facts: Mapping[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return self._folder / f"{facts['method']}-{facts['budget']}-{digest[:12]}.json"
