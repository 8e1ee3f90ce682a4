"""A store of features: one header, some checkpoints, some experiments, and the rows of each."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trak.errors import FingerprintError, InputError, StoreError
from trak.store.disk import DiskFolder
from trak.store.encoding import Encoding
from trak.store.folder import Folder
from trak.store.header import FORMAT_VERSION, Header, check_integer, refuse_difference
from trak.store.kept import keep_first, read_kept
from trak.store.layout import Grid, check_name
from trak.store.memory import MemoryFolder
from trak.store.row_folder import RowFolder
from trak.store.rows import RowSet

MANIFEST = "manifest.json"
FORMAT = "trak-store"
CHECKPOINTS = "checkpoints"
EXPERIMENTS = "experiments"
TRAIN = "train"

_CHECKPOINT_FILE = "checkpoint.json"
_EXPERIMENT_FILE = "experiment.json"
_READ_ATTEMPTS = 5
_READ_PAUSE_S = 0.02


class Store:
    """Features of one training set under one header. Made by `open_store` and `load_store`.

    Nothing of what is stored is cached here: several processes may use one folder, each with its own Store.
    """

    def __init__(self, folder: Folder, header: Header, shard_rows: int) -> None:
        self.folder = folder
        self.header = header
        self.shard_rows = shard_rows

    def __repr__(self) -> str:
        return f"<Store at {self.where}: {self.header.num_rows} rows, {len(self.checkpoints())} checkpoints>"

    @property
    def where(self) -> str:
        """Its folder, or "memory"."""
        return self.folder.where

    def checkpoints(self) -> list[int]:
        """Model ids, in order."""
        folder = self.folder.folder(CHECKPOINTS)
        names = [
            name
            for name in folder.folders()
            if name.isdecimal() and folder.folder(name).has(_CHECKPOINT_FILE)
        ]
        return sorted(int(name) for name in names if name == str(int(name)))

    def add_checkpoint(self, model_id: int, fingerprint: str) -> None:
        """Make a checkpoint known by its id; nothing if it is known with the same fingerprint.

        Raises:
            InputError: model_id is no integer of at least 0, or the fingerprint is no text.
            FingerprintError: the id is known with another fingerprint.
        """
        check_integer(model_id, name="model_id", smallest=0)
        _check_fingerprint(fingerprint)
        folder = self.folder.folder(CHECKPOINTS).folder(str(model_id))
        asked = {"checkpoint": model_id, "fingerprint": fingerprint}
        what = f"Checkpoint {model_id} of the store at {self.where}"
        advice = "Give the other weights another model_id, or use another save_dir."
        _create_or_compare(folder, _CHECKPOINT_FILE, asked, what, advice)

    def checkpoint_fingerprint(self, model_id: int) -> str:
        """The fingerprint a checkpoint was added with.

        Raises:
            InputError: the checkpoint is not known.
        """
        check_integer(model_id, name="model_id", smallest=0)
        stored = read_json(self.folder.folder(CHECKPOINTS).folder(str(model_id)), _CHECKPOINT_FILE)
        if stored is None:
            raise InputError(
                f"Checkpoint {model_id} is not in the store at {self.where}, which has "
                f"{self.checkpoints() or 'none'}. Add it first: "
                f"add_checkpoint({model_id}, fingerprint)."
            )
        return _field(self.folder, stored, "fingerprint", str)

    def kept(self, model_id: int, name: str) -> dict[str, Tensor] | None:
        """Tensors that belong to a checkpoint, kept by `keep`; None if there are none of that name.

        Raises:
            InputError: the checkpoint is not known, or a name that cannot be.
            StoreError: they are damaged or gone.
        """
        folder, belongs_to = self.checkpoint_folder(model_id)
        return read_kept(folder, name, belongs_to)

    def keep(self, model_id: int, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keep tensors with a checkpoint for all its features to be made with; what is there already stays.

        Returns:
            What is kept now: these, or those that another process had brought before.
        """
        folder, belongs_to = self.checkpoint_folder(model_id)
        return keep_first(folder, name, tensors, belongs_to)

    def checkpoint_folder(self, model_id: int) -> tuple[Folder, dict[str, str]]:
        """Where a checkpoint's files are, and what tensors kept there say of themselves: copied elsewhere, they are refused."""
        text = f"{self.header.digest()} {self.checkpoint_fingerprint(model_id)}"
        digest = hashlib.sha256(text.encode()).hexdigest()
        folder = self.folder.folder(CHECKPOINTS).folder(str(model_id))
        return folder, {"kept_with": f"{CHECKPOINTS}/{model_id}", "fingerprint": digest}

    def experiments(self) -> list[str]:
        """Names of experiments (sets of targets), sorted."""
        folder = self.folder.folder(EXPERIMENTS)
        return [name for name in folder.folders() if folder.folder(name).has(_EXPERIMENT_FILE)]

    def add_experiment(self, name: str, num_rows: int, fingerprint: str | None = None) -> None:
        """Make an experiment, a named set of targets, known; nothing if it is known as the same.

        Args:
            name: names a folder: letters, digits and . _ + = - only.
            num_rows: number of targets.
            fingerprint: what the targets are, e.g. a hash of them. None asks for no comparison with what is
                stored.

        Raises:
            InputError: a name or size that cannot be.
            FingerprintError: the name is known with another size or fingerprint.
        """
        check_name(name, "An experiment's name")
        check_integer(num_rows, name="num_rows", smallest=0)
        if fingerprint is not None:
            _check_fingerprint(fingerprint)
        asked = {"experiment": name, "num_rows": num_rows, "fingerprint": fingerprint}
        ignored = () if fingerprint is not None else ("fingerprint",)
        what = f"Experiment {name!r} of the store at {self.where}"
        advice = "Give the new targets another name, or ask for the stored ones."
        _create_or_compare(
            self.folder.folder(EXPERIMENTS).folder(name), _EXPERIMENT_FILE, asked, what, advice, ignored
        )

    def experiment_num_rows(self, name: str) -> int:
        """Number of targets of an experiment.

        Raises:
            InputError: the experiment is not known.
        """
        return _field(self.folder, self._experiment(name), "num_rows", int)

    def experiment_fingerprint(self, name: str) -> str | None:
        """The fingerprint an experiment was added with, if any.

        Raises:
            InputError: the experiment is not known.
        """
        return self._experiment(name).get("fingerprint")

    def rows(self, model_id: int, experiment: str | None = None) -> RowSet:
        """The rows of one checkpoint: of the training set, or of an experiment's targets.

        Raises:
            InputError: the checkpoint or experiment is not known.
        """
        fingerprint = self.checkpoint_fingerprint(model_id)
        if experiment is None:
            path, label, num_rows = (
                (CHECKPOINTS, str(model_id), TRAIN),
                f"checkpoint {model_id}",
                self.header.num_rows,
            )
        else:
            num_rows = self.experiment_num_rows(experiment)
            path, label = (
                (EXPERIMENTS, experiment, str(model_id)),
                f"checkpoint {model_id} in experiment {experiment!r}",
            )
            fingerprint = f"{fingerprint} {self.experiment_fingerprint(experiment)}"
        folder = self.folder
        for name in path:
            folder = folder.folder(name)
        header = self.header
        # A shard copied here from another store, checkpoint or experiment says so itself.
        digest = hashlib.sha256(f"{header.digest()} {fingerprint}".encode()).hexdigest()
        belongs_to = {"rows_of": "/".join(path), "fingerprint": digest}
        encoding = Encoding(header.dim, header.feature_dtype, header.value_dtype)
        return RowSet(RowFolder(folder, Grid(num_rows, self.shard_rows), encoding, label, belongs_to))

    def _experiment(self, name: str) -> dict[str, Any]:
        check_name(name, "An experiment's name")
        stored = read_json(self.folder.folder(EXPERIMENTS).folder(name), _EXPERIMENT_FILE)
        if stored is None:
            raise InputError(
                f"Experiment {name!r} is not in the store at {self.where}, which has "
                f"{self.experiments() or 'none'}. Add it first: "
                f"add_experiment({name!r}, num_rows)."
            )
        return stored


