"""A rectifier with a learned slope."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from trak.blocks import Block
from trak.gradients.layers.base import LayerCall, LayerRule, is_plain, own_parameters


@dataclass(frozen=True)
class PReLURule(LayerRule):
    """`torch.nn.PReLU`: ∇a_b = Σ_l ∇y_bl min(x_bl, 0), for each channel or for all."""

    def covers(self, module: nn.Module) -> frozenset[str]:
        """The weight."""
        return own_parameters(module, "weight") if is_plain(module, nn.PReLU) else frozenset()

    def event_ndim(self, module: Any) -> int:
        """One vector of channels, or a number."""
        return 1 if module.weight.numel() > 1 else 0

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        """Dense: one number per channel."""
        channels = call.module.weight.numel()
        product = call.inputs.clamp(max=0).mul_(call.gradient)
        by_row = product.reshape(product.shape[0], channels, -1).sum(2)
        yield from call.dense("weight", by_row.reshape(call.batch_size, -1, channels).sum(1))
