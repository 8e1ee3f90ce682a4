"""Norms of vision models: torch's own with channels first, in other classes, and followed by an activation.

They are recognised by where the code of their forward stands, so that neither timm, torchvision nor transformers need be there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trak.blocks import Block
from trak.gradients.layers.base import (
    LayerCall,
    LayerRule,
    Part,
    SteppedRule,
    class_home,
    home,
    own_parameters,
)
from trak.gradients.layers.batch_norm import BatchNormRule
from trak.gradients.layers.channels import channel_blocks
from trak.gradients.layers.group_norm import GroupNormRule
from trak.gradients.layers.layer_norm import LayerNormRule
from trak.gradients.layers.rms_norm import RMSNormRule


@dataclass(frozen=True)
class Kind:
    """What a class of norms computes.

    Attributes:
        rule: of the layer of torch that computes the same, whose attributes the module has.
        channels_first: whether it normalises dimension 1 of images instead of the last one.
        plain: that layer's forward, for norms with an activation.
    """

    rule: LayerRule
    channels_first: bool = False
    plain: Callable[[Any, Tensor], Tensor] | None = None

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        """Those of the norm itself, of the gradient before any activation."""
        if self.channels_first:
            call = replace(call, inputs=_channels_last(call.inputs), gradient=_channels_last(call.gradient))
        return self.rule.blocks(call)

    def normalised(self, module: Any, inputs: Tensor) -> Tensor:
        """The norm of a module that has an activation too."""
        assert self.plain is not None
        if self.channels_first:
            return self.plain(module, _channels_last(inputs)).permute(0, 3, 1, 2)
        return self.plain(module, inputs)


_NORMS = {
    "timm.layers.norm.LayerNorm.forward": Kind(LayerNormRule()),
    "timm.layers.norm.LayerNormFp32.forward": Kind(LayerNormRule()),
    "timm.layers.norm.LayerNorm2d.forward": Kind(LayerNormRule(), channels_first=True),
    "timm.layers.norm.LayerNorm2dFp32.forward": Kind(LayerNormRule(), channels_first=True),
    "timm.layers.norm.LayerNormExp2d.forward": Kind(LayerNormRule(), channels_first=True),
    "timm.layers.norm.GroupNorm.forward": Kind(GroupNormRule()),
    "timm.layers.norm.GroupNorm1.forward": Kind(GroupNormRule()),
    "timm.layers.norm.RmsNorm.forward": Kind(RMSNormRule()),
    "timm.layers.norm.RmsNormFp32.forward": Kind(RMSNormRule()),
    "timm.layers.norm.RmsNorm2d.forward": Kind(RMSNormRule(), channels_first=True),
    "timm.layers.norm.RmsNorm2dFp32.forward": Kind(RMSNormRule(), channels_first=True),
    "torchvision.models.convnext.LayerNorm2d.forward": Kind(LayerNormRule(), channels_first=True),
}


def _rms_norm(module: Any, x: Tensor) -> Tensor:
    # Not torch's, which warns of an input in another dtype than the weight: under autocast.
    normalised = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.eps)
    return normalised if module.weight is None else normalised * module.weight


_WITH_ACTIVATION = {
    "timm.layers.norm_act.BatchNormAct2d.forward": Kind(BatchNormRule(), plain=nn.BatchNorm2d.forward),
    "timm.layers.norm_act.GroupNormAct.forward": Kind(GroupNormRule(), plain=nn.GroupNorm.forward),
    "timm.layers.norm_act.GroupNorm1Act.forward": Kind(GroupNormRule(), plain=nn.GroupNorm.forward),
    "timm.layers.norm_act.LayerNormAct.forward": Kind(LayerNormRule(), plain=nn.LayerNorm.forward),
    "timm.layers.norm_act.LayerNormAct2d.forward": Kind(
        LayerNormRule(), channels_first=True, plain=nn.LayerNorm.forward
    ),
    "timm.layers.norm_act.RmsNormAct2d.forward": Kind(RMSNormRule(), channels_first=True, plain=_rms_norm),
}


@dataclass(frozen=True)
class VisionNormRule(LayerRule):
    """Norms of `timm.layers`, torchvision's `LayerNorm2d`, Hugging Face's with a data format: ∇γ_b = Σ_l ∇y_bl x̂_bl, ∇β_b = Σ_l ∇y_bl."""

    def covers(self, module: nn.Module) -> frozenset[str]:
        """Weight and bias."""
        known = _kind(module) is not None and not _is_fast(module)
        return own_parameters(module, "weight", "bias") if known else frozenset()

    def event_ndim(self, module: Any) -> int:
        """As of torch's layer; an image for channels that come first."""
        kind = _kind(module)
        assert kind is not None
        return 3 if kind.channels_first else kind.rule.event_ndim(module)

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        """Dense: one number per channel or normalised entry."""
        kind = _kind(call.module)
        assert kind is not None
        yield from kind.blocks(call)


