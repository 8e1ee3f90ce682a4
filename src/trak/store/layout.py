"""Names of files and ranges of rows: where a row of a row set is kept.

Rows are kept in shards of fixed ranges [i·S, (i+1)·S) with S = shard_rows; the last one is cut at num_rows.
The name of a shard is its range, so that one listing of a folder says which rows are there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from trak.errors import InputError

Range = tuple[int, int]
"""Rows start to stop, stop excluded."""

FRAGMENT_PREFIX = "fragment-"
DERIVED_PREFIX = "derived-"
OUTPUTS_FILE = "outputs.safetensors"
SUFFIX = ".safetensors"

_SHARD_NAME = re.compile(r"rows-(\d{9,})-(\d{9,})\.safetensors")
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,99}")
# Names that Windows reserves for devices, with or without an extension.
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_RANGES_SHOWN = 5


@dataclass(frozen=True)
class Grid:
    """How `num_rows` rows split into shards of `shard_rows`."""

    num_rows: int
    shard_rows: int

    @property
    def num_shards(self) -> int:
        """Number of shards; the last may be shorter."""
        return -(-self.num_rows // self.shard_rows)

    def bounds(self, shard: int) -> Range:
        """First row of a shard, and the row after its last."""
        start = shard * self.shard_rows
        return start, min(start + self.shard_rows, self.num_rows)

    def name(self, shard: int) -> str:
        """File name of a shard."""
        start, stop = self.bounds(shard)
        return f"rows-{start:09d}-{stop:09d}{SUFFIX}"

    def shard(self, name: str) -> int | None:
        """The shard that a file name stands for; None if it is no shard of this grid."""
        match = _SHARD_NAME.fullmatch(name)
        if match is None:
            return None
        start, stop = int(match[1]), int(match[2])
        if (
            start % self.shard_rows
            or start >= self.num_rows
            or self.bounds(start // self.shard_rows) != (start, stop)
        ):
            return None
        return start // self.shard_rows

    def present(self, names: Iterable[str]) -> np.ndarray:
        """Which shards a listing holds: bool [num_shards]."""
        out = np.zeros(self.num_shards, dtype=bool)
        shards = [shard for shard in map(self.shard, names) if shard is not None]
        out[shards] = True
        return out


def subtract(ranges: list[Range], rows: np.ndarray) -> list[Range]:
    """`ranges` (sorted, disjoint) without `rows` (int64, sorted, unique)."""
    if len(rows) == 0:
        return ranges
    out: list[Range] = []
    for start, stop in ranges:
        inside = rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)]
        # A gap lies before each stored row that does not follow on the one before it, and after the last.
        edges = np.concatenate(([start - 1], inside, [stop]))
        gaps = np.flatnonzero(np.diff(edges) > 1)
        out += [(int(edges[gap]) + 1, int(edges[gap + 1])) for gap in gaps]
    return out


def false_ranges(present: np.ndarray, grid: Grid) -> list[Range]:
    """Row ranges of the shards that are False, neighbours merged."""
    edges = np.flatnonzero(np.diff(np.concatenate(([True], present, [True])).astype(np.int8)))
    return [(grid.bounds(int(a))[0], grid.bounds(int(b) - 1)[1]) for a, b in edges.reshape(-1, 2)]


def clip(ranges: Iterable[Range], start: int, stop: int) -> list[Range]:
    """The parts of `ranges` inside [start, stop)."""
    cut = ((max(a, start), min(b, stop)) for a, b in ranges)
    return [(a, b) for a, b in cut if a < b]


def ranges_text(ranges: list[Range]) -> str:
    """ "rows 1024 to 2047 and 4096 to 4999": last rows included; long lists are cut and counted."""
    parts = [f"{a} to {b - 1}" if b - a > 1 else f"{a}" for a, b in ranges[:_RANGES_SHOWN]]
    total = sum(b - a for a, b in ranges)
    if len(ranges) > _RANGES_SHOWN:
        return f"rows {', '.join(parts)} and {len(ranges) - _RANGES_SHOWN} more ranges ({total} rows in all)"
    listed = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    return f"row{'s' if total != 1 else ''} {listed}"


def check_name(name: object, what: str) -> str:
    """`name`, if it can safely be the name of a file or folder.

    Raises:
        InputError: it is empty, too long, or has characters (slashes, leading dots, spaces) that a path must
            not have.
    """
    if (
        not isinstance(name, str)
        or not _SAFE_NAME.fullmatch(name)
        or _RESERVED.fullmatch(name)
        or name.endswith(".")
    ):
        raise InputError(
            f"{what} must be 1 to 100 characters from A-Z a-z 0-9 . _ + = - and start with a letter or digit "
            "(no slashes or spaces, no trailing dot, no device name such as 'con'), because it names a "
            f"folder; got {name!r}."
        )
    return name
