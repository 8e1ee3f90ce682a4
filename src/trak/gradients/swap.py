"""Lend a checkpoint's tensors to the user's module, and take them back."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from trak.errors import CheckpointError, GradientError
from trak.gradients.wrappers import functions_uncompiled, named_buffers, named_parameters, run_uncompiled

LENDING = threading.RLock()
"""Held while a model is lent tensors, and while its own are looked at: threads may share a model."""


@contextmanager
def lend(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """The model with `state` in place of its own tensors, in eval mode; all is put back on the way out.

    Tensors are swapped by canonical name; one that is registered under several names is swapped under all of
    them. Nothing is copied, so tensors of `torch.func` transforms may be lent too. Whatever the forward pass
    assigns to a module's attributes meanwhile (caches, counters, replaced buffers), or puts into dictionaries, lists and
    sets among them, is undone as well. What was
    compiled (`torch.compile`, `module.compile()`) runs uncompiled, since compiled code calls no hooks.

    Args:
        model: the user's module.
        state: every parameter by canonical name, and those buffers that are to be swapped.

    Raises:
        CheckpointError: a parameter is missing in `state`.
        GradientError: the model is a TorchScript module, whose tensors cannot be swapped.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise GradientError(
            "a TorchScript module's parameters cannot be exchanged; pass the Python module it was made from"
        )
    with LENDING, functions_uncompiled():
        yield from _lent(model, state)


def _lent(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """What `lend` does while no other thread lends."""
    names = {id(tensor): name for name, tensor in _named_tensors(model)}
    missing = [name for name, _ in named_parameters(model) if name not in state]
    if missing:
        raise CheckpointError(
            f"{len(missing)} parameters of the model are not in the state lent to it, first {missing[0]!r}; "
            "build the state with trak.gradients.model_state(model, checkpoint, device)"
        )
    kept = [
        (module, dict(vars(module)), dict(module._parameters), dict(module._buffers))
        for module in model.modules()
    ]
    containers = [contents for module in model.modules() for contents in _own_containers(module)]
    # In eval mode attention would skip its submodules, hooks and all, wherever its own weights require no
    # gradients.
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for module, _, parameters, buffers in kept:
            for slots, own in ((module._parameters, parameters), (module._buffers, buffers)):
                for key, tensor in own.items():
                    if tensor is None or names[id(tensor)] not in state:
                        continue
                    lent = state[names[id(tensor)]]
                    # The model's own quantised weight stays the object that it is: layers read more from it than its numbers.
                    if tensor.is_floating_point() or lent.data_ptr() != tensor.data_ptr():
                        slots[key] = lent  # type: ignore[assignment]
            if isinstance(module, nn.RNNBase):
                # Recurrent modules read their weights through this second list.
                module._flat_weights = [module._parameters.get(name) for name in module._flat_weights_names]
            run_uncompiled(module)
            # Not `model.eval()`: a module may override it, and e.g. merge adapters into its weights.
            module.training = False
        yield model
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)
        for module, attributes, parameters, buffers in kept:
            vars(module).clear()
            vars(module).update(attributes)
            _refill(module._parameters, parameters)
            _refill(module._buffers, buffers)
        for container, contents in containers:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(contents)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under their canonical names."""
    yield from named_parameters(model)
    yield from named_buffers(model)


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _own_containers(module: nn.Module) -> Iterator[tuple[Any, Any]]:
    """A module's attributes that hold other things, and what they hold: some models keep tensors there from pass to pass."""
    for name, value in vars(module).items():
        if name not in _OF_EVERY_MODULE and isinstance(value, dict | list | set):
            yield value, copy(value)


def _refill(slots: dict, own: dict) -> None:
    slots.clear()
    slots.update(own)