@dataclass(frozen=True)
class TimmNormActRule(SteppedRule):
    """timm's norms with an activation, y = act(drop(γ x̂ + β)): in steps, the norm and what follows it."""

    def covers(self, module: nn.Module) -> frozenset[str]:
        """Weight and bias; of a batch norm only with running statistics: without them examples are mixed."""
        known = home(module) in _WITH_ACTIVATION and not _is_fast(module)
        mixes = isinstance(module, nn.BatchNorm2d) and module.running_mean is None
        if not known or mixes or not {"drop", "act"} <= module._modules.keys():
            return frozenset()
        return own_parameters(module, "weight", "bias")

    def event_ndim(self, module: Any) -> int:
        """As of torch's layer; an image for channels that come first."""
        kind = _WITH_ACTIVATION[class_home(type(module.whole))]
        return 3 if kind.channels_first else kind.rule.event_ndim(module)

    def parts(self, module: Any) -> tuple[Part, ...]:
        """The norm."""
        kind = _WITH_ACTIVATION[home(module)]
        return (Part(module, own_parameters(module, "weight", "bias"), kind.normalised),)

    def forward(self, module: Any, parts: tuple[Any, ...]) -> Callable[..., Tensor]:
        """The norm, then what follows it."""
        return partial(_norm_then_act, module, parts[0])

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        """Dense: one number per channel or normalised entry."""
        yield from _WITH_ACTIVATION[class_home(type(call.module.whole))].blocks(call)


@dataclass(frozen=True)
class TimmGlobalResponseNormRule(LayerRule):
    """`timm.layers.GlobalResponseNorm` (ConvNeXt-V2), y = x + γ x x̂ + β, with x̂ of each channel and image: ∇γ_b = Σ_l ∇y_bl x_bl x̂_b."""

    def covers(self, module: nn.Module) -> frozenset[str]:
        """Weight and bias."""
        known = home(module) == "timm.layers.grn.GlobalResponseNorm.forward"
        return own_parameters(module, "weight", "bias") if known else frozenset()

    def event_ndim(self, module: Any) -> int:
        """One image."""
        return 3

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        """Dense: one number per channel."""
        module = call.module
        spatial, channel = module.spatial_dim, module.channel_dim

        def response() -> Tensor:
            norm = call.inputs.norm(p=2, dim=spatial, keepdim=True)
            return call.inputs * (norm / (norm.mean(dim=channel, keepdim=True) + module.eps))

        if channel == 1:
            yield from channel_blocks(call, response)
            return
        gradient_BLC = call.gradient.reshape(call.batch_size, -1, call.gradient.shape[-1])
        if "weight" in call.names:
            yield from call.dense("weight", (response().reshape_as(gradient_BLC) * gradient_BLC).sum(1))
        if "bias" in call.names:
            yield from call.dense("bias", gradient_BLC.sum(1))


def _kind(module: nn.Module) -> Kind | None:
    at = home(module)
    if at.startswith("transformers.models.") and at.endswith("LayerNorm.forward"):
        # ConvNeXt's and those of its kin.
        formats = {
            "channels_last": Kind(LayerNormRule()),
            "channels_first": Kind(LayerNormRule(), channels_first=True),
        }
        return formats.get(getattr(module, "data_format", "")) if isinstance(module, nn.LayerNorm) else None
    return _NORMS.get(at)


def _channels_last(images: Tensor) -> Tensor:
    return images.permute(0, 2, 3, 1)


def _is_fast(module: nn.Module) -> bool:
    """Whether it computes in the dtype of autocast, or by apex: timm's `set_fast_norm`."""
    return bool(getattr(module, "_fast_norm", False))


def _norm_then_act(module: Any, norm: nn.Module, x: Tensor) -> Tensor:
    return module.act(module.drop(norm(x)))
