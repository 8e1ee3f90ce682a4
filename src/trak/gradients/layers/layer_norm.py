"""Normalisation over the last dimensions by mean and variance."""

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
class LayerNormRule(LayerRule):
    """`torch.nn.LayerNorm`: ∇γ_b = Σ_t ∇y_bt x̂_bt, ∇β_b = Σ_t ∇y_bt."""

    positions_are_rows = True

    def covers(self, module: nn.Module) -> frozenset[str]:
        """Weight and bias."""
        return own_parameters(module, "weight", "bias") if is_plain(module, nn.LayerNorm) else frozenset()

    def event_ndim(self, module: Any) -> int:
        """The normalised dimensions."""
        return len(module.normalized_shape)

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        """Dense: one number per normalised entry."""
        module = call.module
        if "weight" in call.names:
            normalised = F.layer_norm(call.inputs, module.normalized_shape, None, None, module.eps)
            yield from call.dense("weight", summed_product(call, normalised))
        if "bias" in call.names:
            yield from call.dense(
                "bias", call.gradient.reshape(call.batch_size, -1, *module.normalized_shape).sum(1)
            )
