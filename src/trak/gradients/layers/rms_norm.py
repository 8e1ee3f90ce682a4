"""Normalisation over the last dimensions by the root mean square."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import nn

from trak.blocks import Block
from trak.gradients.layers.base import LayerCall, LayerRule, is_plain, own_parameters
from trak.gradients.layers.entries import summed_product


@dataclass(frozen=True)
class RMSNormRule(LayerRule):
    """`torch.nn.RMSNorm`: ∇γ_b = Σ_t ∇y_bt x̂_bt with x̂ = x / rms(x)."""

    positions_are_rows = True

    def covers(self, module: nn.Module) -> frozenset[str]:
        """The weight."""
        return own_parameters(module, "weight") if is_plain(module, nn.RMSNorm) else frozenset()

    def event_ndim(self, module: Any) -> int:
        """The normalised dimensions."""
        return len(module.normalized_shape)

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        """Dense: one number per normalised entry."""
        module = call.module
        normalised = F.rms_norm(call.inputs, module.normalized_shape, None, module.eps)
        yield from call.dense("weight", summed_product(call, normalised))
