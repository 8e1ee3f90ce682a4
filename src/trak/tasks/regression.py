"""Regression: the model's prediction is the output to explain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trak.batches import describe
from trak.errors import InputError
from trak.tasks.base import Task


@dataclass(frozen=True)
class Regression(Task):
    """f = ŷ(x), the prediction; loss ½ (ŷ − y)², weight q = −∂L/∂f = y − ŷ. Batches are (inputs, values).

    Positive scores raise the prediction. With this f one Newton step is the exact leave-one-out formula of linear least squares
    up to the leverage. Models with several outputs per example need a task of their own that says which to explain.
    """

    def output(self, model: nn.Module, batch: Any) -> Tensor:
        """The prediction, [B]."""
        return self._predictions_and_values(model, batch)[0]

    def loss_weight(self, outputs: Tensor) -> Tensor:
        """Not determined by f alone: see `output_and_weight`.

        Raises:
            InputError: always.
        """
        raise InputError("regression weights need the observed values: call output_and_weight(model, batch)")

    def output_and_weight(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """(ŷ [B] with its graph, y − ŷ [B] detached)."""
        predictions_B, values_B = self._predictions_and_values(model, batch)
        return predictions_B, values_B.to(predictions_B.dtype) - predictions_B.detach()

    def fingerprint(self) -> dict[str, Any]:
        """The task's name."""
        return {"task": "Regression"}

    def _predictions_and_values(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise InputError(f"regression expects batches (inputs, values); got {describe(batch)}")
        inputs, values = batch
        predictions = model(inputs)
        if isinstance(predictions, Tensor) and predictions.ndim == 0:
            # A model that ends in squeeze() leaves no dimension of a batch of one.
            predictions = predictions.reshape(1)
        if not isinstance(predictions, Tensor) or predictions.numel() != predictions.shape[0]:
            raise InputError(
                f"regression expects one prediction per example, [batch] or [batch, 1]; got {describe(predictions)}. "
                "For several outputs write a task: trak.CustomTask(lambda model, batch: model(batch[0])[:, 3])"
            )
        if values.numel() != predictions.numel():
            raise InputError(
                f"regression expects one value per example; got {describe(values)} for predictions {describe(predictions)}"
            )
        return predictions.reshape(-1), torch.as_tensor(values).reshape(-1)
