"""Learned factors of channels (layer scale) in modules of their own.

They are recognised by where the code of their forward stands, so that neither timm nor transformers need be there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from trak.blocks import Block
from trak.gradients.layers.base import LayerCall, LayerRule, home, own_parameters

# The parameter, and the dimension of the channels.
_SCALES = {
    "timm.layers.layer_scale.LayerScale.forward": ("gamma", -1),
    "timm.layers.layer_scale.LayerScale2d.forward": ("gamma", 1),
    "timm.models.vision_transformer.LayerScale.forward": ("gamma", -1),
    "timm.models.fastvit.LayerScale2d.forward": ("gamma", 1),
    "timm.models.swiftformer.LayerScale2d.forward": ("gamma", 1),
}


@dataclass(frozen=True)
class LayerScaleRule(LayerRule):
    """`LayerScale` and `LayerScale2d` of timm, and those of Hugging Face's vision models: y = γ x, ∇γ_b = Σ_l ∇y_bl x_bl."""

    def covers(self, module: nn.Module) -> frozenset[str]:
        """The factors, unless they are applied in place: the input would be lost."""
        if getattr(module, "inplace", False):
            return frozenset()
        found = _scale(module)
        return own_parameters(module, found[0]) if found else frozenset()

    def event_ndim(self, module: Any) -> int:
        """One vector of channels, or an image."""
        found = _scale(module)
        return 3 if found and found[1] == 1 else 1

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        """Dense: one number per channel."""
        found = _scale(call.module)
        assert found is not None
        yield from scale_blocks(call, *found)


def scale_blocks(call: LayerCall, name: str, dim: int) -> Iterator[Block]:
    """∇γ_b = Σ_l ∇y_bl x_bl, of factors of this name for the channels, dimension 1 or -1."""
    product = call.inputs * call.gradient
    channels = product.shape[dim]
    if dim == 1:
        by_row_NC = product.flatten(2).sum(2)
        yield from call.dense(name, by_row_NC.reshape(call.batch_size, -1, channels).sum(1))
    else:
        yield from call.dense(name, product.reshape(call.batch_size, -1, channels).sum(1))


def _scale(module: Any) -> tuple[str, int] | None:
    at = home(module)
    if at.startswith("transformers.models.") and at.endswith("LayerScale.forward"):
        # DINOv2's and those of its kin: x * lambda1.
        return ("lambda1", -1) if set(module._parameters) == {"lambda1"} else None
    if at == "timm.models.metaformer.Scale.forward":
        return "scale", 1 if len(module.shape) == 3 else -1
    return _SCALES.get(at)
