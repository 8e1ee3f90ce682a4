"""Gradients by `torch.func`: vmap of grad over the examples. Any model whose operations vmap knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from trak.batches import batch_size, flatten
from trak.blocks import DenseBlock
from trak.errors import GradientError, InputError, TrakError
from trak.gradients.base import Consume, Gradients, Outputs, forward, random_state_kept
from trak.gradients.swap import lend
from trak.tasks.base import Task


@dataclass(frozen=True)
class Functional(Gradients):
    """All examples at once by vmap(grad(f)); holds the dense gradients of a whole batch, B × P numbers.

    Attributes:
        chunk_size: examples whose activations are held at once; None takes the whole batch.
    """

    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.chunk_size is not None and self.chunk_size < 1:
            raise InputError(
                f"chunk_size must be at least 1, or None for the whole batch; got {self.chunk_size}"
            )

    def candidates(self, model: nn.Module, names: Sequence[str]) -> tuple[Gradients, ...]:
        """Itself: whether vmap knows the model's operations shows on the first batch."""
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
        """One dense block per parameter; see `Gradients.compute`.

        Raises:
            GradientError: vmap met an operation that it cannot do.
        """
        size = batch_size(batch)
        leaves, rebuild = flatten(batch)
        leaves = [leaf.detach() for leaf in leaves]
        attributed = {name: state[name].detach() for name in names}

        def output(
            parameters: Mapping[str, Tensor], example: Sequence[Tensor]
        ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            one = rebuild([leaf.unsqueeze(0) for leaf in example])
            with lend(model, {**state, **parameters}):
                f, q = forward(task, model, one, 1)
            return f[0], (f[0].detach(), q[0])

        per_example = vmap(grad(output, has_aux=True), in_dims=(None, 0))
        chunk = self.chunk_size or size
        pieces = []
        values: dict[str, Tensor] = {}
        with random_state_kept(state):
            for start in range(0, size, chunk):
                gradients, outputs = _run(
                    per_example, attributed, [leaf[start : start + chunk] for leaf in leaves]
                )
                pieces.append(outputs)
                _place(values, gradients, start, size)
        for name in names:
            consume(DenseBlock(name, tuple(state[name].shape), values.pop(name)))
        return Outputs(torch.cat([f for f, _ in pieces]), torch.cat([q for _, q in pieces]))


def _place(values: dict[str, Tensor], gradients: dict[str, Tensor], start: int, size: int) -> None:
    """Put a chunk's gradients where they belong in the batch's.

    A chunk that is the whole batch is not copied.
    """
    for name in list(gradients):
        piece = gradients.pop(name)
        if piece.shape[0] == size:
            values[name] = piece
            continue
        if name not in values:
            values[name] = piece.new_empty(size, *piece.shape[1:])
        values[name][start : start + piece.shape[0]] = piece


def _run(
    per_example: Any, attributed: dict[str, Tensor], leaves: list[Tensor]
) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    try:
        # The fused attention kernels have no batching rules; the plain formula has.
        with sdpa_kernel(SDPBackend.MATH):
            return per_example(attributed, leaves)
    except TrakError:
        raise
    except (RuntimeError, ValueError, NotImplementedError) as error:
        first = str(error).strip().split("\n")[0]
        raise GradientError(
            f"torch.func.vmap cannot compute per-example gradients of this model: {type(error).__name__}: "
            f"{first} — For Hugging Face models load with attn_implementation='eager'; avoid .item(), "
            "in-place writes into new tensors and branches on values; or attribute only to parameters of "
            "common layers, or use gradients=trak.gradients.Reference(), which is slow and takes any model"
        ) from error
