"""The rows of one checkpoint: features, outputs and weights of training examples or targets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from trak.ahead import read_ahead
from trak.errors import InputError, MissingRowsError, StoreError
from trak.store.encoding import Piece, StoredRows
from trak.store.files import open_file, write_file
from trak.store.header import check_integer
from trak.store.layout import (
    DERIVED_PREFIX,
    FRAGMENT_PREFIX,
    OUTPUTS_FILE,
    SUFFIX,
    Range,
    check_name,
    clip,
    ranges_text,
)
from trak.store.row_folder import Contents, RowFolder
from trak.store.writer import Writer

READ_AHEAD_SHARDS = 2
"""How far before its turn a shard is announced to the disk: far enough for the disk to be busy while the one between is read."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Consecutive rows, on the CPU.

    Attributes:
        start: number of the first row.
        features: φ, [R, K], float32 (float64 from a float64 store).
        outputs: f, [R], float32 or float64.
        weights: q, [R], float32 or float64.
    """

    start: int
    features: Tensor
    outputs: Tensor
    weights: Tensor

    @property
    def stop(self) -> int:
        """Number of the row after the last."""
        return self.start + len(self.outputs)


class RowSet:
    """Rows 0 to num_rows − 1 of one checkpoint, some of which may be missing.

    Got from `Store.rows`. Every method looks anew at what is stored; nothing is kept in memory between calls
    but the row numbers of fragments.
    """

    def __init__(self, files: RowFolder) -> None:
        self._files = files

    def __repr__(self) -> str:
        return f"<RowSet of {self._files.label}: {self.num_rows} rows in {self._files.folder.where}>"

    @property
    def label(self) -> str:
        """The row set's name in messages, e.g. "checkpoint 3"."""
        return self._files.label

    @property
    def num_rows(self) -> int:
        """Number of rows, stored or not."""
        return self._files.grid.num_rows

    @property
    def in_memory(self) -> bool:
        """Whether rows are kept in memory rather than on disk."""
        return self._files.folder.in_memory

    @property
    def shard_rows(self) -> int:
        """Rows of a shard: what is read as a whole is compared with its checksums."""
        return self._files.grid.shard_rows

    @property
    def shard_bytes(self) -> int:
        """Bytes of a shard's features as they are stored."""
        return self.shard_rows * self._files.encoding.row_bytes

    @property
    def is_complete(self) -> bool:
        """Whether no row is missing."""
        return not self.missing()

    @property
    def has_features(self) -> bool:
        """False after `delete_features`: only outputs, weights and derived results are left."""
        return not self._files.folder.has(OUTPUTS_FILE)

    def missing(self) -> list[Range]:
        """Ranges (start, stop) of rows not stored, stop excluded, in order.

        It takes one listing of a folder, also for millions of rows.
        """
        return self._files.look().missing()

    def has(self, rows: Tensor) -> Tensor:
        """Which rows are stored: bool [B] for row numbers int64 [B].

        Raises:
            InputError: a row outside [0, num_rows).
        """
        numbers = rows.detach().cpu().numpy().astype(np.int64)
        self._check_rows(numbers)
        return torch.from_numpy(self._files.look().has(numbers))

    def writer(self) -> Writer:
        """A context manager to add rows with. Temporary files that killed writers left are removed."""
        return Writer(self._files)

    def read(self, start: int, stop: int) -> Rows:
        """Rows start to stop (excluded), from as many shards as they span; only these rows are loaded.

        Raises:
            InputError: not 0 <= start <= stop <= num_rows.
            MissingRowsError: some are not stored, or features were deleted.
            CorruptShardError: a file is damaged. A shard that is read as a whole is compared with its
                checksums; of one that is read in part, only dtypes, shapes and row range are checked.
        """
        self._check_readable(start, stop)
        encoding = self._files.encoding
        features_RK = encoding.empty_decoded(stop - start)
        values = encoding.empty(stop - start, ("outputs", "weights"))

        def take(first: int, tensors: dict[str, Tensor], whole: bool) -> None:
            place = slice(first - start, first - start + len(tensors["outputs"]))
            encoding.decode(tensors, features_RK[place])
            for name, out_R in values.items():
                out_R[place] = tensors[name]

        self._files.retry(lambda: self._take_once(start, stop, encoding.names, take))
        return Rows(start, features_RK, values["outputs"], values["weights"])

    def read_stored(self, start: int, stop: int) -> list[StoredRows]:
        """Features of rows start to stop (excluded) in their stored dtype, in order, one part for each shard they lie in.

        Whole shards, and all that is in memory, are not copied: the parts share the file's or the store's memory. On disk, shards
        that are read as a whole have been compared with their checksums, hence have been read, when this returns.

        Raises:
            InputError, MissingRowsError, CorruptShardError: as in `read`.
        """
        self._check_readable(start, stop)
        names = tuple(name for name in self._files.encoding.names if name in ("features", "scale"))
        parts: list[StoredRows] = []

        def take(first: int, tensors: dict[str, Tensor], whole: bool) -> None:
            if not (whole or self.in_memory):
                tensors = {name: tensor.clone() for name, tensor in tensors.items()}
            parts.append(StoredRows(tensors["features"], tensors.get("scale")))

        def read() -> None:
            parts.clear()
            self._take_once(start, stop, names, take)

        self._files.retry(read)
        return parts

    def blocks(self, block_rows: int | None = None) -> Iterator[Rows]:
        """All rows in order, in blocks [i·b, (i+1)·b) with b = block_rows (default: shard by shard).

        Raises:
            InputError: block_rows is no positive integer.
            MissingRowsError: before the first block, if any row is missing.
            CorruptShardError: a file is damaged.
        """
        if block_rows is not None:
            check_integer(block_rows, name="block_rows", smallest=1)
        self._check_complete()
        return self._blocks(block_rows or self._files.grid.shard_rows)

    def outputs(self) -> Tensor:
        """Model outputs f of every row, [num_rows].

        Raises:
            MissingRowsError: some are not stored.
        """
        return self._values("outputs")

    def outputs_of(self, rows: Tensor) -> Tensor:
        """Model outputs f of some rows, [B] for row numbers int64 [B] in any order.

        Raises:
            InputError: a row outside [0, num_rows).
            MissingRowsError: one of them is not stored.
        """
        self._check_rows(rows.detach().cpu().numpy())
        numbers, inverse = rows.detach().cpu().unique(return_inverse=True)
        runs = np.split(numbers.numpy(), np.flatnonzero(np.diff(numbers.numpy()) != 1) + 1)
        parts = [self._outputs_between(int(run[0]), int(run[-1]) + 1) for run in runs if len(run)]
        return torch.cat([self._files.encoding.empty(0, ("outputs",))["outputs"], *parts])[inverse]

    def weights(self) -> Tensor:
        """Weights q of every row, [num_rows].

        Raises:
            MissingRowsError: some are not stored.
        """
        return self._values("weights")

    def digest(self) -> str | None:
        """sha256 over the checksums of all shards, to tie derived results to; None if a shard is missing."""
        contents = self._files.look()
        folder, grid = self._files.folder, self._files.grid
        if contents.outputs_only:
            with open_file(folder, OUTPUTS_FILE) as file:
                return file.about.get("digest")
        if not contents.shards.all():
            return None
        digest = hashlib.sha256(json.dumps(self._files.belongs_to, sort_keys=True).encode())
        for shard in range(grid.num_shards):
            with self._files.open_shard(shard) as file:
                digest.update(json.dumps([grid.name(shard), file.about["crc32"]], sort_keys=True).encode())
        return digest.hexdigest()

    def derived(self, name: str) -> dict[str, Tensor] | None:
        """A result computed from these rows and saved beside them.

        None if there is none, or if it was computed from other rows than those stored now.

        Raises:
            InputError: a name that cannot be.
            CorruptShardError: its file is damaged.
        """
        digest = self.digest()
        try:
            with open_file(self._files.folder, _derived_file(name)) as file:
                file.check_about({"kind": "derived", **self._files.belongs_to})
                if digest is None or file.about.get("digest") != digest:
                    return None
                return {key: file.read(key).clone() for key in file.specs}
        except FileNotFoundError:
            return None

    def save_derived(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a result computed from these rows, e.g. their Gram matrix, in place of one of the same name.

        Raises:
            InputError: a name that cannot be, or values that are no tensors.
            MissingRowsError: some rows are not stored: such a result would be of other rows than those there
                later.
        """
        file_name = _derived_file(name)
        for key, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise InputError(
                    f"Derived result {name!r} must hold tensors; {key!r} is of type {type(tensor).__name__}."
                )
        self._check_stored()
        self._files.compact()
        # Copies, because a file of tensors cannot hold two that share memory.
        copies = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
        about = {"kind": "derived", "digest": self.digest(), **self._files.belongs_to}
        write_file(self._files.folder, file_name, copies, about)

    def delete_features(self) -> None:
        """Delete the features and keep outputs, weights and derived results. A second call does nothing.

        Outputs and weights are written to one file first; only then are shards removed. Interrupted in
        between, features count as deleted, and calling again removes the rest.

        Raises:
            MissingRowsError: some rows are not stored.
        """
        files = self._files
        if self.has_features:
            self._check_stored()
            files.compact()
            values = self._gather(0, self.num_rows, ("outputs", "weights"))
            about = {"kind": "outputs", "digest": self.digest(), **files.belongs_to}
            write_file(files.folder, OUTPUTS_FILE, values, about)
        for name in files.folder.files():
            if files.grid.shard(name) is not None or name.startswith(FRAGMENT_PREFIX):
                files.folder.remove(name)

    def _blocks(self, block_rows: int) -> Iterator[Rows]:
        reads = (
            partial(self.read, start, min(start + block_rows, self.num_rows))
            for start in range(0, self.num_rows, block_rows)
        )
        # What is in memory is there without a thread.
        return (read() for read in reads) if self.in_memory else read_ahead(reads)

    def _outputs_between(self, start: int, stop: int) -> Tensor:
        if not self.has_features:
            return self._files.read_outputs("outputs")[start:stop]
        return self._gather(start, stop, ("outputs",))["outputs"]

    def _values(self, name: str) -> Tensor:
        if not self.has_features:
            return self._files.read_outputs(name)
        self._check_stored()
        return self._gather(0, self.num_rows, (name,))[name]

    def _gather(self, start: int, stop: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors of rows start to stop as they are stored."""
        out = self._files.encoding.empty(stop - start, names)

        def take(first: int, tensors: dict[str, Tensor], whole: bool) -> None:
            for name, tensor in tensors.items():
                out[name][first - start : first - start + len(tensor)] = tensor

        self._files.retry(lambda: self._take_once(start, stop, names, take))
        return out

    def _take_once(
        self,
        start: int,
        stop: int,
        names: Sequence[str],
        take: Callable[[int, dict[str, Tensor], bool], None],
    ) -> None:
        """Call take(first row, tensors, whether they are all of a shard's) for each shard that rows start to stop lie in.

        The tensors share the file's memory.

        Raises:
            FileNotFoundError: files went meanwhile; `take` has then been called for some parts already.
        """
        grid = self._files.grid
        contents: Contents | None = None
        for shard in range(start // grid.shard_rows, -(-stop // grid.shard_rows) if stop > start else 0):
            first, last = grid.bounds(shard)
            a, b = max(first, start), min(last, stop)
            whole = (a, b) == (first, last)
            try:
                # A shard is looked for by its name: the folder is listed only where one is not there.
                with self._files.open_shard(shard) as file:
                    if "features" in names and whole and shard + READ_AHEAD_SHARDS < grid.num_shards:
                        # Who reads whole shards of features reads on, as a rule.
                        self._files.folder.announce(grid.name(shard + READ_AHEAD_SHARDS))
                    take(a, {name: file.read(name, a - first, b - first) for name in names}, whole)
            except FileNotFoundError:
                contents = contents or self._files.look()
                take(a, self._from_fragments(contents, start, stop, (a, b), names).tensors, True)

    def _from_fragments(
        self, contents: Contents, start: int, stop: int, part: Range, names: Sequence[str]
    ) -> Piece:
        missing = clip(contents.missing(), start, stop)
        if contents.outputs_only or missing:
            raise self._missing_error(missing)
        piece = self._files.read_fragments(contents, *part, names)
        if piece is None or len(piece.rows) != part[1] - part[0]:
            # The shard appeared between the attempt to open it and the listing.
            raise FileNotFoundError(f"{self._files.folder.where}: changed while it was read")
        return piece

    def _check_readable(self, start: int, stop: int) -> None:
        self._check_range(start, stop)
        if not self.has_features:
            raise self._missing_error([])

    def _check_rows(self, numbers: np.ndarray) -> None:
        if len(numbers) and (numbers.min() < 0 or numbers.max() >= self.num_rows):
            raise InputError(
                f"Row numbers of {self.label} must lie in 0 to {self.num_rows - 1}; got {numbers.min()} to "
                f"{numbers.max()}."
            )

    def _check_range(self, start: int, stop: int) -> None:
        check_integer(start, name="start", smallest=0)
        check_integer(stop, name="stop", smallest=0)
        if not start <= stop <= self.num_rows:
            raise InputError(
                f"{self.label} has rows 0 to {self.num_rows - 1}; got start {start} and stop {stop}."
            )

    def _check_complete(self) -> None:
        contents = self._files.look()
        if contents.outputs_only or contents.missing():
            raise self._missing_error(contents.missing())

    def _check_stored(self) -> None:
        missing = self.missing()
        if missing:
            raise self._missing_error(missing)

    def _missing_error(self, missing: list[Range]) -> StoreError:
        where = self._files.folder.where
        if not missing:
            return MissingRowsError(
                f"The features of {self.label} were deleted ({where}); outputs and weights are kept. Compute "
                "them again in another save_dir, or remove that folder first."
            )
        verb = "is" if sum(b - a for a, b in missing) == 1 else "are"
        return MissingRowsError(
            f"{ranges_text(missing)} {verb} missing for {self.label} ({where}). Featurize again with the "
            "same save_dir: only missing rows are computed."
        )


def _derived_file(name: str) -> str:
    return f"{DERIVED_PREFIX}{check_name(name, 'The name of a derived result')}{SUFFIX}"
