"""Normalisation over groups of channels of one example."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import nn

from trak.blocks import Block
from trak.gradients.layers.base import LayerCall, LayerRule, is_plain, own_parameters
from trak.gradients.layers.channels import channel_blocks


@dataclass(frozen=True)
class GroupNormRule(LayerRule):
    """`torch.nn.GroupNorm`: ∇γ_b = Σ_l ∇y_bl x̂_bl."""

    def covers(self, module: nn.Module) -> frozenset[str]:
        """Weight and bias."""
        return own_parameters(module, "weight", "bias") if is_plain(module, nn.GroupNorm) else frozenset()

    def event_ndim(self, module: Any) -> int:
        """One vector of channels, or an image."""
        return 1

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        """Dense: one number per channel."""
        module = call.module
        yield from channel_blocks(
            call, lambda: F.group_norm(call.inputs, module.num_groups, None, None, module.eps)
        )
