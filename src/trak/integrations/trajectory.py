"""The checkpoints of a training run as the callbacks write them: one file for each, with its step and learning rates inside.

    folder/step-00000500.safetensors    parameters and saved buffers; in its metadata step, epoch, learning rates

A file is written under another name, flushed and renamed, so that one which is there is whole. Nothing else is in the folder: no list of
files that could be out of step with them. Metadata (strings): `trak.step`, `trak.epoch`, `trak.learning_rates` (a JSON list, one for
each parameter group), and `trak.contents` where only trainable parameters were saved.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trak.checkpoints import CheckpointSource, list_checkpoints
from trak.checkpoints.read import CONTENTS, TRAINABLE
from trak.checkpoints.steps import steps_in
from trak.errors import CheckpointError, InputError
from trak.files import STALE_AFTER_S, TEMPORARY_PREFIX, flush_folder, temporary_path


@dataclass(frozen=True)
class Trajectory:
    """A training run's checkpoints in the order of training.

    Attributes:
        checkpoints: for `checkpoints=`: paths, or callables where a model was given to `read_trajectory`.
        steps: optimiser steps done at each.
        epochs: epochs done at each, perhaps fractions.
        group_learning_rates: of the step before each, for each of the optimiser's parameter groups.
    """

    checkpoints: list[CheckpointSource]
    steps: list[int]
    epochs: list[float]
    group_learning_rates: list[tuple[float, ...]]

    @property
    def learning_rates(self) -> list[float]:
        """η of the step before each checkpoint, for `trak.TracIn(learning_rates=…)`.

        Raises:
            InputError: parameter groups had different ones.
        """
        for step, rates in zip(self.steps, self.group_learning_rates):
            if len(set(rates)) > 1:
                raise InputError(
                    f"at step {step} parameter groups had different learning rates, {list(rates)}, and TracIn has one for a checkpoint: "
                    "choose from group_learning_rates, and attribute through that group's parameters"
                )
        return [rates[0] for rates in self.group_learning_rates]


def read_trajectory(folder: str | os.PathLike[str], *, model: nn.Module | None = None) -> Trajectory:
    """What a callback saved: checkpoints, steps, epochs and learning rates. Weights are not read.

    Args:
        folder: the callback's.
        model: the model that is attributed, where the checkpoints must be fitted to it: those of trainable parameters only, and those
            of a `LightningModule` that holds it (see `trak.load_checkpoint`).

    Raises:
        CheckpointError: no such folder, no checkpoints in it, or others than a callback's.
    """
    sources = list_checkpoints(folder, model=model)
    found = steps_in(Path(folder))
    heads = [_head(path) for _, path in found]
    return Trajectory(
        sources,
        [step for step, _ in found],
        [epoch for epoch, _ in heads],
        [rates for _, rates in heads],
    )


@dataclass(frozen=True, eq=False)
class TrajectoryWriter:
    """When and how checkpoints are saved; the callbacks tell it what happens.

    Attributes are the arguments of `TrajectoryCallback`.

    Raises:
        InputError: arguments that are none of these.
    """

    folder: Path
    every: int | str = "epoch"
    only: Collection[int] | None = None
    last: bool = True
    trainable_only: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        is_number = isinstance(self.every, int) and not isinstance(self.every, bool) and self.every > 0
        if not is_number and self.every != "epoch":
            raise InputError(f'every must be "epoch" or a number of steps ≥ 1; got {self.every!r}')
        if self.only is not None and not all(isinstance(at, int) and at > 0 for at in self.only):
            raise InputError(f"only must be numbers of epochs or steps ≥ 1; got {self.only!r}")

    def begin(self, model: nn.Module, step: int) -> None:
        """Before training goes on from `step`: the folder is to hold this run's checkpoints alone.

        A run that is resumed goes back to its last full checkpoint, and writes what came after that again: those are deleted.

        Raises:
            CheckpointError: another run's checkpoints are there, or the model is split over processes.
        """
        _refuse_sharded(model)
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob(f"{TEMPORARY_PREFIX}*.safetensors"):
            if time.time() - stale.stat().st_mtime > STALE_AFTER_S:
                stale.unlink(missing_ok=True)
        later = [path for found, path in steps_in(self.folder) if found > step]
        if later and step == 0 and not self.overwrite:
            raise CheckpointError(
                f"{self.folder} holds {len(later)} checkpoints, {later[0].name} first, and training begins at step 0: they are another "
                "run's. Give another folder, or overwrite=True to delete them."
            )
        for path in later:
            path.unlink()

    def is_due_after_step(self, step: int) -> bool:
        """Whether to save after this many steps."""
        if self.every == "epoch" or step % int(self.every):
            return False
        return self.only is None or step in self.only

    def is_due_after_epoch(self, epoch: float) -> bool:
        """Whether to save after this many epochs; not in the middle of one."""
        number = round(epoch)
        if self.every != "epoch" or abs(epoch - number) > 1e-6:
            return False
        return self.only is None or number in self.only

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.folder / f"step-{step:08d}.safetensors"

    def write(self, model: nn.Module, *, step: int, epoch: float, learning_rates: Sequence[float]) -> Path:
        """Save the model's weights, whole or not at all; one of the same step is replaced.

        Args:
            model: parameters and saved buffers are taken; tied ones once, under their first name.
            step: optimiser steps done.
            epoch: epochs done.
            learning_rates: of the last step, for each parameter group.
        """
        path = self.path(step)
        metadata = {
            "format": "pt",
            "trak.step": str(step),
            "trak.epoch": repr(float(epoch)),
            "trak.learning_rates": json.dumps([float(rate) for rate in learning_rates]),
            **({CONTENTS: TRAINABLE} if self.trainable_only else {}),
        }
        temporary = temporary_path(path)
        try:
            save_file(_weights(model, self.trainable_only), temporary, metadata)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        flush_folder(self.folder)
        return path


class TrajectoryCallback:
    """What the trainers' callbacks have in common: arguments, and the writer that they tell what happens.

    The first process saves; files are whole or not there. A run that is resumed goes on in the same folder.

    Args:
        folder: where to, made if it is not there; one for each run, and another than the trainer's own.
        every: "epoch", or a number of optimiser steps.
        only: save at these alone: numbers of epochs where every="epoch", else of steps.
        last: also at the end of training.
        trainable_only: leave out frozen parameters: adapters of a large model. Read with `read_trajectory(folder, model=model)`.
        overwrite: delete another run's checkpoints in the folder, instead of an error.

    Raises:
        InputError: arguments that are none of these.
        CheckpointError: when training begins: another run's checkpoints are there, or the model is split over processes.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        every: int | str = "epoch",
        only: Collection[int] | None = None,
        last: bool = True,
        trainable_only: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.writer = TrajectoryWriter(Path(folder), every, only, last, trainable_only, overwrite)
        self._rates: list[
            float
        ] = []  # of the step before, for each parameter group; empty before the first one


