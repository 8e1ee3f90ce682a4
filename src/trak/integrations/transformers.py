"""Hugging Face's `Trainer`: a callback that saves the checkpoints of a run, and the rows it trains on.

    callback = CheckpointCallback("run", every="epoch")
    trainer = transformers.Trainer(model=model, args=args, train_dataset=dataset, data_collator=collator, callbacks=[callback])
    trainer.train()

    run = read_trajectory("run")
    trak.attribute(model, trainer_rows(trainer), trainer_rows(trainer, questions), task="text_classification", checkpoints=run.checkpoints)

See `trak.integrations.trajectory` for what is saved.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from trak.datasets import DatasetRows, content_hash
from trak.errors import InputError, MissingDependencyError
from trak.integrations.trajectory import (
    Trajectory,
    TrajectoryCallback,
    learning_rates_of,
    read_trajectory,
)
from trak.logs import logger

try:
    from transformers import TrainerCallback
except ImportError as _error:
    raise MissingDependencyError(
        f"trak.integrations.transformers needs transformers: pip install transformers ({_error})"
    ) from _error

__all__ = ["CheckpointCallback", "Trajectory", "read_trajectory", "trainer_rows"]


class CheckpointCallback(TrajectoryCallback, TrainerCallback):
    """Saves the model's weights along a run, with step, epoch and learning rates, for `read_trajectory`.

    Arguments, and what they raise, are those of `trak.integrations.trajectory.TrajectoryCallback`.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the folder ready."""
        if state.is_world_process_zero:
            self.writer.begin(kwargs["model"], state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the learning rates: when the step is done, those of the next one are in force."""
        self._rates = learning_rates_of(kwargs["optimizer"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save, if it is due."""
        is_last = self.writer.last and state.global_step >= state.max_steps > 0
        if is_last or self.writer.is_due_after_step(state.global_step):
            self._save(state, kwargs)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save, if it is due."""
        if self.writer.is_due_after_epoch(state.epoch):
            self._save(state, kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the last state of a run that was stopped early, if that is what the model holds."""
        if not self.writer.last or not self._rates or self.writer.path(state.global_step).exists():
            return
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            logger.warning(
                "The model of the last step, %d, is not saved: the trainer has loaded the best one, %s, in its place",
                state.global_step,
                state.best_model_checkpoint,
            )
            return
        self._save(state, kwargs)

    def _save(self, state: Any, kwargs: dict[str, Any]) -> None:
        if state.is_world_process_zero:
            self.writer.write(
                kwargs["model"],
                step=state.global_step,
                epoch=state.epoch,
                learning_rates=self._rates or learning_rates_of(kwargs["optimizer"]),
            )


def trainer_rows(trainer: Any, dataset: Any = None, *, batch_size: int | None = None) -> DatasetRows:
    """A trainer's data as it feeds them to its model, for `train_set` or targets: rows are positions in the dataset.

    Columns that the model does not take are left out and examples are collated as the trainer does it, whatever sampler it trains
    with.

    Args:
        trainer: a `transformers.Trainer`.
        dataset: examples to take in place of its `train_dataset`; targets, say.
        batch_size: examples at once; None for the trainer's, per device.

    Raises:
        InputError: no map-style dataset, or a collator that gives something else each time (random masking).
    """
    chosen = getattr(trainer, "train_dataset", None) if dataset is None else dataset
    if not isinstance(chosen, Sized) or not hasattr(chosen, "__getitem__"):
        raise InputError(
            f"trainer_rows needs a dataset with a length and examples by number; got {type(chosen).__name__}. Of a stream make a list of "
            "the examples that are meant"
        )
    loader = trainer.get_train_dataloader() if dataset is None else trainer.get_test_dataloader(dataset)
    size = batch_size or trainer.args.per_device_train_batch_size
    rows = DatasetRows(loader.dataset, size, loader.collate_fn, trainer.args.dataloader_num_workers)
    examples = [rows.dataset[row] for row in range(min(size, rows.num_rows))]
    if examples and content_hash([rows.collate(examples)]) != content_hash([rows.collate(examples)]):
        raise InputError(
            f"the trainer's collator, {type(trainer.data_collator).__name__}, gives different batches each time it is called (random masking?), "
            "and an attribution is of one. Mask the examples once, with dataset.map, and train and attribute with "
            "those; or make rows of your own: trak.attribute takes a DataLoader with any collate_fn"
        )
    return rows
