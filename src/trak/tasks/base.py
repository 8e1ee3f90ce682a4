"""A task says what is explained: the model output f, and the weight q of each training example."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn


class Task(ABC):
    """What f is, from a model and a batch.

    One method is enough. `output` must treat examples independently and use only operations that `torch.func.vmap` knows,
    so that the same task serves batched forwards and single examples.
    """

    @abstractmethod
    def output(self, model: nn.Module, batch: Any) -> Tensor:
        """f(z; θ) for each example of the batch: [B], differentiable."""

    def loss_weight(self, outputs: Tensor) -> Tensor:
        """Q = −∂L/∂f for each example: [B]. By default sigmoid(−f), which belongs to L = log(1 + e^(−f))."""
        return torch.sigmoid(-outputs)

    def output_and_weight(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """(f [B] with its graph, q [B] detached)."""
        outputs_B = self.output(model, batch)
        return outputs_B, self.loss_weight(outputs_B.detach())

    @property
    def is_log_loss(self) -> bool:
        """Whether q = 1 − p = sigmoid(−f), the derivative of L = log(1 + e^(−f)), so that q lies in [0, 1] and −dq/df = q (1 − q)."""
        return type(self).loss_weight is Task.loss_weight

    def fingerprint(self) -> dict[str, Any]:
        """What makes features of this task comparable: JSON values only."""
        return {"task": f"{type(self).__module__}.{type(self).__qualname__}"}
