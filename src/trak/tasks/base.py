"""A task says what is explained: the model output f, and the weight q of each training example."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Task(ABC):
    """What f is, from a model and a batch.

    One method is enough. `output` must treat examples independently and use only operations that `torch.func.vmap` knows,
    so that the same task serves batched forwards and single examples.

    Two more methods are there for tasks that need them: `for_training` where training rows are differentiated otherwise than
    targets, and `bind` where something must be computed at each checkpoint before its batches.
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

    def for_training(self) -> Task:
        """The task by which training rows are featurized; by default this one, for training rows and targets alike.

        Of an example whose loss is a sum over several terms, Σ_t L(f_t), the features −∇L = Σ_t q_t ∇f_t are no single weight
        times ∇f. Such a task gives another one here, whose output is −L and whose weight is 1.
        """
        return self

    def bind(self, model: nn.Module, prepare: Callable[[Any], Any]) -> Task:
        """The task at one checkpoint, called whenever one is taken up, before any of its batches; by default itself.

        What it returns must depend on the checkpoint alone, so that it does not matter how often it is called.

        Args:
            model: with the checkpoint's tensors in it, in eval mode; gradients are off.
            prepare: puts a batch that the task holds on the device, in the computing dtype.
        """
        return self

    def fingerprint(self) -> dict[str, Any]:
        """What makes features of this task comparable: JSON values only."""
        return {"task": f"{type(self).__module__}.{type(self).__qualname__}"}
