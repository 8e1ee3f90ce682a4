"""Batches of any shape: take apart, put together, count, slice, move.

A batch is any nesting of tuples, lists, named tuples, mappings (Hugging Face's `BatchEncoding` among them) and dataclasses
whose leaves are tensors with the examples along dimension 0. Other leaves (strings, numbers, None) are carried along; a list
or NumPy array of B things counts as B per-example values only when it is converted to a tensor first.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trak.errors import InputError

Rebuild = Callable[[Sequence[Tensor]], Any]


def flatten(batch: Any) -> tuple[list[Tensor], Rebuild]:
    """Tensor leaves in a fixed order, and the function that puts as many tensors back in their places.

    Mappings keep their own order. Leaves that are no tensors are kept as they are.
    """
    leaves: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        leaves.append(tensor)
        return tensor

    _map(batch, collect)

    def rebuild(tensors: Sequence[Tensor]) -> Any:
        if len(tensors) != len(leaves):
            raise InputError(f"a batch of {len(leaves)} tensors cannot be rebuilt from {len(tensors)}")
        replacements = iter(tensors)
        return _map(batch, lambda _: next(replacements))

    return leaves, rebuild


def batch_size(batch: Any) -> int:
    """Number of examples B.

    Raises:
        InputError: no tensor in the batch, a tensor without dimensions, or tensors of different lengths.
    """
    leaves, _ = flatten(batch)
    if not leaves:
        raise InputError(
            f"a batch must hold at least one tensor with the examples along dimension 0; got {describe(batch)}. "
            "Convert arrays and lists with torch.as_tensor, or give the data loader a collate_fn that does"
        )
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in leaves}
    if len(sizes) > 1 or None in sizes:
        raise InputError(
            "all tensors of a batch must have the same number of examples along dimension 0; "
            f"got shapes {[tuple(leaf.shape) for leaf in leaves]}"
        )
    return leaves[0].shape[0]


def take(batch: Any, rows: slice | Tensor) -> Any:
    """The batch's examples `rows`: a slice (views) or a tensor of positions (copies)."""
    return _map(batch, lambda tensor: tensor[rows if isinstance(rows, slice) else rows.to(tensor.device)])


def joined(pieces: Sequence[Any]) -> Any:
    """Batches of one structure as one, their examples in this order; what is no tensor is the first one's."""
    if len(pieces) == 1:
        return pieces[0]
    _, rebuild = flatten(pieces[0])
    return rebuild([torch.cat(leaves) for leaves in zip(*(flatten(piece)[0] for piece in pieces))])


def move(batch: Any, device: torch.device | str) -> Any:
    """The batch with its tensors on `device`; unchanged tensors are not copied."""
    # What a GPU copies to the CPU is there only once somebody waited for it.
    ahead = torch.device(device).type != "cpu"
    return _map(batch, lambda tensor: tensor.to(device, non_blocking=ahead))


def on_host(values: Any) -> Any:
    """A tensor, or a list or tuple of some, on the CPU and without gradients; anything else as it is: for `numpy.asarray`."""
    if isinstance(values, Tensor):
        return values.detach().cpu()
    if isinstance(values, (list, tuple)) and any(isinstance(value, Tensor) for value in values):
        return [on_host(value) for value in values]
    return values


def cast(batch: Any, dtype: torch.dtype) -> Any:
    """The batch with its floating-point tensors in `dtype`; integers and booleans stay."""
    return _map(batch, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def describe(batch: Any) -> str:
    """Structure, shapes and dtypes in one line, for messages."""
    if isinstance(batch, Tensor):
        return f"Tensor{list(batch.shape)} {str(batch.dtype).removeprefix('torch.')}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key!r}: {describe(value)}" for key, value in batch.items()) + "}"
    if isinstance(batch, (tuple, list)):
        inner = ", ".join(describe(value) for value in batch[:8]) + (", …" if len(batch) > 8 else "")
        return f"({inner})" if isinstance(batch, tuple) else f"[{inner}]"
    return type(batch).__name__


def _map(batch: Any, leaf: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(batch, Tensor):
        return leaf(batch)
    if isinstance(batch, Mapping):
        return _map_mapping(batch, leaf)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_map(value, leaf) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(_map(value, leaf) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        changed = copy.copy(batch)
        for field in dataclasses.fields(batch):
            object.__setattr__(changed, field.name, _map(getattr(batch, field.name), leaf))
        return changed
    return batch


def _map_mapping(batch: Mapping[Any, Any], leaf: Callable[[Tensor], Tensor]) -> Any:
    items = {key: _map(value, leaf) for key, value in batch.items()}
    if type(batch) is dict:
        return items
    if hasattr(batch, "data") and isinstance(batch.data, dict):
        # UserDict and its kin (Hugging Face's BatchEncoding): keep the type and whatever else it carries.
        changed = copy.copy(batch)
        object.__setattr__(changed, "data", items)
        return changed
    try:
        return type(batch)(items)  # type: ignore[call-arg]
    except TypeError:
        return items
