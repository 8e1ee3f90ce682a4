"""Batch normalisation with running statistics: in eval mode a fixed scale and shift per channel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import nn

from trak.blocks import Block
from trak.gradients.layers.base import LayerCall, LayerRule, is_plain, own_parameters
from trak.gradients.layers.channels import channel_blocks

_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class BatchNormRule(LayerRule):
    """`torch.nn.BatchNorm1d`, `2d`, `3d`, `SyncBatchNorm` with running statistics: ∇γ_b = Σ_l ∇y_bl x̂_bl."""

    def covers(self, module: nn.Module) -> frozenset[str]:
        """Weight and bias, if there are running statistics: without them examples are mixed."""
        if not is_plain(module, *_KINDS) or module.running_mean is None:
            return frozenset()
        return own_parameters(module, "weight", "bias")

    def event_ndim(self, module: Any) -> int:
        """One vector of channels, or an image."""
        return 1

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        """Dense: one number per channel."""
        module = call.module

        def normalised() -> Any:
            return F.batch_norm(
                call.inputs, module.running_mean, module.running_var, None, None, False, 0.0, module.eps
            )

        yield from channel_blocks(call, normalised)