def learning_rates_of(optimizer: Any) -> list[float]:
    """The learning rate of each of an optimiser's parameter groups."""
    return [float(group["lr"]) for group in optimizer.param_groups]


def _head(path: Path) -> tuple[float, tuple[float, ...]]:
    """(epoch, learning rates) from a file's metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        rates = tuple(float(rate) for rate in json.loads(metadata["trak.learning_rates"]))
        return float(metadata["trak.epoch"]), rates
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no checkpoint that a CheckpointCallback of trak.integrations saved ({type(error).__name__}: {error}). Checkpoints of "
            "other kinds: trak.list_checkpoints(folder), with learning rates of your own."
        ) from error


def _weights(model: nn.Module, trainable_only: bool) -> dict[str, Tensor]:
    """Parameters and saved buffers by their first names, each with memory of its own on the CPU.

    Of frozen parameters nothing is kept where only trainable ones are wanted, nor of buffers that hold whole numbers (quantised
    weights): statistics that training changes are floating-point numbers.
    """
    saved = set(model.state_dict())
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if name in saved and (parameter.requires_grad or not trainable_only):
            weights[name] = parameter
    for name, buffer in model.named_buffers():
        if name in saved and (buffer.is_floating_point() or not trainable_only):
            weights[name] = buffer
    held: set[int] = set()
    return {name: _own_memory(tensor, held) for name, tensor in weights.items()}


def _own_memory(tensor: Tensor, held: set[int]) -> Tensor:
    """On the CPU, contiguous, sharing no memory with those seen before: the file format has no views."""
    plain = tensor.detach().cpu().contiguous()
    storage = plain.untyped_storage()
    is_shared = storage.nbytes() != plain.numel() * plain.element_size() or storage.data_ptr() in held
    held.add(storage.data_ptr())
    return plain.clone() if is_shared else plain


def _refuse_sharded(model: nn.Module) -> None:
    """Raise for models of which no process holds all."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id") or type(parameter.data).__name__ == "DTensor":
            raise CheckpointError(
                f"parameter {name!r} is split over processes (FSDP, ZeRO-3 or tensor parallelism), and this callback saves what the first "
                "process has. Save full checkpoints with the trainer itself, and read them with trak.list_checkpoints(folder)."
            )
    if any("FullyShardedDataParallel" in type(module).__name__ for module in model.modules()):
        raise CheckpointError(
            "the model is wrapped by FSDP, and this callback saves what the first process has. Save full checkpoints with the trainer itself, "
            "and read them with trak.list_checkpoints(folder)."
        )
