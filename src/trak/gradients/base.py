"""What every source of per-example gradients is: an immutable object that turns a batch into blocks.

    gradients = Hooked()
    outputs = gradients.compute(model, state, task, batch, names, consume)

`consume` is called with blocks (see `trak.blocks`) as they become known. A parameter may come in several
blocks, whose sum is its gradient, or in none, which means zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trak.blocks import Block
from trak.errors import GradientError, InputError
from trak.tasks.base import Task

Consume = Callable[[Block], None]
"""Takes one block; must not keep it if memory matters."""


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a batch's forward pass gave, detached.

    Attributes:
        f: model outputs, [B].
        q: loss weights −∂L/∂f, [B].
    """

    f: Tensor
    q: Tensor


class BlamedError(GradientError):
    """A `GradientError` that knows which parameters are concerned, so that others can be kept as they are.

    Attributes:
        parameters: canonical names.
        under_vmap: whether a loop over examples might do what vmap cannot.
    """

    def __init__(self, message: str, parameters: Sequence[str], *, under_vmap: bool = False) -> None:
        super().__init__(message)
        self.parameters, self.under_vmap = tuple(parameters), under_vmap


class Gradients(ABC):
    """A source of per-example gradients ∇_θ f(z_b; θ)."""

    @abstractmethod
    def compute(
        self,
        model: nn.Module,
        state: Mapping[str, Tensor],
        task: Task,
        batch: Any,
        names: Sequence[str],
        consume: Consume,
    ) -> Outputs:
        """Gradients of f(z_b; θ) for every example b of the batch.

        Args:
            model: gives the code; its own tensors are not read, and it comes back untouched.
            state: every parameter and buffer by canonical name, on the batch's device (see `model_state`).
            task: what f is.
            batch: any nesting of tensors with the examples along dimension 0.
            names: canonical names of the attributed parameters.
            consume: called with each block.

        Returns:
            f and q, [B] each, detached.

        Raises:
            GradientError: the gradients cannot be computed this way.
            InputError: the task's output is not [B].
        """

    @abstractmethod
    def candidates(self, model: nn.Module, names: Sequence[str]) -> tuple[Gradients, ...]:
        """Sources to try for these parameters, the preferred one first.

        A source that stands for itself gives `(self,)`.

        Raises:
            UnsupportedLayerError: a parameter is not covered, and nothing else was allowed.
        """

    def instead(
        self, model: nn.Module, names: Sequence[str], failed: Gradients, error: GradientError
    ) -> Gradients | None:
        """What to try in place of `failed`, one of the candidates or what came of it, before the next candidate.

        None, the default: nothing.
        """
        return None


def forward(task: Task, model: nn.Module, batch: Any, batch_size: int) -> tuple[Tensor, Tensor]:
    """The task's (f, q), both [B] or an error.

    Raises:
        InputError: f or q has another shape, or f is not a floating-point tensor.
    """
    outputs_B, weights_B = task.output_and_weight(model, batch)
    advice = {
        "output": f"{type(task).__name__} must return one number per example, e.g. sum or index the last "
        "dimension away",
        "loss weight": "loss_weight must keep the shape of f",
    }
    for what, values in (("output", outputs_B), ("loss weight", weights_B)):
        if not isinstance(values, Tensor) or not values.is_floating_point() or values.shape != (batch_size,):
            got = (
                f"{values.dtype} of shape {list(values.shape)}"
                if isinstance(values, Tensor)
                else type(values).__name__
            )
            raise InputError(
                f"the task's {what} must be a floating-point tensor of shape [{batch_size}] for a batch of "
                f"{batch_size} examples; got {got}. {advice[what]}"
            )
    return outputs_B, weights_B.detach()


@contextmanager
def random_state_kept(state: Mapping[str, Tensor]) -> Iterator[None]:
    """Puts torch's random generators back as they were.

    The CPU's, and that of each device the state lies on.
    """
    devices = {tensor.device for tensor in state.values() if tensor.device.type not in ("cpu", "meta")}
    kinds = {device.type for device in devices}
    if not kinds:
        with torch.random.fork_rng(devices=[]):
            yield
        return
    kind = kinds.pop()
    with torch.random.fork_rng(
        devices=sorted(device.index or 0 for device in devices if device.type == kind), device_type=kind
    ):
        yield
