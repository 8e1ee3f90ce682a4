"""The files of one row set: shards, fragments, and what they hold together.

A shard is a whole row range; a fragment is any rows, with their numbers, sorted. Both appear all at once and
never change. Fragments that together complete a shard are compacted into it and removed; until then readers
see both alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from trak.errors import CorruptShardError, StoreError
from trak.store.encoding import Encoding, Piece
from trak.store.files import CheckedFile, open_file, write_file
from trak.store.folder import Folder
from trak.store.layout import FRAGMENT_PREFIX, OUTPUTS_FILE, SUFFIX, Grid, Range, false_ranges, subtract

_ATTEMPTS = 10
_Result = TypeVar("_Result")


@dataclass(frozen=True, eq=False)
class Contents:
    """What one look at the folder showed.

    Attributes:
        grid: how rows split into shards.
        shards: which shards are there, bool [num_shards].
        fragments: row numbers of each fragment by file name, int64, sorted.
        outputs_only: whether features were deleted on purpose and only outputs and weights are left.
    """

    grid: Grid
    shards: np.ndarray
    fragments: dict[str, np.ndarray]
    outputs_only: bool

    def fragment_rows(self) -> np.ndarray:
        """Rows that some fragment holds: int64, sorted, unique."""
        return np.unique(np.concatenate([np.empty(0, np.int64), *self.fragments.values()]))

    def missing(self) -> list[Range]:
        """Row ranges that no file holds."""
        if self.outputs_only or self.shards.all():
            return []
        return subtract(false_ranges(self.shards, self.grid), self.fragment_rows())

    def stored(self) -> np.ndarray:
        """Which rows some file holds: bool [num_rows]."""
        if self.outputs_only:
            return np.ones(self.grid.num_rows, dtype=bool)
        out = np.repeat(self.shards, self.grid.shard_rows)[: self.grid.num_rows]
        out[self.fragment_rows()] = True
        return out

    def has(self, rows: np.ndarray) -> np.ndarray:
        """Which of `rows` some file holds."""
        if self.outputs_only:
            return np.ones(len(rows), dtype=bool)
        return self.shards[rows // self.grid.shard_rows] | np.isin(rows, self.fragment_rows())


class RowFolder:
    """Reads and writes the files of one row set.

    Args:
        folder: where they are.
        grid: how rows split into shards.
        encoding: dtypes and sizes of a row.
        label: the row set's name in messages, e.g. "checkpoint 3".
        belongs_to: what every file says of itself: row set and fingerprint. A file that says otherwise is
            refused.
    """

    def __init__(
        self, folder: Folder, grid: Grid, encoding: Encoding, label: str, belongs_to: dict[str, str]
    ) -> None:
        self.folder = folder
        self.grid = grid
        self.encoding = encoding
        self.label = label
        self.belongs_to = belongs_to
        # Files never change, so neither do these. Names are unique: a fragment that was removed never comes
        # back.
        self._fragment_rows: dict[str, np.ndarray] = {}
        self._intact_fragments: set[str] = set()

    def look(self) -> Contents:
        """List the folder. One listing; only fragments not seen before are opened.

        Raises:
            CorruptShardError: a fragment is damaged.
        """
        return self.retry(self._look)

    def retry(self, action: Callable[[], _Result]) -> _Result:
        """Do it again if a file goes between look and open: another process has compacted it.

        Raises:
            StoreError: files still go after several attempts.
        """
        for attempt in range(_ATTEMPTS):
            try:
                return action()
            except FileNotFoundError as error:
                if attempt + 1 == _ATTEMPTS:
                    raise StoreError(
                        f"Files in {self.folder.where} go while they are being read ({error}). Is another "
                        "process deleting the store? Try again when it has ended."
                    ) from error
        raise AssertionError("unreachable")

    def write_shard(self, shard: int, piece: Piece) -> None:
        """Write all rows of a shard. One that is there already stays: it was written from the same rows."""
        name = self.grid.name(shard)
        if self.folder.has(name):
            return
        tensors = {key: tensor.contiguous() for key, tensor in piece.tensors.items()}
        write_file(self.folder, name, tensors, self._shard_about(shard))

    def write_fragment(self, piece: Piece) -> None:
        """Write any rows, sorted by number, under a new name."""
        tensors = {key: tensor.contiguous() for key, tensor in piece.tensors.items()}
        name = f"{FRAGMENT_PREFIX}{uuid4().hex}{SUFFIX}"
        about = {"kind": "fragment", **self.belongs_to}
        write_file(self.folder, name, {"rows": torch.from_numpy(piece.rows), **tensors}, about)

    @contextmanager
    def open_shard(self, shard: int) -> Iterator[CheckedFile]:
        """Open a shard, its structure checked.

        Raises:
            FileNotFoundError: it is not there.
            CorruptShardError: it is not what it should be.
        """
        start, stop = self.grid.bounds(shard)
        with open_file(self.folder, self.grid.name(shard)) as file:
            file.check_about(self._shard_about(shard))
            file.check_specs(self.encoding.specs(stop - start))
            yield file

    @contextmanager
    def open_fragment(self, name: str) -> Iterator[CheckedFile]:
        """Open a fragment, its structure checked.

        Raises:
            FileNotFoundError: it is not there.
            CorruptShardError: it is not what it should be.
        """
        with open_file(self.folder, name) as file:
            file.check_about({"kind": "fragment", **self.belongs_to})
            num_rows = file.specs.get("rows", ("int64", (0,)))[1][0]
            file.check_specs({"rows": ("int64", (num_rows,)), **self.encoding.specs(num_rows)})
            yield file

    def read_outputs(self, name: str) -> Tensor:
        """`outputs` or `weights` of every row, [num_rows], kept after features were deleted."""
        num_rows = self.grid.num_rows
        with open_file(self.folder, OUTPUTS_FILE) as file:
            file.check_about({"kind": "outputs", **self.belongs_to})
            file.check_specs(dict.fromkeys(("outputs", "weights"), (self.encoding.value_dtype, (num_rows,))))
            return file.read(name).clone()

    def read_fragments(self, contents: Contents, start: int, stop: int, names: Sequence[str]) -> Piece | None:
        """Rows of [start, stop) that fragments hold, sorted; None if there are none.

        Raises:
            FileNotFoundError: a fragment is gone since `contents` was made.
            CorruptShardError: a fragment is damaged.
        """
        pieces = []
        for name, rows in contents.fragments.items():
            first, last = np.searchsorted(rows, (start, stop))
            if first == last:
                continue
            with self.open_fragment(name) as file:
                # A part of a tensor has no checksum of its own: check the whole once, before rows go into a
                # shard.
                if name not in self._intact_fragments:
                    file.verify()
                    self._intact_fragments.add(name)
                tensors = {key: file.read(key, int(first), int(last)).clone() for key in names}
            pieces.append(Piece(rows[first:last], tensors))
        return Piece.join(pieces) if pieces else None

    def compact(self) -> None:
        """Make shards of fragments that complete them; remove fragments whose rows are all in shards.

        Safe beside other processes that do the same: shards they write are equal, and what is gone is gone.

        Raises:
            CorruptShardError: a fragment is damaged.
        """
        contents = self.look()
        if not contents.fragments:
            return
        held = np.bincount(contents.fragment_rows() // self.grid.shard_rows, minlength=self.grid.num_shards)
        for shard in np.flatnonzero((held > 0) & ~contents.shards).tolist():
            start, stop = self.grid.bounds(shard)
            if held[shard] == stop - start:
                self.retry(lambda shard=shard: self.finish_shard(shard, []))  # type: ignore[misc]
        contents = self.look()
        for name, rows in contents.fragments.items():
            if contents.shards[rows // self.grid.shard_rows].all():
                self.folder.remove(name)

    def finish_shard(self, shard: int, pieces: list[Piece]) -> None:
        """Write the shard that `pieces` and the fragments make together.

        Raises:
            FileNotFoundError: a fragment went meanwhile; look again.
        """
        start, stop = self.grid.bounds(shard)
        if sum(len(piece.rows) for piece in pieces) < stop - start:
            contents = self._look()
            if contents.shards[shard]:
                return
            stored = self.read_fragments(contents, start, stop, self.encoding.names)
            pieces = pieces if stored is None else [stored, *pieces]
        piece = Piece.join(pieces)
        if len(piece.rows) != stop - start:
            raise CorruptShardError(
                f"Rows {start} to {stop - 1} of {self.label} cannot be put together in {self.folder.where}: "
                f"{len(piece.rows)} rows are there. Fragment files were removed while rows were being "
                "written. Run again: missing rows are computed."
            )
        self.write_shard(shard, piece)

    def _look(self) -> Contents:
        names = self.folder.files()
        fragments = {}
        for name in names:
            if name.startswith(FRAGMENT_PREFIX) and name.endswith(SUFFIX):
                if name not in self._fragment_rows:
                    self._fragment_rows[name] = self.fragment_rows(name)
                fragments[name] = self._fragment_rows[name]
        return Contents(self.grid, self.grid.present(names), fragments, OUTPUTS_FILE in names)

    def fragment_rows(self, name: str) -> np.ndarray:
        """Row numbers of a fragment, read from the file: int64, sorted.

        Raises:
            FileNotFoundError: it is not there.
            CorruptShardError: it is damaged.
        """
        with self.open_fragment(name) as file:
            rows = file.read("rows").numpy().copy()
            if len(rows) and (rows[0] < 0 or rows[-1] >= self.grid.num_rows or (np.diff(rows) <= 0).any()):
                raise file.corrupt(f"its row numbers are not sorted and within 0 to {self.grid.num_rows - 1}")
            return rows

    def _shard_about(self, shard: int) -> dict[str, Any]:
        start, stop = self.grid.bounds(shard)
        return {"kind": "shard", "start": start, "stop": stop, **self.belongs_to}
