"""What a layer rule is: the parameters of a module that it knows, and how their gradients are had.

Shape legend: B examples, N = B·S rows of the layer's leading dimension (S consecutive ones per example, S = 1
nearly always), T positions per example, I inputs, O outputs, C channels, L pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trak.blocks import Block, DenseBlock


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One call of a layer within a batched forward pass, when the backward pass comes by.

    Attributes:
        module: the layer, with the checkpoint's tensors in it.
        inputs: its first argument, [N, ...], detached.
        gradient: gradient of its output, [N, ...]. Both are in the parameters' dtype, but where the rule multiplies them as they come.
        names: attributed parameters of this module, local name to canonical name.
        batch_size: B, which divides N; rows of one example are consecutive.
        others: its further arguments that are tensors, such as the expert [N] of each row.
    """

    module: Any
    inputs: Tensor
    gradient: Tensor
    names: Mapping[str, str]
    batch_size: int
    others: tuple[Tensor, ...] = ()

    def raised(self) -> LayerCall:
        """The call with inputs and gradient in the parameters' dtype."""
        dtype = self.dtype
        inputs = self.inputs.to(dtype) if self.inputs.is_floating_point() else self.inputs
        gradient = self.gradient.to(dtype)
        if inputs is self.inputs and gradient is self.gradient:
            return self
        return replace(self, inputs=inputs, gradient=gradient)

    def event_rows(self, event_ndim: int) -> LayerCall:
        """The call with a leading dimension, which a lone event of a batch of one may lack."""
        if self.inputs.ndim > event_ndim:
            return self
        return replace(self, inputs=self.inputs.unsqueeze(0), gradient=self.gradient.unsqueeze(0))

    @property
    def dtype(self) -> torch.dtype:
        """That of the attributed parameters: what is summed over positions is summed in it."""
        dtype: torch.dtype = getattr(self.module, next(iter(self.names))).dtype
        return dtype

    def summed(self, values: Tensor, dim: int) -> Tensor:
        """The sum over positions, in the parameters' dtype. bfloat16 is summed as training sums it, in float32 and rounded once: raised
        first it would take two to seven times as long.
        """
        if values.dtype == torch.bfloat16:
            return values.sum(dim).to(self.dtype)
        return values.sum(dim, dtype=self.dtype)

    def dense(self, local: str, values: Tensor) -> Iterator[Block]:
        """A dense block of `values` [B, ...], if this parameter is attributed."""
        shape = tuple(getattr(self.module, local).shape)
        yield DenseBlock(self.names[local], shape, values.reshape(self.batch_size, *shape))


class LayerRule(ABC):
    """Gradients of one kind of layer. Implementations have no state.

    `positions_are_rows`: whether all dimensions before the event are alike, as in y[..., :] = W x[..., :], so that
    positions may be taken for rows. If not, the first one alone counts rows.

    `multiplies_as_given`: whether inputs and gradients in the dtypes that they have under autocast will do. If not, they are raised to the
    parameters' dtype first.
    """

    positions_are_rows = False
    multiplies_as_given = False

    @abstractmethod
    def covers(self, module: nn.Module) -> frozenset[str]:
        """Local names of parameters whose gradients this rule gives.

        Empty for modules that are not its kind.
        """

    @abstractmethod
    def event_ndim(self, module: Any) -> int:
        """Dimensions of the input that one row holds.

        An input with no more than these has no batch dimension.
        """

    @abstractmethod
    def blocks(self, call: LayerCall) -> Iterator[Block]:
        """Blocks of the attributed parameters."""


class SteppedRule(LayerRule):
    """A rule for modules that compute more than a hook on them could see.

    For the length of a forward pass such a module gets a forward that computes the same and calls a module for each step with
    parameters; it is these parts that are hooked, and that `blocks` is given as `LayerCall.module`.
    """

    def inner(self, module: nn.Module) -> tuple[str, ...]:
        """Modules within, by name, whose parameters such a module uses itself: it calls them only in steps, where `forward` does."""
        return ()

    @abstractmethod
    def parts(self, module: Any) -> tuple[Any, ...]:
        """The steps with parameters: modules with `parameter_names`, such as `Part`."""

    @abstractmethod
    def forward(self, module: Any, parts: tuple[Any, ...]) -> Callable[..., Any]:
        """A forward for this module that calls `parts` as modules."""


class Part(nn.Module):
    """A step of another module, whose parameters and attributes it has as they are at the time.

    compute: of the module and the step's input. It uses no other parameters than those of these names.
    """

    def __init__(self, module: nn.Module, names: frozenset[str], compute: Callable[..., Tensor]) -> None:
        super().__init__()
        self.parameter_names, self._compute = names, compute
        self._module = (module,)  # in a tuple: not a submodule

    def __getattr__(self, name: str) -> Any:
        """What the module has."""
        return getattr(vars(self)["_module"][0], name)

    @property
    def whole(self) -> nn.Module:
        """The module."""
        return self._module[0]

    def forward(self, *inputs: Tensor) -> Tensor:
        """The step."""
        return self._compute(self.whole, *inputs)


def home(module: nn.Module) -> str:
    """Where the code of the module's forward stands, such as "timm.layers.norm.LayerNorm2d.forward".

    Subclasses that leave it alone share it; "" where it is patched, decorated or no Python function.
    """
    return "" if "forward" in vars(module) else class_home(type(module))


def class_home(kind: type[nn.Module]) -> str:
    """The same of a class; also while a module of it is computed in steps."""
    forward = kind.forward
    own = getattr(forward, "__globals__", {}).get("__name__")
    return "" if own is None or hasattr(forward, "__wrapped__") else f"{own}.{forward.__qualname__}"


def is_plain(module: nn.Module, *kinds: type[nn.Module], methods: tuple[str, ...] = ("forward",)) -> bool:
    """Whether the module computes exactly what one of these classes does.

    Subclasses count as long as they leave `methods` alone, and nothing is patched onto the instance.
    """
    if any(method in vars(module) for method in methods):
        return False
    return any(
        isinstance(module, kind)
        and all(getattr(type(module), method) is getattr(kind, method) for method in methods)
        for kind in kinds
    )


def own_parameters(module: nn.Module, *names: str) -> frozenset[str]:
    """Those of `names` that are parameters of this very module."""
    return frozenset(name for name in names if module._parameters.get(name) is not None)
