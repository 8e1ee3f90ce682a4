"""Normalisation of every channel of one example."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import nn

from trak.blocks import Block
from trak.gradients.layers.base import LayerCall, LayerRule, is_plain, own_parameters
from trak.gradients.layers.channels import channel_blocks

_KINDS: dict[type[nn.Module], int] = {nn.InstanceNorm1d: 1, nn.InstanceNorm2d: 2, nn.InstanceNorm3d: 3}


@dataclass(frozen=True)
class InstanceNormRule(LayerRule):
    """`torch.nn.InstanceNorm1d`, `2d`, `3d` with `affine=True`: ∇γ_b = Σ_l ∇y_bl x̂_bl."""

    def covers(self, module: nn.Module) -> frozenset[str]:
        """Weight and bias."""
        return own_parameters(module, "weight", "bias") if is_plain(module, *_KINDS) else frozenset()

    def event_ndim(self, module: Any) -> int:
        """One image: channels and spatial dimensions."""
        return 1 + next(spatial for kind, spatial in _KINDS.items() if isinstance(module, kind))

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        """Dense: one number per channel."""
        module = call.module

        def normalised() -> Any:
            own_statistics = not module.track_running_stats
            return F.instance_norm(
                call.inputs,
                module.running_mean,
                module.running_var,
                None,
                None,
                own_statistics,
                0.0,
                module.eps,
            )

        yield from channel_blocks(call.event_rows(self.event_ndim(module)), normalised)
