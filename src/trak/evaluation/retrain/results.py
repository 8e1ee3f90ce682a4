"""Outputs of the models that are done: in memory, or a small file each in a folder that can be gone on with.

FOLDER/retrain.json                            the settings; "earlier": those of the smaller banks that it was made from
FOLDER/subset-00003-model-0.safetensors        outputs of a finished model
FOLDER/subset-00003-model-0.state.safetensors  its parameters, if they are kept; written first
FOLDER/bank.safetensors                        everything, once every model is there
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trak.errors import CorruptShardError, FingerprintError, InputError, NonFiniteError, StoreError
from trak.evaluation._values import as_array
from trak.evaluation.retrain.bank import BANK_FILE, SETTINGS_FILE, Bank, as_target_rows
from trak.evaluation.retrain.errors import RetrainError
from trak.evaluation.retrain.files import differences, make_folder, read_settings, read_tensors, write_tensors
from trak.evaluation.retrain.plan import GROWING, Job, Plan, fingerprint
from trak.files import write_whole
from trak.logs import logger

EARLIER = "earlier"


class Results:
    """Outputs of finished models. `keep` may be called by several threads.

    Args:
        plan: the models of the bank.
        folder: where to write them, None for memory only.

    Raises:
        InputError: models are to be kept, and there is no folder.
        FingerprintError: the folder is of a bank with other settings; the message has each difference.
        CorruptShardError: a damaged file.
    """

    def __init__(self, plan: Plan, folder: str | Path | None) -> None:
        if plan.keep_models and folder is None:
            raise InputError("keep_models=True needs folder=, which is where the models are kept.")
        self._plan = plan
        self._folder = None if folder is None else Path(folder)
        self._lock = threading.Lock()
        self._outputs: dict[tuple[int, int], Tensor] = {}
        self._num_targets = None if plan.target_rows is None else len(plan.target_rows)
        self._fingerprint = fingerprint(plan.settings())
        self._accepted = {self._fingerprint}
        if self._folder is not None:
            self._open(self._folder)

    def missing(self) -> list[Job]:
        """The models that are not there yet."""
        return [job for job in self._plan.jobs() if (job.subset, job.repeat) not in self._outputs]

    def keep(self, job: Job, model: Any, outputs: Any) -> None:
        """Check the outputs of a model, and keep them.

        Args:
            job: which model.
            model: module or state dict; used only if models are kept.
            outputs: [T].

        Raises:
            RetrainError: outputs of another shape than [T], or a model without a state dict that is to be kept.
            NonFiniteError: NaN or infinity in the outputs.
        """
        values = _checked(job, outputs)
        with self._lock:
            if self._num_targets is None:
                self._num_targets = len(values)
            expected = self._num_targets
        if len(values) != expected:
            raise _error(job, f"has {len(values)} outputs where {expected} are expected, one per target")
        if self._folder is not None:
            if self._plan.keep_models:
                # First the parameters: where the outputs are, the model is done.
                write_tensors(self._state_file(self._folder, job), _state(job, model), {"model": str(job)})
            metadata = {"fingerprint": self._fingerprint, "seed": str(job.seed)}
            write_tensors(self._folder / f"{job.name}.safetensors", {"outputs": values}, metadata)
        with self._lock:
            self._outputs[job.subset, job.repeat] = values

    def bank(self) -> Bank:
        """The bank of all models, written to the folder if there is one."""
        plan, jobs = self._plan, self._plan.jobs()
        outputs = torch.stack([self._outputs[job.subset, job.repeat] for job in jobs])
        folder = self._folder
        bank = Bank(
            masks=plan.masks,
            outputs=outputs.reshape(len(plan.masks), plan.models_per_subset, -1),
            target_rows=as_target_rows(plan.target_rows, outputs.shape[1]),
            models=[self._state_file(folder, job) for job in jobs] if plan.keep_models and folder else [],
        )
        if folder is not None and not _is_saved(bank, folder):
            bank.save(folder)
        return bank

    def _open(self, folder: Path) -> None:
        make_folder(folder)
        file, asked = folder / SETTINGS_FILE, self._plan.settings()
        if not file.is_file():
            if (folder / BANK_FILE).is_file():
                raise StoreError(
                    f"{folder} holds a finished bank without the settings that it was made with, so nothing can be "
                    "added to it. Read it with Bank.load, or give another folder."
                )
            # Of two runs that begin at the same moment the last one's stays; the fingerprint in each model's file
            # tells theirs apart.
            write_whole(file, json.dumps(asked, indent=1).encode())
        stored = read_settings(file)
        earlier = stored.pop(EARLIER, [])
        if stored != asked and self._plan.extends(stored):
            earlier = [*earlier, stored]
            # The smaller bank stays readable until the larger one is there.
            write_whole(file, json.dumps({**asked, EARLIER: earlier}, indent=1).encode())
            logger.info(
                "retrain: the bank in %s is made larger, from %d × %d to %d × %d models",
                *(folder, stored["num_subsets"], stored["models_per_subset"]),
                *(asked["num_subsets"], asked["models_per_subset"]),
            )
        else:
            _refuse_difference(folder, stored, asked)
        self._accepted |= {fingerprint(settings) for settings in earlier}
        for job in self._plan.jobs():
            path = folder / f"{job.name}.safetensors"
            if path.is_file() and (not self._plan.keep_models or self._state_file(folder, job).is_file()):
                self._outputs[job.subset, job.repeat] = self._read(path, job)

    def _read(self, path: Path, job: Job) -> Tensor:
        tensors, metadata = read_tensors(path)
        if metadata.get("fingerprint") not in self._accepted:
            raise FingerprintError(
                f"{path} was made with other settings than {SETTINGS_FILE} beside it says. It was put there from "
                "another bank, or two runs with different settings began at once. Remove it and run again."
            )
        values = tensors.get("outputs")
        if values is None or values.ndim != 1 or not bool(values.isfinite().all()):
            raise CorruptShardError(f"{path} holds no finite outputs [T]. Remove it and run again.")
        if self._num_targets is None:
            self._num_targets = len(values)
        if len(values) != self._num_targets:
            raise CorruptShardError(
                f"{path} holds {len(values)} outputs where the others have {self._num_targets}. Remove it and run again."
            )
        return values

    @staticmethod
    def _state_file(folder: Path, job: Job) -> Path:
        return folder / f"{job.name}.state.safetensors"


def _checked(job: Job, outputs: Any) -> Tensor:
    """The outputs [T] as float64."""
    try:
        array = as_array(outputs)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _error(job, f"gave outputs that are no array: {error}") from error
    if array.ndim != 1 or array.dtype.kind not in "fiu" or len(array) == 0:
        raise _error(
            job, f"must give outputs [T], one real number per target, got {array.dtype} {list(array.shape)}"
        )
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        raise NonFiniteError(
            f"The model of {job} gives {len(bad)} outputs that are NaN or infinite, the first for target {bad[0]}. "
            "It is not kept. Training may have diverged (a lower learning rate, or a warm-up, helps), or the "
            "output function may take the logarithm of a rounded probability."
        )
    return torch.from_numpy(array.astype(np.float64))


def _state(job: Job, model: Any) -> dict[str, Tensor]:
    """The parameters and buffers to keep."""
    state = model.state_dict() if isinstance(model, nn.Module) else model
    if isinstance(state, Mapping) and state and all(isinstance(value, Tensor) for value in state.values()):
        return {str(name): value for name, value in state.items()}
    raise _error(
        job,
        f"cannot be kept: keep_models=True needs train to return a module or a mapping of names to tensors, "
        f"got {type(model).__name__}",
    )


def _error(job: Job, what: str) -> RetrainError:
    return RetrainError(f"The model of {job} {what}.", subset=job.subset, repeat=job.repeat, seed=job.seed)


def _refuse_difference(folder: Path, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    different = differences(stored, asked)
    if not different:
        return
    smaller = different.keys() <= set(GROWING) and all(
        isinstance(stored.get(name), int) and asked[name] <= stored[name]
        for name in ("num_subsets", "models_per_subset")
    )
    advice = (
        "A bank is made larger by asking for more, never smaller: read it by Bank.load, and take a part by .subset()."
        if smaller
        else "Models of different settings do not make one bank. Give another folder, or the stored settings."
    )
    begun = f"The bank in {folder} was begun with other settings than those asked for:"
    raise FingerprintError("\n".join([begun, "", *different.values(), "", advice]))


def _is_saved(bank: Bank, folder: Path) -> bool:
    """Whether the folder's finished bank is this one, and not the smaller one that it was before."""
    return (folder / BANK_FILE).is_file() and Bank.load(folder).outputs.shape == bank.outputs.shape
