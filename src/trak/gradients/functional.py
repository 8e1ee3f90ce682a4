"""Gradients by `torch.func`: vmap of grad over the examples. Any model whose operations vmap knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from trak.batches import batch_size, flatten, take
from trak.blocks import DenseBlock
from trak.errors import GradientError, InputError, TrakError
from trak.gradients.base import Consume, Gradients, Outputs, forward, random_state_kept
from trak.gradients.swap import lend
from trak.tasks.base import Task


@dataclass(frozen=True)
class Functional(Gradients):
    """All examples at once by vmap(grad(f)); holds the dense gradients of a whole batch, B × P numbers.

    Attributes:
        chunk_size: examples whose activations are held at once; None takes as many as fit `memory_budget`, which
            one example's forward pass tells, for every shape of examples once.
        memory_budget: for activations and the gradients of a chunk, in bytes; estimated, and beside the B × P
            numbers of the whole batch.
    """

    chunk_size: int | None = None
    memory_budget: int = 2**30
    _measured: _Measured = field(default_factory=lambda: _Measured(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.chunk_size is not None and self.chunk_size < 1:
            raise InputError(
                f"chunk_size must be at least 1, or None to fit memory_budget; got {self.chunk_size}"
            )
        if self.memory_budget < 1:
            raise InputError(f"memory_budget must be at least 1 byte; got {self.memory_budget}")

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
        pieces = []
        values: dict[str, Tensor] = {}
        with random_state_kept(state):
            chunk = self.chunk_size or self._fitting(model, state, task, batch, names)
            for start in range(0, size, chunk):
                gradients, outputs = _run(
                    per_example, attributed, [leaf[start : start + chunk] for leaf in leaves]
                )
                pieces.append(outputs)
                _place(values, gradients, start, size)
        for name in names:
            consume(DenseBlock(name, tuple(state[name].shape), values.pop(name)))
        return Outputs(torch.cat([f for f, _ in pieces]), torch.cat([q for _, q in pieces]))

    def _fitting(
        self, model: nn.Module, state: Mapping[str, Tensor], task: Task, batch: Any, names: Sequence[str]
    ) -> int:
        """Examples per chunk: as many as fit the budget, in chunks of about equal size."""
        size = batch_size(batch)
        if size == 1:
            return 1
        activations = self._measured.saved_bytes(model, state, task, take(batch, slice(0, 1)), names)
        # The backward pass holds gradients of activations beside them.
        each = 2 * activations
        if size * each > self.memory_budget:
            # Gradients of a chunk are copied into the batch's.
            each += sum(state[name].numel() * state[name].element_size() for name in names)
        most = max(1, self.memory_budget // max(each, 1))
        return -(-size // -(-size // most))


class _Measured:
    """What `_saved_bytes` found for one model and task, by shapes of examples: a forward pass each is worth keeping.

    Models and tasks are not kept alive, and copies start anew.
    """

    def __init__(self) -> None:
        self._of: tuple[Callable[[], Any], Callable[[], Any], dict[Any, int]] = (_nothing, _nothing, {})

    def __reduce__(self) -> tuple[type[_Measured], tuple[()]]:
        return _Measured, ()

    def saved_bytes(
        self, model: nn.Module, state: Mapping[str, Tensor], task: Task, example: Any, names: Sequence[str]
    ) -> int:
        if self._of[0]() is not model or self._of[1]() is not task:
            self._of = (ref(model), ref(task), {})
        known = self._of[2]
        leaves = tuple((leaf.shape, leaf.dtype) for leaf in flatten(example)[0])
        key = (leaves, tuple(names), state[names[0]].dtype)
        if key not in known:
            known[key] = _saved_bytes(model, state, task, example, names)
        return known[key]


def _nothing() -> None:
    """A reference to nothing."""


def _saved_bytes(
    model: nn.Module, state: Mapping[str, Tensor], task: Task, example: Any, names: Sequence[str]
) -> int:
    """What autograd keeps of the forward pass of one example, in bytes, without parameters and inputs."""
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    attributed = {name: state[name].detach().requires_grad_() for name in names}
    with (
        sdpa_kernel(SDPBackend.MATH),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        lend(model, {**state, **attributed}),
    ):
        outputs = forward(task, model, example, 1)
        given = {tensor.untyped_storage().data_ptr() for tensor in (*state.values(), *flatten(example)[0])}
        total = sum(size for pointer, size in saved.items() if pointer not in given)
        del outputs  # until here, so that no storage is used twice
    return total


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
