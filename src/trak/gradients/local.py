"""Per-example gradients of single modules, by a local pass: for parameters that no layer rule covers.

During the batched forward pass a module's inputs are kept; the backward pass brings the gradients of its outputs.
Afterwards the module alone is run again, one example at a time under vmap, and pulled back to its own
parameters: g_b = (∂outputs_b/∂θ)ᵀ ∇outputs_b. That is one pass through one module, not through the model.

Which dimension of each tensor belongs to the examples is not guessed from sizes: a batch of another size (one
example; or, where that is treated differently, one more) is sent through the model, and the dimension that
changes in proportion is the one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from trak.batches import flatten
from trak.blocks import DenseBlock
from trak.errors import TrakError
from trak.gradients.alone import laid_out
from trak.gradients.base import BlamedError, Consume

Slots = Mapping[str, tuple[nn.Module, str]]
"""Path of a parameter to the module that holds it and its local name there."""


Shapes = tuple[list[torch.Size], list[torch.Size]]
"""Of the inputs and of the floating-point outputs of a call."""


@dataclass(frozen=True)
class Local:
    """A module whose parameters are attributed by a local pass.

    Attributes:
        module: its name in the model, "" for the model itself.
        slots: (path, canonical name) of the parameters, which lie in the module or below it. Uses of the same
            tensor under other paths are others' business.
        one_by_one: examples in a loop rather than under vmap, for modules with operations that vmap cannot do
            (experts that pick their tokens, branches on values).
    """

    module: str
    slots: tuple[tuple[str, str], ...]
    one_by_one: bool = False

    @property
    def parameters(self) -> tuple[str, ...]:
        """Canonical names."""
        return tuple(dict.fromkeys(name for _, name in self.slots))


@dataclass(eq=False)
class Call:
    """One call of such a module: what went in, what came out, and the gradients of that.

    Attributes:
        arguments: (args, kwargs), detached.
        versions: of the tensors in them: to notice that one was overwritten.
        outputs: shapes of the outputs that gradients can flow to.
        gradients: of these outputs, None where none came; empty before the backward pass.
        autocast: (enabled, dtype) at the time.
    """

    arguments: Any
    versions: list[int]
    outputs: list[torch.Size]
    gradients: Sequence[Tensor | None]
    autocast: tuple[str, bool, torch.dtype]


class OutputsTap(torch.autograd.Function):
    """Identity on all outputs of a module, in place; keeps their gradients in `call`."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, call: Call, *outputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs as they are."""
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(*outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Their gradients as they are."""
        # Later backward passes, which sort rows by example, are others' business.
        ctx.call.gradients = ctx.call.gradients or gradients
        return (None, None, *gradients)


class LocalWatch:
    """The calls of some modules within one forward pass, and the local passes after the backward pass.

    `blamed` receives the parameters of modules whose output was expanded to one copy per example: should the forward
    pass fail after that, it is the reason.
    """

    def __init__(self, model: nn.Module, locals_: Sequence[Local], size: int, blamed: list[str]) -> None:
        self.size, self.blamed = size, blamed
        self.locals = [(local, model.get_submodule(local.module)) for local in locals_]
        self.slots: Slots = {path: _slot(model, path) for local in locals_ for path, _ in local.slots}
        self.calls: list[list[Call]] = [[] for _ in locals_]
        self.shapes: list[list[Shapes]] = [[] for _ in locals_]
        self.probed = size

    @contextmanager
    def probing(self, size: int) -> Iterator[None]:
        """Hooks that note the shapes of tensors, for the forward pass of a batch of another size."""
        self.probed, self.shapes = size, [[] for _ in self.locals]
        with ExitStack() as hooks:
            for (_, module), shapes in zip(self.locals, self.shapes):
                hooks.callback(
                    module.register_forward_hook(
                        _probe_into(shapes, size), with_kwargs=True, prepend=True
                    ).remove
                )
            yield

    @contextmanager
    def watching(self, anchor: Tensor) -> Iterator[None]:
        """Hooks that keep inputs and tap outputs, for the forward pass of the batch."""
        with ExitStack() as hooks:
            for (local, module), calls in zip(self.locals, self.calls):
                pending: list[tuple[list[Tensor], list[int]]] = []
                before, after = self._hooks(local, calls, pending, anchor)
                hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(after, with_kwargs=True, prepend=True).remove)
            yield

    def _hooks(
        self, local: Local, calls: list[Call], pending: list[Any], anchor: Tensor
    ) -> tuple[Callable[..., None], Callable[..., Any]]:
        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            leaves, rebuild = flatten((args, kwargs))
            pending.append((rebuild([leaf.detach() for leaf in leaves]), [leaf._version for leaf in leaves]))

        def after(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            arguments, versions = pending.pop()
            if not torch.is_grad_enabled():
                return None
            _require_unchanged(local, module, flatten(arguments)[0], versions)
            leaves, rebuild = flatten(output)
            positions = [i for i, leaf in enumerate(leaves) if leaf.is_floating_point()]
            if not positions:
                return None
            ready = [_tappable(_one_per_example(leaves[i], self.size)) for i in positions]
            if any(now.shape != leaves[i].shape for now, i in zip(ready, positions)):
                self.blamed.extend(local.parameters)
            kind = ready[0].device.type
            autocast = (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            call = Call(arguments, versions, [leaf.shape for leaf in ready], (), autocast)
            calls.append(call)
            for i, tapped in zip(positions, OutputsTap.apply(anchor, call, *ready)):
                leaves[i] = tapped
            return rebuild(leaves)

        return before, after

    def forget(self, names: Sequence[str]) -> None:
        """No local pass where only these parameters are wanted: they are not used."""
        for (local, _), calls in zip(self.locals, self.calls):
            if set(local.parameters) <= set(names):
                for call in calls:
                    call.gradients = [None] * len(call.outputs)

    def fits(self) -> bool:
        """Whether the calls of the probing pass and of the batch's correspond."""
        return all(
            len(calls) == len(shapes)
            and all(
                _axes(now, then, self.size, self.probed) is not None
                for call, pair in zip(calls, shapes)
                for now, then in zip(_shapes_with_gradients(call), _narrowed(pair, call))
            )
            for calls, shapes in zip(self.calls, self.shapes)
        )

    def pull_back(self, consume: Consume) -> None:
        """The local passes: dense blocks [B, *shape], one per parameter and call.

        Raises:
            BlamedError: tensors cannot be split into examples, or the module cannot be run by itself.
        """
        for index, (local, module) in enumerate(self.locals):
            calls, self.calls[index] = self.calls[index], []
            if self.size > 1 and len(calls) != len(self.shapes[index]):
                raise _refusal(
                    local,
                    module,
                    f"is called {len(calls)} times for {self.size} examples and {len(self.shapes[index])} times for "
                    f"{self.probed}",
                )
            for number, call in enumerate(calls):
                if any(gradient is not None for gradient in call.gradients):
                    shapes = self.shapes[index][number] if self.size > 1 else None
                    self._pull_back(local, module, call, shapes, consume)
                calls[number] = None  # type: ignore[call-overload]

    def _pull_back(
        self,
        local: Local,
        module: nn.Module,
        call: Call,
        shapes: Shapes | None,
        consume: Consume,
    ) -> None:
        inputs, rebuild = flatten(call.arguments)
        _require_unchanged(local, module, inputs, call.versions)
        positions = [i for i, gradient in enumerate(call.gradients) if gradient is not None]
        gradients = [gradient for gradient in call.gradients if gradient is not None]
        own = {path: getattr(*self.slots[path]).detach() for path, _ in local.slots}

        def one_example(inputs: list[Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
            def run(parameters: Mapping[str, Tensor]) -> list[Tensor]:
                args, kwargs = rebuild(inputs)
                with _replaced(module, self.slots, parameters), laid_out(1):
                    leaves = flatten(module.forward(*args, **kwargs))[0]
                outputs = [leaf for leaf in leaves if leaf.is_floating_point()]
                return [outputs[i] for i in positions]

            outputs, pullback, *_ = vjp(run, own)
            return pullback([g.to(y.dtype).reshape(y.shape) for g, y in zip(gradients, outputs)])[0]

        kind, enabled, dtype = call.autocast
        try:
            with (
                sdpa_kernel(SDPBackend.MATH),
                torch.autocast(kind, enabled=enabled, dtype=dtype),
                warnings.catch_warnings(),
            ):
                # Where vmap falls back to a loop within one operation, that is still fast enough for one module.
                warnings.filterwarnings("ignore", message="There is a performance drop")
                if shapes is None:
                    values = {path: v.unsqueeze(0) for path, v in one_example(inputs, gradients).items()}
                else:
                    values = self._by_example(local, module, one_example, call, shapes, inputs, gradients)
        except TrakError:
            raise
        except Exception as error:  # a user's module may raise anything
            first = str(error).strip().split("\n")[0][:200]
            raise _refusal(
                local,
                module,
                f"cannot be run one example at a time: {type(error).__name__}: {first}",
                under_vmap=not local.one_by_one and shapes is not None,
            ) from error
        for path, name in local.slots:
            consume(DenseBlock(name, tuple(own[path].shape), values.pop(path)))

    def _by_example(
        self,
        local: Local,
        module: nn.Module,
        one_example: Callable[..., dict[str, Tensor]],
        call: Call,
        shapes: Shapes,
        inputs: list[Tensor],
        gradients: list[Tensor],
    ) -> dict[str, Tensor]:
        """`one_example` over all of them, [B, *shape] each."""
        now, then = _shapes_with_gradients(call), _narrowed(shapes, call)
        input_axes, output_axes = (_axes(*pair, self.size, self.probed) for pair in zip(now, then))
        if input_axes is None or output_axes is None or None in output_axes:
            raise _refusal(
                local,
                module,
                f"deals with tensors of shapes {_text(now)} for {self.size} examples and {_text(then)} for "
                f"{self.probed}, which cannot be split into examples",
            )
        inputs = [self._split(leaf, axis) for leaf, axis in zip(inputs, input_axes)]
        gradients = [self._split(leaf, axis) for leaf, axis in zip(gradients, output_axes)]
        if not local.one_by_one:
            return vmap(one_example, in_dims=(input_axes, output_axes))(inputs, gradients)
        rows = [
            one_example(
                [leaf if axis is None else leaf.select(axis, row) for leaf, axis in zip(inputs, input_axes)],
                [leaf.select(axis, row) for leaf, axis in zip(gradients, output_axes)],  # type: ignore[arg-type]
            )
            for row in range(self.size)
        ]
        return {path: torch.stack([row[path] for row in rows]) for path in rows[0]}

    def _split(self, leaf: Tensor, axis: int | None) -> Tensor:
        """The examples' dimension apart from the rows of each example, which stay as a batch of one."""
        return leaf if axis is None else leaf.unflatten(axis, (self.size, -1))


def _axes(
    now: Sequence[torch.Size], then: Sequence[torch.Size], size: int, probed: int
) -> list[int | None] | None:
    """Which dimension of each tensor belongs to the examples; None for one that serves all of them.

    None instead of a list where that cannot be told.

    Args:
        now: shapes in a batch of `size` examples.
        then: shapes of the same tensors in a batch of `probed` examples.
        size: B.
        probed: another number of examples.
    """
    if len(now) != len(then):
        return None
    axes: list[int | None] = []
    for many, few in zip(now, then):
        differ = [i for i, (m, o) in enumerate(zip(many, few)) if m != o]
        if len(many) != len(few) or len(differ) > 1:
            return None
        axes.append(differ[0] if differ else None)
        if differ and (many[differ[0]] % size or many[differ[0]] * probed != size * few[differ[0]]):
            return None
    return axes


def _shapes_with_gradients(call: Call) -> Shapes:
    """Shapes of the inputs, and of the outputs that a gradient came to."""
    inputs = [leaf.shape for leaf in flatten(call.arguments)[0]]
    return inputs, [shape for shape, gradient in zip(call.outputs, call.gradients) if gradient is not None]


def _narrowed(shapes: Shapes, call: Call) -> Shapes:
    """Probed shapes without those of outputs that no gradient came to."""
    inputs, outputs = shapes
    if len(outputs) != len(call.outputs):
        return inputs, outputs
    return inputs, [
        s for s, gradient in zip(outputs, call.gradients or [None] * len(outputs)) if gradient is not None
    ]


def _text(shapes: Shapes) -> str:
    return " to ".join(str([list(shape) for shape in part]) for part in shapes)


def _probe_into(shapes: list[Shapes], size: int) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        leaves, rebuild = flatten(output)
        floating = [leaf.is_floating_point() for leaf in leaves]
        if not any(floating):
            return None
        leaves = [
            _one_per_example(leaf, size) if is_float else leaf for leaf, is_float in zip(leaves, floating)
        ]
        outputs = [leaf.shape for leaf, is_float in zip(leaves, floating) if is_float]
        shapes.append(([leaf.shape for leaf in flatten((args, kwargs))[0]], outputs))
        return rebuild(leaves)

    return hook


def _one_per_example(output: Tensor, size: int) -> Tensor:
    """A module's output that serves all examples (leading dimension 1), as a copy per example."""
    shared = size > 1 and output.ndim > 1 and output.shape[0] == 1
    return output.expand(size, *output.shape[1:]).clone() if shared else output


def _tappable(output: Tensor) -> Tensor:
    """An output that may be tapped in place, because to autograd it is no relative of others.

    Unlike a layer's, a module's output may be a part of an input, a parameter, or saved for the backward pass already.
    """
    return torch.ops.aten._unsafe_view(output, output.shape)


@contextmanager
def _replaced(module: nn.Module, slots: Slots, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Other tensors in some slots; afterwards the module and all below it are as before."""
    kept = [
        (each, dict(vars(each)), dict(each._parameters), dict(each._buffers)) for each in module.modules()
    ]
    try:
        for path, tensor in parameters.items():
            holder, name = slots[path]
            holder._parameters[name] = tensor  # type: ignore[assignment]
        for each, *_ in kept:
            if isinstance(each, nn.RNNBase):
                # Recurrent modules read their weights through this second list.
                each._flat_weights = [each._parameters.get(name) for name in each._flat_weights_names]
        yield
    finally:
        for each, attributes, own, buffers in kept:
            vars(each).clear()
            vars(each).update(attributes)
            each._parameters.clear()
            each._parameters.update(own)
            each._buffers.clear()
            each._buffers.update(buffers)


def _slot(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    holder, _, name = path.rpartition(".")
    return model.get_submodule(holder), name


def _require_unchanged(local: Local, module: nn.Module, inputs: list[Tensor], versions: list[int]) -> None:
    if [leaf._version for leaf in inputs] != versions:
        raise _refusal(local, module, "has an input that is modified in place, by itself or later")


def _refusal(local: Local, module: nn.Module, what: str, *, under_vmap: bool = False) -> BlamedError:
    return BlamedError(
        f"module {local.module!r} ({type(module).__name__}) {what}. Use "
        "gradients=trak.gradients.Functional(), or leave its parameters out with parameters=...",
        local.parameters,
        under_vmap=under_vmap,
    )
