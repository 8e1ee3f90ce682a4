"""Tensors that are kept once, under a name: of several processes that bring some, the first decides.

The tensors are written under a name of their own; a text file that must not exist yet then says which file counts, as in `Folder.create_text`.
A process that is killed before that leaves a file that no text names, and it is never read.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from uuid import uuid4

from torch import Tensor

from trak.errors import CorruptShardError, StoreError
from trak.store.files import open_file, write_file
from trak.store.folder import Folder
from trak.store.layout import SUFFIX, check_name


def read_kept(folder: Folder, name: str, belongs_to: Mapping[str, str]) -> dict[str, Tensor] | None:
    """The tensors kept under a name; None if there are none.

    Raises:
        StoreError: the text that names their file is damaged, or the file is gone.
        CorruptShardError: the file is damaged, or belongs to something else.
    """
    where = f"{folder.where}/{_index(name)}"
    file_name = _file_name(folder, name)
    if file_name is None:
        return None
    try:
        with open_file(folder, file_name) as file:
            file.check_about({"kind": "kept", **belongs_to})
            return {key: file.read(key).clone() for key in file.specs}
    except FileNotFoundError as error:
        raise StoreError(f"{where} names the file {file_name}, and it is gone. {_RESTORE}") from error
    except CorruptShardError as error:
        raise CorruptShardError(
            f"{where} names a file that is damaged or belongs to something else. {_RESTORE} ({error})"
        ) from error


def keep_first(
    folder: Folder, name: str, tensors: Mapping[str, Tensor], belongs_to: Mapping[str, str]
) -> dict[str, Tensor]:
    """Keep tensors under a name, unless some are kept there.

    Returns:
        What is kept now: these, or those that were there first.
    """
    file_name = f"{check_name(name, 'The name of kept tensors')}-{uuid4().hex}{SUFFIX}"
    copies = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
    write_file(folder, file_name, copies, {"kind": "kept", **belongs_to})
    if not folder.create_text(_index(name), json.dumps({"file": file_name})):
        folder.remove(file_name)
    kept = read_kept(folder, name, belongs_to)
    assert kept is not None
    return kept


def _file_name(folder: Folder, name: str) -> str | None:
    for attempt in range(_ATTEMPTS):
        try:
            text = folder.read_text(_index(name))
            return None if text is None else str(json.loads(text)["file"])
        except (ValueError, KeyError, TypeError) as error:
            # On a file system without hard links another process may be writing it at this moment.
            if attempt + 1 == _ATTEMPTS:
                raise StoreError(
                    f"{folder.where}/{_index(name)} is damaged: {error!r}. {_RESTORE}"
                ) from error
            time.sleep(_PAUSE_S)
    raise AssertionError("unreachable")


def _index(name: str) -> str:
    return f"{check_name(name, 'The name of kept tensors')}.json"


_ATTEMPTS = 5
_PAUSE_S = 0.02
_RESTORE = "Restore both from a copy, or use another save_dir and compute the features again."
