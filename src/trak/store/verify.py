"""Is everything that is stored intact, and what is missing?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trak.errors import CorruptShardError
from trak.store.files import open_file
from trak.store.folder import Folder
from trak.store.layout import DERIVED_PREFIX, FRAGMENT_PREFIX, OUTPUTS_FILE, SUFFIX, Range, ranges_text
from trak.store.row_folder import Contents, RowFolder
from trak.store.rows import RowSet
from trak.store.store import Store, load_store


@dataclass(frozen=True)
class Damage:
    """A damaged file: its path, and what is wrong with it."""

    file: str
    problem: str


@dataclass(frozen=True)
class Gap:
    """Missing rows of one checkpoint, perhaps in an experiment: ranges (start, stop), stop excluded."""

    label: str
    ranges: tuple[Range, ...]


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    Attributes:
        where: the store's folder, or "memory".
        shards: number of intact shards.
        others: number of other intact files: fragments, derived results, outputs kept without features, tensors kept with a checkpoint.
        corrupt: damaged files.
        missing: missing rows. Rows of damaged shards count as corrupt, not as missing.
        unknown: files inside row folders that are none of the store's.
        temporaries: temporary files found, of writers at work or left by killed ones.
        removed: those of them that were stale and have been removed.
        read: whether every byte was read and compared with checksums, or structure only.
    """

    where: str
    shards: int
    others: int
    corrupt: tuple[Damage, ...]
    missing: tuple[Gap, ...]
    unknown: tuple[str, ...]
    temporaries: tuple[str, ...]
    removed: tuple[str, ...]
    read: bool

    @property
    def ok(self) -> bool:
        """Whether nothing is corrupt."""
        return not self.corrupt

    @property
    def complete(self) -> bool:
        """Whether nothing is corrupt and nothing is missing."""
        return self.ok and not self.missing

    def __str__(self) -> str:
        how = "read in full" if self.read else "structure only"
        lines = [f"{self.where}: {self.shards} shards and {self.others} other files intact ({how})"]
        lines += [f"  corrupt: {damage.problem}" for damage in self.corrupt]
        lines += [f"  missing: {ranges_text(list(gap.ranges))} of {gap.label}" for gap in self.missing]
        lines += [f"  not the store's: {name}" for name in self.unknown]
        removed = set(self.removed)
        lines += [
            f"  temporary: {name}{' (stale, removed)' if name in removed else ''}"
            for name in self.temporaries
        ]
        return "\n".join(lines)


@dataclass
class _Findings:
    """What was found in one row folder; added up by `verify`."""

    shards: int
    others: int
    corrupt: list[Damage]
    unknown: list[str]
    fragments: dict[str, np.ndarray]
    names: list[str]


def verify(path_or_store: str | Path | Store, *, read: bool = True, remove_stale: bool = False) -> Report:
    """Check every file of a store.

    Args:
        path_or_store: a store or its folder.
        read: read every byte and compare checksums; else only structure: sizes, dtypes, shapes, row ranges.
        remove_stale: remove temporary files that no writer has touched for an hour. (Opening a writer does so
            too.)

    Raises:
        StoreError: the folder is no store, or its manifest is damaged.
    """
    store = path_or_store if isinstance(path_or_store, Store) else load_store(path_or_store)
    folders = list(_folders(store.folder))
    temporaries = [f"{folder.where}/{name}" for folder in folders for name in folder.temporaries()]
    removed = [
        f"{folder.where}/{name}"
        for folder in folders
        for name in (folder.remove_stale() if remove_stale else [])
    ]
    found: list[_Findings] = []
    gaps: list[Gap] = []
    for rows in _row_sets(store):
        files = rows._files
        found.append(_check_rows(files, read=read))
        contents = _contents(files, found[-1])
        if contents.missing():
            gaps.append(Gap(rows.label, tuple(contents.missing())))
    for model_id in store.checkpoints():
        found.append(_check_kept(store, model_id, read=read))
    return Report(
        where=store.where,
        shards=sum(item.shards for item in found),
        others=sum(item.others for item in found),
        corrupt=tuple(damage for item in found for damage in item.corrupt),
        missing=tuple(gaps),
        unknown=tuple(name for item in found for name in item.unknown),
        temporaries=tuple(temporaries),
        removed=tuple(removed),
        read=read,
    )


def _row_sets(store: Store) -> Iterator[RowSet]:
    for model_id in store.checkpoints():
        yield store.rows(model_id)
        for name in store.experiments():
            yield store.rows(model_id, name)


def _folders(folder: Folder) -> Iterator[Folder]:
    yield folder
    for name in folder.folders():
        yield from _folders(folder.folder(name))


def _check_kept(store: Store, model_id: int, *, read: bool) -> _Findings:
    """Tensors that are kept with a checkpoint."""
    folder, expected = store.checkpoint_folder(model_id)
    found = _Findings(0, 0, [], [], {}, [])
    for name in folder.files():
        if name.endswith(SUFFIX):
            try:
                with open_file(folder, name) as file:
                    file.check_about({"kind": "kept", **expected})
                    if read:
                        file.verify()
                found.others += 1
            except FileNotFoundError:
                continue  # of a process that came second
            except CorruptShardError as error:
                found.corrupt.append(Damage(f"{folder.where}/{name}", str(error)))
    return found


def _check_rows(files: RowFolder, *, read: bool) -> _Findings:
    names = files.folder.files()
    found = _Findings(0, 0, [], [], {}, names)
    for name in names:
        try:
            known = _check_file(files, name, found, read=read)
        except FileNotFoundError:
            continue  # compacted by a writer at work
        except CorruptShardError as error:
            found.corrupt.append(Damage(f"{files.folder.where}/{name}", str(error)))
            continue
        if not known:
            found.unknown.append(f"{files.folder.where}/{name}")
        elif files.grid.shard(name) is not None:
            found.shards += 1
        else:
            found.others += 1
    return found


def _check_file(files: RowFolder, name: str, found: _Findings, *, read: bool) -> bool:
    """Whether the name is one of the store's.

    Raises:
        CorruptShardError: it is, and the file is damaged.
    """
    shard = files.grid.shard(name)
    if shard is not None:
        with files.open_shard(shard) as file:
            if read:
                file.verify()
        return True
    if not name.endswith(SUFFIX):
        return False
    if name.startswith(FRAGMENT_PREFIX):
        found.fragments[name] = files.fragment_rows(name)
        with files.open_fragment(name) as file:
            if read:
                file.verify()
        return True
    if name.startswith(DERIVED_PREFIX) or name == OUTPUTS_FILE:
        with open_file(files.folder, name) as file:
            file.check_about({"kind": "outputs" if name == OUTPUTS_FILE else "derived", **files.belongs_to})
            if read:
                file.verify()
        return True
    return False


def _contents(files: RowFolder, found: _Findings) -> Contents:
    """What is there, damaged fragments left out: of their rows nothing is known."""
    return Contents(files.grid, files.grid.present(found.names), found.fragments, OUTPUTS_FILE in found.names)
