"""Outputs of retrained models in a folder, so that a killed run goes on where it stopped.

FOLDER/retrainings.json                           sizes, name and version of the caller's function
FOLDER/rows-2c26b46b68ffc68f-seed-3.safetensors   outputs [T] after training on the rows with this hash, from seed 3

A model is known by its rows and its seed, not by what asked for it: removal curves of any scores share a folder.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from trak.errors import CorruptShardError, FingerprintError
from trak.evaluation._values import Floats
from trak.evaluation.retrain.files import differences, make_folder, read_settings, read_tensors, write_tensors
from trak.files import write_whole

SETTINGS_FILE = "retrainings.json"


class Kept:
    """Outputs [T] float64 by rows and seed.

    Args:
        folder: made if it is not there.
        num_rows: N.
        num_targets: T.
        train: the training function's name.
        version: the caller's word for the version of their training function.

    Raises:
        FingerprintError: the folder is of other data or another version.
        CorruptShardError: damaged settings.
        StoreError: no folder.
    """

    def __init__(
        self, folder: str | Path, *, num_rows: int, num_targets: int, train: str, version: str | None
    ) -> None:
        self._folder = Path(folder)
        make_folder(self._folder)
        asked = {
            "format": 1,
            "num_train": num_rows,
            "num_targets": num_targets,
            "train": train,
            "version": version,
        }
        file = self._folder / SETTINGS_FILE
        if not file.is_file():
            write_whole(file, json.dumps(asked, indent=1).encode())
        different = differences(read_settings(file), asked)
        if different:
            begun = (
                f"The retrained models in {self._folder} were made with other settings than those asked for:"
            )
            advice = "Give another folder, or the stored settings."
            raise FingerprintError("\n".join([begun, "", *different.values(), "", advice]))
        self._about = json.dumps(asked, sort_keys=True)

    def get(self, indices: Tensor, seed: int) -> Floats | None:
        """The outputs of the model of these rows and this seed, if it is there.

        Raises:
            CorruptShardError: its file is damaged.
            FingerprintError: its file comes from another folder.
        """
        path = self._path(indices, seed)
        if not path.is_file():
            return None
        tensors, metadata = read_tensors(path)
        if metadata.get("settings") != self._about:
            raise FingerprintError(
                f"{path} was made with other settings than {SETTINGS_FILE} beside it says: it was put there from another folder. "
                "Remove it and run again."
            )
        if "outputs" not in tensors:
            raise CorruptShardError(f"{path} holds no outputs. Remove it and run again.")
        return tensors["outputs"].numpy()

    def put(self, indices: Tensor, seed: int, outputs: Floats) -> None:
        """Write the outputs of a model."""
        write_tensors(
            self._path(indices, seed), {"outputs": torch.from_numpy(outputs)}, {"settings": self._about}
        )

    def _path(self, indices: Tensor, seed: int) -> Path:
        # 64 bits: among a million models two have the same with probability 3e-8.
        digest = hashlib.sha256(indices.numpy().astype("<i8").tobytes()).hexdigest()[:16]
        return self._folder / f"rows-{digest}-seed-{seed}.safetensors"
