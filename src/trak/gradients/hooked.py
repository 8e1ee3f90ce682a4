"""Per-example gradients from one batched forward and backward pass.

Forward hooks keep each layer's inputs; the backward pass brings the gradient of its outputs; the layer's rule
(see `layers`) makes blocks of the two. Weight gradients themselves are never computed: the parameters do not
require gradients. The graph hangs on a scalar, the anchor, that a tap ties to the output of every attributed
layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from trak.batches import batch_size, flatten
from trak.errors import GradientError, InputError, TrakError, UnsupportedLayerError
from trak.gradients.base import Consume, Gradients, Outputs, forward, random_state_kept
from trak.gradients.layers import RULES, LayerCall, LayerRule
from trak.gradients.swap import LENDING, lend
from trak.tasks.base import Task


@dataclass(frozen=True)
class Hooked(Gradients):
    """Gradients by layer rules: fast, for models made of known layers.

    Rows of a layer's input belong to examples as follows. As many rows as examples, or a multiple (then
    consecutive rows belong to one example): as they are. A leading dimension of 1, no batch dimension at all,
    or position indices made in the forward pass: they serve all examples, and are expanded to one copy per
    example. Anything else is refused. `check_first_batch` verifies what comes of it.

    Attributes:
        rules: layer rules; a module is given to the first that covers any of its attributed parameters.
    """

    rules: tuple[LayerRule, ...] = field(default=RULES, repr=False)

    def candidates(self, model: nn.Module, names: Sequence[str]) -> tuple[Gradients, ...]:
        """Itself, if every parameter is covered.

        Raises:
            UnsupportedLayerError: one is not.
        """
        self._plan(model, names)
        return (self,)

    def covers(self, model: nn.Module, names: Sequence[str]) -> list[str]:
        """Those of `names` that no rule covers: an empty list says that the model can be hooked."""
        with LENDING:
            return list(self._uncovered(model, names))

    def compute(
        self,
        model: nn.Module,
        state: Mapping[str, Tensor],
        task: Task,
        batch: Any,
        names: Sequence[str],
        consume: Consume,
    ) -> Outputs:
        """Blocks in the order in which the backward pass reaches the layers; see `Gradients.compute`.

        Raises:
            UnsupportedLayerError: no rule covers a parameter.
            GradientError: a layer's input cannot be split into examples, or was overwritten after the layer
                had read it.
        """
        plan = self._plan(model, names)
        size = batch_size(batch)
        tensors = {name: tensor.detach() for name, tensor in state.items()}
        watch = _Watch(
            size, consume, {leaf.untyped_storage().data_ptr() for leaf in flatten(batch)[0]}, _device(batch)
        )
        with random_state_kept(state), lend(model, tensors), torch.enable_grad():
            with watch.on(plan):
                f, q = watch.forward(task, model, batch)
            if f.requires_grad:
                try:
                    torch.autograd.grad(f.sum(), watch.anchor, allow_unused=True)
                except CheckpointError as error:
                    raise GradientError(
                        "activation checkpointing (torch.utils.checkpoint) computes layers again without their "
                        "hooks. Switch it off, or use gradients=trak.gradients.Reference()"
                    ) from error
        return Outputs(f.detach(), q)

    def _plan(self, model: nn.Module, names: Sequence[str]) -> list[_Layer]:
        with LENDING:
            uncovered, layers = self._uncovered(model, names), list(self._layers(model, names))
        if uncovered:
            name, module = next(iter(uncovered.items()))
            more = f" (and {len(uncovered) - 1} more)" if len(uncovered) > 1 else ""
            raise UnsupportedLayerError(
                f"no layer rule covers parameter {name!r} of {type(module).__name__}{more}. Use "
                "gradients=trak.gradients.Functional(), which takes any layer; or leave the parameter out "
                "with parameters=...; or write a rule and pass Hooked(rules=(MyRule(), *RULES))"
            )
        return layers

    def _uncovered(self, model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
        """Canonical names of parameters that some module holds and no rule covers, with that module."""
        uncovered: dict[str, nn.Module] = {}
        for _, module, local_names in _holders(model, names):
            rule = _rule_for(self.rules, module, local_names)
            covered = rule.covers(module) if rule else frozenset()
            uncovered |= {name: module for local, name in local_names.items() if local not in covered}
        return uncovered

    def _layers(self, model: nn.Module, names: Sequence[str]) -> Iterator[_Layer]:
        for module_name, module, local_names in _holders(model, names):
            rule = _rule_for(self.rules, module, local_names)
            if rule is not None:
                yield _Layer(module_name, module, rule, local_names)


@dataclass(frozen=True, eq=False)
class _Layer:
    """A module to hook: its name, and its attributed parameters (local to canonical name)."""

    name: str
    module: nn.Module
    rule: LayerRule
    names: Mapping[str, str]


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
        if gradient is not None:
            record(gradient)
        return gradient, None, None


class _Watch:
    """One forward and backward pass under hooks."""

    def __init__(self, size: int, consume: Consume, storages: set[int], device: torch.device) -> None:
        self.size, self.consume, self.storages = size, consume, storages
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.expanded: list[str] = []

    @contextmanager
    def on(self, plan: Sequence[_Layer]) -> Iterator[None]:
        """Hooks on the layers, for the length of a forward pass."""
        with ExitStack() as hooks:
            for layer in plan:
                before = layer.module.register_forward_pre_hook(self._before(layer), with_kwargs=True)
                hooks.callback(before.remove)
                # First of all hooks, so that it sees the layer's own output and not what others make of it.
                after = layer.module.register_forward_hook(self._after(layer), with_kwargs=True, prepend=True)
                hooks.callback(after.remove)
            yield

    def forward(self, task: Task, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """The task's f and q. Errors that an expanded input may have caused say so."""
        try:
            return forward(task, model, batch, self.size)
        except Exception as error:
            # Not even a task's complaint about shapes is the user's fault where they come of the expansion.
            if not self.expanded or (isinstance(error, TrakError) and not isinstance(error, InputError)):
                raise
            raise GradientError(
                f"the forward pass failed after the input of {self.expanded[0]!r}, which has no batch "
                f"dimension, was expanded to one copy per example ({type(error).__name__}: {error}). Use "
                "gradients=trak.gradients.Functional()"
            ) from error

    def _before(self, layer: _Layer) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            inputs = _first(layer, args, kwargs)
            if self.size == 1 or not torch.is_grad_enabled() or not self._is_shared(layer, inputs):
                return None
            self.expanded.append(layer.name)
            has_batch = inputs.ndim > max(layer.rule.event_ndim(module), 1)
            rows = inputs if has_batch else inputs.unsqueeze(0)
            return _with_first(args, kwargs, rows.expand(self.size, *rows.shape[1:]))

        return hook

    def _is_shared(self, layer: _Layer, inputs: Tensor) -> bool:
        """Whether this input has no batch dimension and serves all examples.

        Decided without looking at sizes other than 1, so that no batch can be mistaken by coincidence: a
        one-dimensional tensor of indices is one per example if it is a part of the batch, else positions made
        in the forward pass.
        """
        if inputs.ndim <= layer.rule.event_ndim(layer.module) or inputs.shape[0] == 1:
            return True
        indices = inputs.ndim == 1 and not inputs.is_floating_point()
        return indices and inputs.untyped_storage().data_ptr() not in self.storages

    def _after(self, layer: _Layer) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            if not torch.is_grad_enabled():
                return None
            inputs = _first(layer, args, kwargs).detach()
            if self.size > 1 and inputs.shape[0] % self.size:
                raise GradientError(
                    f"layer {layer.name!r} ({type(module).__name__}) is given {list(inputs.shape)} in a "
                    f"batch of {self.size} examples: its first dimension is not the batch's. Use "
                    "gradients=trak.gradients.Functional()"
                )
            tapped = output
            if tapped._is_view():
                # In-place operations on a differentiable view would bypass or burden the tap; this one is no
                # view to autograd.
                tapped = torch.ops.aten._unsafe_view(tapped, tapped.shape)
            return _Tap.apply(tapped, self.anchor, self._recorder(layer, inputs))

        return hook

    def _recorder(self, layer: _Layer, inputs: Tensor) -> Any:
        version = inputs._version

        def record(gradient: Tensor) -> None:
            if inputs._version != version:
                raise GradientError(
                    f"the input of layer {layer.name!r} ({type(layer.module).__name__}) was modified in "
                    "place after the layer had read it, so that its gradient cannot be computed. Avoid "
                    "in-place operations (x += y, inplace=True) on it"
                )
            dtype = getattr(layer.module, next(iter(layer.names))).dtype
            # Under autocast a layer may be given another dtype than that of its parameters.
            rows = inputs.to(dtype) if inputs.is_floating_point() else inputs
            call = LayerCall(layer.module, rows, gradient.to(dtype), layer.names, self.size)
            for block in layer.rule.blocks(call):
                self.consume(block)

        return record


