"""Root-mean-square norms that model files write themselves, e.g. Hugging Face's (Llama, Gemma, T5)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trak.blocks import Block
from trak.errors import GradientError
from trak.gradients.layers.base import LayerCall, LayerRule, own_parameters
from trak.gradients.layers.entries import summed_product


@dataclass(frozen=True)
class TransformersRMSNormRule(LayerRule):
    """Modules called …RMSNorm or T5LayerNorm, whose only tensor is one weight vector.

    They compute y = (c + γ) · x̂(x), entry by entry, with c = 0 (Llama) or 1 (Gemma) and x̂ with their own
    epsilon and roundings. So x̂ = y(γ = 1) − y(γ = 0): the module itself is asked, and its formula need not
    be known.
    """

    positions_are_rows = True

    def covers(self, module: nn.Module) -> frozenset[str]:
        """The weight."""
        kind = type(module).__name__
        # First of all: the parameters of what torch.jit made are no dictionary.
        if not (kind == "T5LayerNorm" or kind.endswith("RMSNorm")):
            return frozenset()
        alone = set(module._parameters) == {"weight"} and not module._buffers and not module._modules
        if not alone or isinstance(module, nn.RMSNorm) or "forward" in vars(module):
            return frozenset()
        weight = module._parameters["weight"]
        return own_parameters(module, "weight") if weight is not None and weight.ndim == 1 else frozenset()

    def event_ndim(self, module: Any) -> int:
        """One vector."""
        return 1

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        """Dense: one number per entry."""
        weight = call.module.weight
        ones = _with_weight(call.module, torch.ones_like(weight), call.inputs)
        zeros = _with_weight(call.module, torch.zeros_like(weight), call.inputs)
        if ones.shape != call.gradient.shape or ones.shape[-1] != weight.shape[0]:
            raise GradientError(
                f"{type(call.module).__name__} maps {list(call.inputs.shape)} to {list(ones.shape)}: it is "
                "no norm over the last dimension; use gradients=trak.gradients.Functional()"
            )
        yield from call.dense("weight", summed_product(call, ones - zeros))


def _with_weight(module: Any, weight: Tensor, inputs: Tensor) -> Tensor:
    """The module's own forward, without its hooks, with another weight."""
    own = module._parameters["weight"]
    module._parameters["weight"] = weight
    try:
        with torch.no_grad():
            return type(module).forward(module, inputs)
    finally:
        module._parameters["weight"] = own
