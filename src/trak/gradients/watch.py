"""Hooks on layers for the length of one forward pass, and what they make of the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trak.errors import InputError, TrakError
from trak.gradients.base import BlamedError, Consume, forward
from trak.gradients.layers import LayerCall, LayerRule
from trak.gradients.owners import Owners
from trak.tasks.base import Task


@dataclass(frozen=True, eq=False)
class Layer:
    """A module to hook: its name, and its attributed parameters (local to canonical name).

    `routed`: whether each row of its input may be of another example (see `trak.gradients.owners`).
    """

    name: str
    module: nn.Module
    rule: LayerRule
    names: Mapping[str, str]
    routed: bool = False


@dataclass(frozen=True, eq=False)
class Stepped:
    """A module to be computed in steps (attention, experts): a forward that calls modules, and those of them to hook."""

    module: nn.Module
    forward: Callable[..., Any]
    layers: Sequence[Layer]


class _Tap(torch.autograd.Function):
    """Identity on a layer's output, in place.

    Hands its gradient to `record` when the backward pass comes by.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, record: Any) -> Tensor:
        ctx.record = record
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, None, None]:
        record, ctx.record = ctx.record, None
        (gradient,) = gradients
        # None in the later passes that sort rows by example.
        if gradient is not None and record is not None:
            record(gradient)
        return gradient, None, None


class Watch:
    """One forward and backward pass under hooks."""

    def __init__(self, size: int, consume: Consume, storages: set[int], device: torch.device) -> None:
        self.size, self.consume, self.storages = size, consume, storages
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.expanded: list[str] = []
        self.blamed: list[str] = []
        self.owners = Owners(size, device)

    @contextmanager
    def on(self, plan: Sequence[Layer]) -> Iterator[None]:
        """Hooks on the layers, for the length of a forward pass."""
        with ExitStack() as hooks:
            for layer in plan:
                before = layer.module.register_forward_pre_hook(self._before(layer), with_kwargs=True)
                hooks.callback(before.remove)
                # First of all hooks, so that it sees the layer's own output and not what others make of it.
                after = layer.module.register_forward_hook(self._after(layer), with_kwargs=True, prepend=True)
                hooks.callback(after.remove)
            yield

    @contextmanager
    def stepping(self, stepped: Sequence[Stepped]) -> Iterator[None]:
        """Modules computed in steps, with hooks on the parts, for the length of a forward pass."""
        with ExitStack() as undo:
            for each in stepped:
                undo.enter_context(self.on(each.layers))
                vars(each.module)["forward"] = each.forward
                undo.callback(vars(each.module).pop, "forward", None)
            yield

    def forward(self, task: Task, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """The task's f and q. Errors that an expanded input may have caused say so."""
        try:
            return forward(task, model, batch, self.size)
        except Exception as error:
            # Not even a task's complaint about shapes is the user's fault where they come of the expansion.
            if not self.blamed or (isinstance(error, TrakError) and not isinstance(error, InputError)):
                raise
            what = f"the input of {self.expanded[0]!r}" if self.expanded else repr(self.blamed[0])
            raise BlamedError(
                f"the forward pass failed after {what}, which has no batch "
                f"dimension, was expanded to one copy per example ({type(error).__name__}: {error}). Use "
                "gradients=trak.gradients.Functional()",
                self.blamed,
            ) from error

    def _before(self, layer: Layer) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            inputs = _first(layer, args, kwargs)
            if (
                self.size == 1
                or layer.routed
                or not torch.is_grad_enabled()
                or not self._is_shared(layer, inputs)
            ):
                return None
            self.expanded.append(layer.name)
            self.blamed.extend(layer.names.values())
            has_batch = inputs.ndim > max(layer.rule.event_ndim(module), 1)
            rows = inputs if has_batch else inputs.unsqueeze(0)
            return _with_first(args, kwargs, rows.expand(self.size, *rows.shape[1:]))

        return hook

    def _is_shared(self, layer: Layer, inputs: Tensor) -> bool:
        """Whether this input has no batch dimension and serves all examples.

        Decided without looking at sizes other than 1, so that no batch can be mistaken by coincidence: a
        one-dimensional tensor of indices is one per example if it is a part of the batch, else positions made
        in the forward pass.
        """
        if inputs.ndim <= layer.rule.event_ndim(layer.module) or inputs.shape[0] == 1:
            return True
        indices = inputs.ndim == 1 and not inputs.is_floating_point()
        return indices and inputs.untyped_storage().data_ptr() not in self.storages

    def _after(self, layer: Layer) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            if not torch.is_grad_enabled():
                return None
            inputs = _first(layer, args, kwargs).detach()
            routed = layer.routed and self.size > 1
            if self.size > 1 and not routed and inputs.shape[0] % self.size:
                raise BlamedError(
                    f"layer {layer.name!r} ({type(module).__name__}) is given {list(inputs.shape)} in a "
                    f"batch of {self.size} examples: its first dimension is not the batch's. Use "
                    "gradients=trak.gradients.Functional()",
                    tuple(layer.names.values()),
                )
            others = tuple(value for value in args[1:] if isinstance(value, Tensor))
            tapped = output
            if tapped._is_view():
                # In-place operations on a differentiable view would bypass or burden the tap; this one is no
                # view to autograd.
                tapped = torch.ops.aten._unsafe_view(tapped, tapped.shape)
            if routed:
                return self.owners.tap(layer.name, module, layer.rule, layer.names, inputs, others, tapped)
            return _Tap.apply(tapped, self.anchor, self._recorder(layer, inputs, others))

        return hook

    def _recorder(self, layer: Layer, inputs: Tensor, others: tuple[Tensor, ...]) -> Any:
        version = inputs._version

        def record(gradient: Tensor) -> None:
            if inputs._version != version:
                raise BlamedError(
                    f"the input of layer {layer.name!r} ({type(layer.module).__name__}) was modified in "
                    "place after the layer had read it, so that its gradient cannot be computed. Avoid "
                    "in-place operations (x += y, inplace=True) on it",
                    tuple(layer.names.values()),
                )
            call = LayerCall(layer.module, inputs, gradient, layer.names, self.size, others)
            # Under autocast a layer may be given another dtype than that of its parameters.
            if not layer.rule.multiplies_as_given:
                call = call.raised()
            for block in layer.rule.blocks(call):
                self.consume(block)

        return record


def _first(layer: Layer, args: tuple, kwargs: dict) -> Tensor:
    """The layer's input: its first argument, by position or by name."""
    values = [*args, *kwargs.values()]
    if not values or not isinstance(values[0], Tensor):
        raise BlamedError(
            f"layer {layer.name!r} ({type(layer.module).__name__}) is called without a tensor for its first "
            "argument. Use gradients=trak.gradients.Functional()",
            tuple(layer.names.values()),
        )
    return values[0]


def _with_first(args: tuple, kwargs: dict, inputs: Tensor) -> tuple[tuple, dict]:
    if args:
        return (inputs, *args[1:]), kwargs
    first = next(iter(kwargs))
    return args, {**kwargs, first: inputs}
