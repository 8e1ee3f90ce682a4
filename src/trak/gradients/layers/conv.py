"""Convolutions in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from trak.blocks import Block, ConvBlock
from trak.gradients.layers.base import LayerCall, LayerRule, is_plain, own_parameters


@dataclass(frozen=True)
class ConvRule(LayerRule):
    """`torch.nn.Conv1d`, `Conv2d`, `Conv3d` with any stride, padding, dilation and groups."""

    def covers(self, module: nn.Module) -> frozenset[str]:
        """Weight and bias."""
        if not is_plain(module, nn.Conv1d, nn.Conv2d, nn.Conv3d, methods=("forward", "_conv_forward")):
            return frozenset()
        return own_parameters(module, "weight", "bias")

    def event_ndim(self, module: Any) -> int:
        """One image: channels and spatial dimensions."""
        return 1 + len(module.kernel_size)

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        """A convolution block; the bias dense, summed over positions."""
        module = call.module
        images = call.event_rows(self.event_ndim(module))
        if "weight" in call.names:
            inputs, padding = explicit_padding(module, images.inputs)
            yield ConvBlock(
                call.names["weight"],
                tuple(module.weight.shape),
                inputs,
                images.gradient,
                stride=tuple(module.stride),
                padding=padding,
                dilation=tuple(module.dilation),
                groups=module.groups,
                examples=call.batch_size,
            )
        if "bias" in call.names:
            per_image_NO = images.gradient.flatten(2).sum(2)
            yield from call.dense(
                "bias", per_image_NO.reshape(call.batch_size, -1, per_image_NO.shape[1]).sum(1)
            )


def explicit_padding(module: Any, inputs: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """(inputs, padding) such that symmetric zero padding is all that is left to do."""
    spatial = len(module.kernel_size)
    if module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return inputs, tuple(module.padding)
    extents: list[int] = []  # for F.pad: last dimension first, (before, after) each
    for axis in reversed(range(spatial)):
        if module.padding == "valid":
            extents += [0, 0]
        elif module.padding == "same":
            total = module.dilation[axis] * (module.kernel_size[axis] - 1)
            extents += [total // 2, total - total // 2]
        else:
            extents += [module.padding[axis]] * 2
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(inputs, extents, mode=mode), (0,) * spatial
