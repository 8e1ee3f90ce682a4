"""Convolutions in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from trak.blocks import Block, ConvBlock
from trak.gradients.layers.base import LayerCall, LayerRule, class_home, home, is_plain, own_parameters

_SAME = "timm.layers.conv2d_same.Conv2dSame.forward"
"""Padding as in TensorFlow, which depends on the image's size and the stride."""


@dataclass(frozen=True)
class ConvRule(LayerRule):
    """`torch.nn.Conv1d`, `Conv2d`, `Conv3d` with any stride, padding, dilation and groups, and timm's `Conv2dSame`."""

    multiplies_as_given = True

    def covers(self, module: nn.Module) -> frozenset[str]:
        """Weight and bias."""
        plain = is_plain(module, nn.Conv1d, nn.Conv2d, nn.Conv3d, methods=("forward", "_conv_forward"))
        known = plain or home(module) == _SAME
        return own_parameters(module, "weight", "bias") if known else frozenset()

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
            per_image_NO = call.summed(images.gradient.flatten(2), 2)
            yield from call.dense(
                "bias", per_image_NO.reshape(call.batch_size, -1, per_image_NO.shape[1]).sum(1)
            )


def explicit_padding(module: Any, inputs: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """(inputs, padding) such that symmetric zero padding is all that is left to do."""
    spatial = len(module.kernel_size)
    if class_home(type(module)) == _SAME:
        return F.pad(inputs, _same_as_tensorflow(module, inputs)), (0,) * spatial
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


def _same_as_tensorflow(module: Any, inputs: Tensor) -> list[int]:
    """For F.pad, last dimension first: as many zeros as make ⌈size / stride⌉ outputs, the odd one behind."""
    extents: list[int] = []
    for axis in (1, 0):
        size, stride = inputs.shape[2 + axis], module.stride[axis]
        reach = (-(-size // stride) - 1) * stride + (module.kernel_size[axis] - 1) * module.dilation[axis] + 1
        total = max(reach - size, 0)
        extents += [total // 2, total - total // 2]
    return extents
