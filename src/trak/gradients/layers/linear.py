"""y = x Wᵀ + b over any number of middle dimensions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from trak.blocks import Block, OuterBlock
from trak.gradients.layers.base import LayerCall, LayerRule, home, is_plain, own_parameters


@dataclass(frozen=True)
class LinearRule(LayerRule):
    """`torch.nn.Linear`: ∇W_b = Σ_t ∇y_bt ⊗ x_bt, ∇b_b = Σ_t ∇y_bt."""

    positions_are_rows = True
    multiplies_as_given = True

    def covers(self, module: nn.Module) -> frozenset[str]:
        """Weight and bias; timm's subclass computes the same."""
        known = is_plain(module, nn.Linear) or home(module) == "timm.layers.linear.Linear.forward"
        return own_parameters(module, "weight", "bias") if known else frozenset()

    def event_ndim(self, module: Any) -> int:
        """One vector."""
        return 1

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        """An outer product of ∇y [B, 1, T, O] and x [B, 1, T, I]; the bias dense."""
        gradient_BTO = call.gradient.reshape(call.batch_size, -1, call.gradient.shape[-1])
        if "weight" in call.names:
            inputs_BTI = call.inputs.reshape(call.batch_size, -1, call.inputs.shape[-1])
            shape = (gradient_BTO.shape[-1], inputs_BTI.shape[-1])
            yield OuterBlock(call.names["weight"], shape, gradient_BTO.unsqueeze(1), inputs_BTI.unsqueeze(1))
        if "bias" in call.names:
            yield from call.dense("bias", call.summed(gradient_BTO, 1))
