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
from typing import TYPE_CHECKING, Any

from torch import nn

from trak.errors import MissingDependencyError
from trak.integrations.trajectory import (
    Trajectory,
    TrajectoryCallback,
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


class CheckpointCallback(TrajectoryCallback, _Callback):
    """Saves the module's weights along a run, with step, epoch and learning rates, for `read_trajectory`.

    Arguments, and what they raise, are those of `trak.integrations.trajectory.TrajectoryCallback`.
    """

    _saved_step = 0  # or where training went on from

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