def open_store(path: str | Path | None, header: Header, *, shard_rows: int = 1024) -> Store:
    """Create a store, or open the one that is there.

    Args:
        path: its folder, created if need be; None: in memory.
        header: what the features are. An existing store must have the same.
        shard_rows: rows per shard of a new store; an existing one keeps its own (it does not change any
            number read).

    Raises:
        FingerprintError: the store there has another header; the message lists each field.
        StoreError: the folder cannot be a store, is of a newer format, or its manifest is damaged.
        InputError: shard_rows is no positive integer.
    """
    check_integer(shard_rows, name="shard_rows", smallest=1)
    folder: Folder = MemoryFolder()
    if path is not None:
        path = _check_path(path)
        if path.exists() and not path.is_dir():
            raise StoreError(f"{path} is a file; a store is a folder. Give another save_dir.")
        folder = DiskFolder(path)
    manifest = read_manifest(folder)
    if manifest is None:
        _refuse_headless(folder)
        body = header.to_json()
        version = body.pop("format_version")
        if version != FORMAT_VERSION:
            raise InputError(
                f"Stores of format version {FORMAT_VERSION} can be made; the header asks for {version}."
            )
        text = json.dumps(
            {"format": FORMAT, "version": version, "shard_rows": shard_rows, "header": body}, indent=1
        )
        # Another process may have made it meanwhile: then the manifest that is there counts.
        folder.create_text(MANIFEST, text)
        manifest = read_manifest(folder)
    if manifest is None:
        raise StoreError(
            f"{folder.where} lost its {MANIFEST} while it was being opened. Is another process deleting it?"
        )
    stored, stored_shard_rows = manifest
    refuse_difference(folder.where, stored, header)
    return Store(folder, stored, stored_shard_rows)