def _holders(model: nn.Module, names: Sequence[str]) -> Iterator[tuple[str, nn.Module, dict[str, str]]]:
    """Modules that hold attributed parameters themselves: (name, module, local to canonical name)."""
    wanted = set(names)
    canonical = {id(parameter): name for name, parameter in model.named_parameters() if name in wanted}
    for module_name, module in model.named_modules():
        local_names = {
            local: canonical[id(parameter)]
            for local, parameter in module._parameters.items()
            if parameter is not None and id(parameter) in canonical
        }
        if local_names:
            yield module_name, module, local_names


def _rule_for(
    rules: Sequence[LayerRule], module: nn.Module, local_names: Mapping[str, str]
) -> LayerRule | None:
    return next((rule for rule in rules if rule.covers(module) & local_names.keys()), None)


def _first(layer: _Layer, args: tuple, kwargs: dict) -> Tensor:
    """The layer's input: its first argument, by position or by name."""
    values = [*args, *kwargs.values()]
    if not values or not isinstance(values[0], Tensor):
        raise GradientError(
            f"layer {layer.name!r} ({type(layer.module).__name__}) is called without a tensor for its first "
            "argument. Use gradients=trak.gradients.Functional()"
        )
    return values[0]


def _with_first(args: tuple, kwargs: dict, inputs: Tensor) -> tuple[tuple, dict]:
    if args:
        return (inputs, *args[1:]), kwargs
    first = next(iter(kwargs))
    return args, {**kwargs, first: inputs}


def _device(batch: Any) -> torch.device:
    return flatten(batch)[0][0].device
