"""Refusals shared by the kinds: configurations, states and blocks that cannot be."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from trak.blocks import Block, DenseBlock, IndexBlock, OuterBlock, field_names
from trak.errors import ProjectionError
from trak.projection.base import Projection, ProjectionState, Shapes


def check_integer(what: str, value: Any, *, at_least: int | None = None, at_most: int | None = None) -> None:
    """Raise ProjectionError unless `value` is a Python int within the bounds."""
    bounds = [f"at least {at_least}"] * (at_least is not None) + [f"at most {at_most}"] * (
        at_most is not None
    )
    expected = " of ".join(["an int", " and ".join(bounds)]) if bounds else "an int"
    if not isinstance(value, int) or isinstance(value, bool):
        raise ProjectionError(f"{what} must be {expected}, got {value!r} ({type(value).__name__})")
    if (at_least is not None and value < at_least) or (at_most is not None and value > at_most):
        raise ProjectionError(f"{what} must be {expected}, got {value}")


def check_cache_bytes(value: Any) -> None:
    """Raise ProjectionError unless `value` is a number of bytes."""
    check_integer("cache_bytes (0 draws everything afresh for every batch)", value, at_least=0)


def check_state_options(checkpoint: Any, dtype: torch.dtype) -> None:
    """Raise ProjectionError unless the checkpoint is an int and the dtype one in which sums are kept."""
    check_integer("checkpoint", checkpoint, at_least=0)
    if dtype not in (torch.float32, torch.float64):
        raise ProjectionError(
            f"features are summed in torch.float32 or torch.float64, got {dtype}; half-precision gradients "
            "are welcome (raised when they are added), and features may be stored in half precision later"
        )


def resolve_device(device: torch.device | str) -> torch.device:
    """The device with its index, as tensors on it report it ("cuda" becomes "cuda:0")."""
    return torch.empty(0, device=device).device


def check_name(shapes: Shapes, name: str) -> None:
    """Raise ProjectionError unless the parameter was named when the state was drawn."""
    if name not in shapes:
        known = ", ".join(list(shapes)[:5]) + (", ..." if len(shapes) > 5 else "")
        raise ProjectionError(
            f"unknown parameter {name!r}: this projection was drawn for {len(shapes)} parameters ({known}); "
            "name it in the shapes given to init()"
        )


def check_add(state: ProjectionState, block: Block, out_BK: Tensor) -> None:
    """Raise ProjectionError unless this state projects `block`, and `out_BK` can receive it."""
    check_name(state.shapes, block.name)
    expected = tuple(state.shapes[block.name])
    if tuple(block.shape) != expected:
        raise ProjectionError(
            f"block of parameter {block.name!r} has shape {tuple(block.shape)}, expected {expected} "
            "as given to init()"
        )
    for field in field_names(type(block)):
        tensor = getattr(block, field)
        if isinstance(tensor, Tensor) and tensor.device != state.device:
            raise ProjectionError(
                f"{field} of block {block.name!r} is on {tensor.device}, the projection is on "
                f"{state.device}; "
                "draw the projection on the device of the gradients: init(..., device=...)"
            )
    _check_tensors(block)
    if tuple(out_BK.shape) != (block.batch_size, state.dim):
        raise ProjectionError(
            f"out has shape {tuple(out_BK.shape)}, expected {(block.batch_size, state.dim)}: examples "
            f"of block {block.name!r} by columns; make it with state.zeros({block.batch_size})"
        )
    if out_BK.dtype != state.dtype or out_BK.device != state.device:
        raise ProjectionError(
            f"out is {out_BK.dtype} on {out_BK.device}, expected {state.dtype} on {state.device}; "
            f"make it with state.zeros({block.batch_size})"
        )


def _check_tensors(block: Block) -> None:
    """The shapes of a block's own tensors: a wrong one would otherwise be broadcast or cut silently."""
    rows, columns = block.matrix_shape
    if isinstance(block, DenseBlock):
        good = (
            tuple(block.values.shape[1:]) == tuple(block.shape) and block.values.dim() == len(block.shape) + 1
        )
        got, expected = f"values {tuple(block.values.shape)}", f"[B, {', '.join(map(str, block.shape))}]"
    elif isinstance(block, OuterBlock):
        left, right = block.left.shape, block.right.shape
        good = len(left) == len(right) == 4 and left[:3] == right[:3]
        good = good and left[1] * left[3] == rows and right[3] == columns
        got = f"left {tuple(left)} and right {tuple(right)}"
        expected = f"[B, G, T, {rows} / G] and [B, G, T, {columns}]"
    elif isinstance(block, IndexBlock):
        values = block.values.shape
        good = len(values) == 3 and block.indices.shape == values[:2] and values[2] == columns
        got = f"indices {tuple(block.indices.shape)} and values {tuple(values)}"
        expected = f"[B, T] and [B, T, {columns}]"
    else:
        return
    if not good:
        raise ProjectionError(
            f"tensors of block {block.name!r} do not fit its shape {tuple(block.shape)}: got {got}, "
            f"expected {expected}"
        )


State = TypeVar("State", bound=ProjectionState)


def require_state(projection: Projection, state: ProjectionState, expected: type[State]) -> State:
    """The state as `expected`, or ProjectionError if another kind of projection made it."""
    if not isinstance(state, expected):
        raise ProjectionError(
            f"{projection!r} got a {type(state).__name__}, expected the {expected.__name__} "
            "that its own init() returns"
        )
    return state
