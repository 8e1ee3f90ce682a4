"""Blocks with learned factors of channels (layer scale) among their own parameters: ConvNeXt, BEiT, EVA, CaiT, InceptionNeXt.

In steps: the block's layers are called as they are, and each product with a factor is a module. They are recognised by where the code
of their forward stands, so that neither timm, torchvision nor transformers need be there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trak.blocks import Block
from trak.gradients.layers.base import LayerCall, Part, SteppedRule, class_home, home, own_parameters
from trak.gradients.layers.scales import scale_blocks


@dataclass(frozen=True)
class _Kind:
    """A class of blocks.

    Attributes:
        names: of the factors.
        dim: of the channels, 1 or -1, where the factors are applied.
        forward: in steps: of the block, a module for each product, and the block's arguments.
        needs: attributes that `forward` uses.
    """

    names: tuple[str, ...]
    dim: int
    forward: Callable[..., Tensor]
    needs: tuple[str, ...]


@dataclass(frozen=True)
class ScaledBlockRule(SteppedRule):
    """y = γ ⊙ branch(x) + shortcut(x): ∇γ_b = Σ_l ∇y_bl branch(x)_bl."""

    def covers(self, module: nn.Module) -> frozenset[str]:
        """The factors; not where a block has only some of them."""
        kind = _BLOCKS.get(home(module))
        if kind is None or not all(hasattr(module, name) for name in kind.needs):
            return frozenset()
        found = own_parameters(module, *kind.names)
        return found if len(found) == len(kind.names) else frozenset()

    def event_ndim(self, module: Any) -> int:
        """One vector of channels, or an image."""
        return 3 if _BLOCKS[class_home(type(module.whole))].dim == 1 else 1

    def parts(self, module: Any) -> tuple[Part, ...]:
        """The products with the factors."""
        kind = _BLOCKS[home(module)]
        return tuple(
            Part(module, frozenset((name,)), partial(_scaled, name, kind.dim)) for name in kind.names
        )

    def forward(self, module: Any, parts: tuple[Any, ...]) -> Callable[..., Tensor]:
        """As the block's own."""
        return partial(_BLOCKS[home(module)].forward, module, *parts)

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        """Dense: one number per channel."""
        (name,) = call.names
        yield from scale_blocks(call, name, _BLOCKS[class_home(type(call.module.whole))].dim)


def _scaled(name: str, dim: int, block: nn.Module, x: Tensor) -> Tensor:
    factors = getattr(block, name)
    return x * (factors.reshape(1, -1, 1, 1) if dim == 1 else factors)


def _convnext_timm(block: Any, scale: nn.Module, x: Tensor) -> Tensor:
    inner = block.conv_dw(x)
    inner = inner if block.use_conv_mlp else inner.permute(0, 2, 3, 1)
    branch = block.mlp(block.norm(inner))
    branch = branch if block.use_conv_mlp else branch.permute(0, 3, 1, 2)
    return block.drop_path(scale(branch)) + block.shortcut(x)


def _convnext_torchvision(block: Any, scale: nn.Module, input: Tensor) -> Tensor:
    return block.stochastic_depth(scale(block.block(input))) + input


def _convnext_transformers(block: Any, scale: nn.Module, features: Tensor) -> Tensor:
    branch = block.layernorm(block.dwconv(features).permute(0, 2, 3, 1))
    branch = scale(block.pwconv2(block.act(block.pwconv1(branch))))
    return features + block.drop_path(branch.permute(0, 3, 1, 2))


def _inception_next(block: Any, scale: nn.Module, x: Tensor) -> Tensor:
    return block.drop_path(scale(block.mlp(block.norm(block.token_mixer(x))))) + x


def _beit(
    block: Any, first: nn.Module, second: nn.Module, x: Tensor, shared_rel_pos_bias: Any = None
) -> Tensor:
    x = x + block.drop_path1(first(block.attn(block.norm1(x), shared_rel_pos_bias=shared_rel_pos_bias)))
    return x + block.drop_path2(second(block.mlp(block.norm2(x))))


def _cait(block: Any, first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    x = x + block.drop_path(first(block.attn(block.norm1(x))))
    return x + block.drop_path(second(block.mlp(block.norm2(x))))


def _cait_class(block: Any, first: nn.Module, second: nn.Module, x: Tensor, x_cls: Tensor) -> Tensor:
    x_cls = x_cls + block.drop_path(first(block.attn(block.norm1(torch.cat((x_cls, x), dim=1)))))
    return x_cls + block.drop_path(second(block.mlp(block.norm2(x_cls))))


def _eva(block: Any, first: nn.Module, second: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    names = ("rope", "attn_mask", "is_causal")
    x = x + block.drop_path1(first(block.attn(block.norm1(x), **dict(zip(names, args)), **kwargs)))
    return x + block.drop_path2(second(block.mlp(block.norm2(x))))


_BLOCKS = {
    "timm.models.convnext.ConvNeXtBlock.forward": _Kind(
        ("gamma",), 1, _convnext_timm, ("conv_dw", "use_conv_mlp", "norm", "mlp", "drop_path", "shortcut")
    ),
    "torchvision.models.convnext.CNBlock.forward": _Kind(
        ("layer_scale",), 1, _convnext_torchvision, ("block", "stochastic_depth")
    ),
    "transformers.models.convnext.modeling_convnext.ConvNextLayer.forward": _Kind(
        ("layer_scale_parameter",),
        -1,
        _convnext_transformers,
        ("dwconv", "layernorm", "pwconv1", "act", "pwconv2", "drop_path"),
    ),
    "timm.models.inception_next.MetaNeXtBlock.forward": _Kind(
        ("gamma",), 1, _inception_next, ("token_mixer", "norm", "mlp", "drop_path")
    ),
    "timm.models.beit.Block.forward": _Kind(
        ("gamma_1", "gamma_2"), -1, _beit, ("norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2")
    ),
    "timm.models.cait.LayerScaleBlock.forward": _Kind(
        ("gamma_1", "gamma_2"), -1, _cait, ("norm1", "attn", "drop_path", "norm2", "mlp")
    ),
    "timm.models.cait.LayerScaleBlockClassAttn.forward": _Kind(
        ("gamma_1", "gamma_2"), -1, _cait_class, ("norm1", "attn", "drop_path", "norm2", "mlp")
    ),
    "timm.models.eva.EvaBlock.forward": _Kind(
        ("gamma_1", "gamma_2"), -1, _eva, ("norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2")
    ),
}