def load_store(path: str | Path) -> Store:
    """Open a store that is there, whatever its header.

    Raises:
        StoreError: no such folder, not a store, of a newer format, or its manifest is damaged.
    """
    path = _check_path(path)
    if not path.is_dir():
        problem = "is a file" if path.exists() else "does not exist"
        raise StoreError(f"{path} {problem}; expected the folder of a store (the save_dir it was made with).")
    folder = DiskFolder(path)
    manifest = read_manifest(folder)
    if manifest is None:
        found = ", ".join([*folder.folders(), *folder.files()][:8]) or "nothing"
        raise StoreError(
            f"{path} is not a store: it has no {MANIFEST} (found: {found}). Give the save_dir that features "
            "were computed into."
        )
    return Store(folder, *manifest)


def read_manifest(folder: Folder) -> tuple[Header, int] | None:
    """Header and shard_rows; None if there is no manifest.

    Raises:
        StoreError: it is damaged, of another format, or of a newer version.
    """
    where = f"{folder.where}/{MANIFEST}"
    values = read_json(folder, MANIFEST)
    if values is None:
        return None
    if values.get("format") != FORMAT:
        raise StoreError(
            f"{where} is not the manifest of a store: its format is {values.get('format')!r}, not {FORMAT!r}."
        )
    version = values.get("version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise StoreError(
            f"The store at {folder.where} has format version {version}; this trak reads up to "
            f"{FORMAT_VERSION}. Use a newer trak."
        )
    header, shard_rows = values.get("header"), values.get("shard_rows")
    if (
        version != FORMAT_VERSION
        or not isinstance(header, dict)
        or not isinstance(shard_rows, int)
        or shard_rows < 1
    ):
        raise StoreError(f"{where} is damaged: it must have version, shard_rows and header. {_LOST_MANIFEST}")
    try:
        return Header.from_json({**header, "format_version": version}), shard_rows
    except StoreError as error:
        raise StoreError(f"{where} is damaged: {error} {_LOST_MANIFEST}") from error


def read_json(folder: Folder, name: str) -> dict[str, Any] | None:
    """A JSON object from a text file; None if there is no file.

    Raises:
        StoreError: the file is damaged.
    """
    for attempt in range(_READ_ATTEMPTS):
        try:
            text = folder.read_text(name)
            values = None if text is None else json.loads(text)
        except ValueError as error:
            # On a file system without hard links another process may be writing it at this moment.
            if attempt + 1 < _READ_ATTEMPTS:
                time.sleep(_READ_PAUSE_S)
                continue
            raise StoreError(
                f"{folder.where}/{name} is damaged: no JSON ({error}). {_LOST_MANIFEST}"
            ) from error
        if text is not None and not isinstance(values, dict):
            raise StoreError(f"{folder.where}/{name} is damaged: no JSON object. {_LOST_MANIFEST}")
        return values
    raise AssertionError("unreachable")


_LOST_MANIFEST = "Restore the file from a copy, or use another save_dir and compute the features again."


def _create_or_compare(
    folder: Folder, name: str, asked: dict[str, Any], what: str, advice: str, ignored: tuple[str, ...] = ()
) -> None:
    """Write a JSON file, or compare with the one that is there.

    Raises:
        FingerprintError: it holds something else.
    """
    if folder.create_text(name, json.dumps(asked)):
        return
    stored = read_json(folder, name) or {}
    fields = [key for key in asked if key not in ignored and stored.get(key) != asked[key]]
    if fields:
        lines = [f"  {key}: stored {stored.get(key)!r}, asked for {asked[key]!r}" for key in fields]
        raise FingerprintError(
            "\n".join([f"{what} is another than the one asked for:", "", *lines, "", advice])
        )


def _check_path(path: object) -> Path:
    if not isinstance(path, (str, Path)) or not str(path):
        raise InputError(f"The place of a store must be a path; got {path!r}.")
    return Path(path)


def _check_fingerprint(fingerprint: object) -> None:
    if not isinstance(fingerprint, str) or not fingerprint:
        raise InputError(
            f"A fingerprint must be a text that is not empty, such as a hash; got {fingerprint!r}."
        )


def _field(folder: Folder, values: dict[str, Any], name: str, kind: type) -> Any:
    if not isinstance(values.get(name), kind):
        raise StoreError(
            f"A file in {folder.where} is damaged: {name!r} is {values.get(name)!r}. {_LOST_MANIFEST}"
        )
    return values[name]


def _refuse_headless(folder: Folder) -> None:
    """A folder with features and no manifest: of what they are, nothing is known."""
    if CHECKPOINTS in folder.folders() and not folder.has(MANIFEST):
        raise StoreError(
            f"{folder.where} holds checkpoints and no {MANIFEST}: what they were computed with is not known. "
            "Restore the manifest from a copy, or give another save_dir."
        )
