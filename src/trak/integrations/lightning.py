"""Lightning: a callback that saves the checkpoints of a run.

    callback = CheckpointCallback("run", every="epoch")
    trainer = lightning.Trainer(max_epochs=10, callbacks=[callback])
    trainer.fit(module, loader)

    run = read_trajectory("run", model=module.model)
    trak.attribute(module.model, loader, targets, task="image_classification", checkpoints=run.checkpoints)

Or attribute the `LightningModule` itself, if its forward is the model's. See `trak.integrations.trajectory` for what is saved.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from trak.errors import MissingDependencyError
from trak.integrations.trajectory import (
    Trajectory,
    TrajectoryWriter,
    learning_rates_of,
    read_trajectory,
)

__all__ = ["CheckpointCallback", "Trajectory", "read_trajectory"]


def _callback_class() -> Any:
    """Lightning's base class, from whichever of its packages is there."""
    reasons = []
    for package in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return importlib.import_module(package).Callback
        except ImportError as error:
            reasons.append(str(error))
    raise MissingDependencyError(
        f"trak.integrations.lightning needs lightning: pip install lightning ({'; '.join(reasons)})"
    )


if TYPE_CHECKING:
    _Callback = object
else:
    _Callback = _callback_class()


class CheckpointCallback(_Callback):
    """Saves the module's weights along a run, with step, epoch and learning rates, for `read_trajectory`.

    The first process saves; files are whole or not there. A run that is resumed goes on in the same folder.

    Args:
        folder: where to; one for each run.
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
        self._rates: list[float] = []
        self._saved_step = 0

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Make the folder ready."""
        self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            self.writer.begin(pl_module, trainer.global_step)

    def on_before_optimizer_step(self, trainer: Any, pl_module: nn.Module, optimizer: Any) -> None:
        """Keep the learning rates: when the batch is done, those of the next step are in force."""
        self._rates = learning_rates_of(optimizer)

    def on_train_batch_end(
        self, trainer: Any, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, if it is due; while gradients accumulate, the step stays what it was."""
        if trainer.global_step != self._saved_step and self.writer.is_due_after_step(trainer.global_step):
            epochs = trainer.current_epoch + (batch_idx + 1) / max(trainer.num_training_batches, 1)
            self._save(trainer, pl_module, epochs)

    def on_train_epoch_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Save, if it is due."""
        if self.writer.is_due_after_epoch(trainer.current_epoch + 1):
            self._save(trainer, pl_module, trainer.current_epoch + 1)

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Save the last state."""
        if self.writer.last and self._rates and trainer.global_step != self._saved_step:
            self._save(trainer, pl_module, trainer.current_epoch)

    def _save(self, trainer: Any, pl_module: nn.Module, epoch: float) -> None:
        self._saved_step = trainer.global_step
        if trainer.is_global_zero and self._rates:
            self.writer.write(pl_module, step=trainer.global_step, epoch=epoch, learning_rates=self._rates)
