"""Gradients of one example after another, by plain autograd: the oracle. Slow, and right for any model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trak.batches import batch_size, take
from trak.blocks import DenseBlock
from trak.errors import GradientError
from trak.gradients.alone import laid_out
from trak.gradients.base import Consume, Gradients, Outputs, forward, random_state_kept
from trak.gradients.swap import lend
from trak.tasks.base import Task


@dataclass(frozen=True)
class Reference(Gradients):
    """One forward and backward pass per example: for tests, and for models that nothing else can take.

    It holds the dense gradients of a whole batch, B × P numbers: keep batches small.
    """

    def candidates(self, model: nn.Module, names: Sequence[str]) -> tuple[Gradients, ...]:
        """Itself: every model is covered."""
        return (self,)

    def compute(
        self,
        model: nn.Module,
        state: Mapping[str, Tensor],
        task: Task,
        batch: Any,
        names: Sequence[str],
        consume: Consume,
    ) -> Outputs:
        """One dense block per parameter, after all examples; see `Gradients.compute`."""
        size = batch_size(batch)
        values = {name: state[name].new_zeros(size, *state[name].shape) for name in names}
        f, q = [], []
        with random_state_kept(state):
            for row in range(size):
                outputs, gradients = batch_gradient(
                    model, state, task, take(batch, slice(row, row + 1)), names
                )
                for name, gradient in gradients.items():
                    if gradient is not None:
                        values[name][row] = gradient
                f.append(outputs.f)
                q.append(outputs.q)
        for name in names:
            consume(DenseBlock(name, tuple(state[name].shape), values.pop(name)))
        return Outputs(torch.cat(f), torch.cat(q))


def batch_gradient(
    model: nn.Module, state: Mapping[str, Tensor], task: Task, batch: Any, names: Sequence[str]
) -> tuple[Outputs, dict[str, Tensor | None]]:
    """Ordinary gradient of Σ_b f(z_b): f and q, and parameter name to gradient.

    The gradient is None where f does not depend on the parameter.
    """
    attributed = {name: state[name].detach().requires_grad_() for name in names}
    with lend(model, {**state, **attributed}), torch.enable_grad():
        with laid_out(batch_size(batch)):
            f, q = forward(task, model, batch, batch_size(batch))
        gradients: Sequence[Tensor | None] = [None] * len(names)
        if f.requires_grad:
            gradients = _pulled_back(f.sum(), list(attributed.values()))
    dense = [g.to_dense() if g is not None and g.is_sparse else g for g in gradients]
    return Outputs(f.detach(), q), dict(zip(names, dense))


def _pulled_back(total: Tensor, leaves: list[Tensor]) -> Sequence[Tensor | None]:
    try:
        return torch.autograd.grad(total, leaves, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise GradientError(
            "activation checkpointing with use_reentrant=True has no gradients with respect to given parameters: pass "
            "use_reentrant=False, or switch checkpointing off"
        ) from error
