"""What stays the same for every checkpoint of a run, and the checks of its first batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trak import batches
from trak.errors import InputError
from trak.gradients import (
    Gradients,
    check_first_batch,
    lend,
    select_gradients,
)
from trak.gradients.base import random_state_kept
from trak.projection import Projection
from trak.tasks import Task


@dataclass(frozen=True, eq=False)
class Setting:
    """What stays the same for every checkpoint of a run.

    Attributes:
        model: the user's module; never changed.
        task: what f is.
        gradients: how per-example gradients are computed.
        projection: how they are projected.
        shapes: attributed parameters, name to shape.
        device: where models run.
        dtype: in which they compute; None leaves each parameter's own.
        progress: True or False to force progress bars, None for terminals and notebooks only.
    """

    model: nn.Module
    task: Task
    gradients: Gradients
    projection: Projection
    shapes: Mapping[str, tuple[int, ...]]
    device: torch.device
    dtype: torch.dtype | None = None
    progress: bool | None = None

    @property
    def sum_dtype(self) -> torch.dtype:
        """In which features are summed: float64 for float64 computations, else float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def for_training(self) -> Setting:
        """The setting for training rows, whose task may be another than the targets' (see `Task.for_training`)."""
        task = self.task.for_training()
        return self if task is self.task else replace(self, task=task)


def bound_task(setting: Setting, state: Mapping[str, Tensor]) -> Task:
    """The setting's task at this checkpoint (see `Task.bind`)."""
    if type(setting.task).bind is Task.bind:
        return setting.task
    with random_state_kept(state), lend(setting.model, state) as model, torch.no_grad():
        return setting.task.bind(model, lambda batch: prepare(setting, batch))


def prepare(setting: Setting, batch: Any) -> Any:
    """The batch on the device, in the computing dtype."""
    batch = batches.move(batch, setting.device)
    return batch if setting.dtype is None else batches.cast(batch, setting.dtype)


def verify(setting: Setting, state: Mapping[str, Tensor], batch: Any) -> Setting:
    """The setting with gradients that passed the first-batch check (see `trak.gradients.check_first_batch`).

    For every later batch and checkpoint use what this returns: automatic gradients that failed have fallen back in it. A batch of one
    example cannot show everything: automatic gradients that passed on it stay automatic, to be verified on a larger one.

    Raises:
        GradientError, MixedExamplesError, NonFiniteError: what the check found.
        InputError: a mode of torch around the call in which gradients or their sums would be others.
    """
    refuse_modes(setting.device)
    batch = prepare(setting, batch)
    names = list(setting.shapes)
    task = bound_task(setting, state)
    gradients = check_first_batch(setting.gradients, setting.model, state, task, batch, names)
    if batches.batch_size(batch) == 1 and gradients == select_gradients(
        setting.gradients, setting.model, names
    ):
        return setting
    return replace(setting, gradients=gradients)


def refuse_modes(device: torch.device) -> None:
    """Nothing, outside of modes of torch in which gradients or their sums would be others.

    Raises:
        InputError: under inference mode or autocast.
    """
    if torch.is_inference_mode_enabled():
        raise InputError(
            "there are no gradients under torch.inference_mode(): attribute outside of it (torch.no_grad() does no harm)"
        )
    refuse_autocast(device)


def refuse_autocast(device: torch.device) -> None:
    """Nothing, outside of autocast.

    Raises:
        InputError: under autocast.
    """
    if device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type):
        raise InputError(
            "under torch.autocast also projections, sums and scores would be in half precision: attribute outside of it, and let the task's "
            "output() enter autocast if the model is to run in it"
        )
