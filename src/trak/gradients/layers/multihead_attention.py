"""`torch.nn.MultiheadAttention`, computed in steps: its projections then are layers like others.

Torch computes it in one function, in which no hook sees what goes into the projections. For the length of a
forward pass the module gets this forward instead, which calls a module for each projection. Not for separate key
and value widths, `bias_k` or `add_zero_attn`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trak.blocks import Block, OuterBlock
from trak.gradients.layers.base import LayerCall, SteppedRule, is_plain, own_parameters


class InProjection(nn.Module):
    """Rows start to stop of the joint input projection: y = x W[start:stop]ᵀ + b[start:stop]."""

    parameter_names = frozenset({"in_proj_weight", "in_proj_bias"})

    def __init__(self, attention: nn.MultiheadAttention, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop
        self._attention = (attention,)  # in a tuple: not a submodule

    @property
    def in_proj_weight(self) -> Any:
        """The whole weight, [3E, E]."""
        return self._attention[0].in_proj_weight

    @property
    def in_proj_bias(self) -> Any:
        """The whole bias, [3E] or None."""
        return self._attention[0].in_proj_bias

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, T, E] -> [B, T, stop - start]."""
        rows = slice(self.start, self.stop)
        bias = self.in_proj_bias
        return F.linear(inputs, self.in_proj_weight[rows], None if bias is None else bias[rows])


@dataclass(frozen=True)
class InProjectionRule(SteppedRule):
    """∇W_b = Σ_t ∇y_bt ⊗ x_bt in the rows of this projection, zero in the others."""

    def covers(self, module: nn.Module) -> frozenset[str]:
        """Weight and bias of an attention that can be computed in steps."""
        if not in_steps(module):
            return frozenset()
        return own_parameters(module, "in_proj_weight", "in_proj_bias")

    def inner(self, module: nn.Module) -> tuple[str, ...]:
        """The output projection."""
        if not isinstance(module, nn.MultiheadAttention):
            return ()
        is_torchs = type(module.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
        return ("out_proj",) if is_torchs or is_plain(module, nn.MultiheadAttention) else ()

    def parts(self, module: Any) -> tuple[InProjection, ...]:
        """(joint, queries, keys, values): the first, or the others, is what a forward pass calls."""
        return projections(module)

    def forward(
        self, module: Any, parts: tuple[InProjection, ...]
    ) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """The output projection is called as a module, too."""
        return forward_in_steps(module, parts)

    def event_ndim(self, module: Any) -> int:
        """One vector."""
        return 1

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        """An outer product of ∇y [B, 1, T, 3E] and x [B, 1, T, E]; the bias dense."""
        module = call.module
        gradient_BTO = call.gradient.reshape(call.batch_size, -1, call.gradient.shape[-1])
        outputs = module.in_proj_weight.shape[0]
        if gradient_BTO.shape[-1] < outputs:
            gradient_BTO = F.pad(gradient_BTO, (module.start, outputs - module.stop))
        if "in_proj_weight" in call.names:
            inputs_BTI = call.inputs.reshape(call.batch_size, -1, call.inputs.shape[-1])
            yield OuterBlock(
                call.names["in_proj_weight"],
                tuple(module.in_proj_weight.shape),
                gradient_BTO.unsqueeze(1),
                inputs_BTI.unsqueeze(1),
            )
        if "in_proj_bias" in call.names:
            yield from call.dense("in_proj_bias", gradient_BTO.sum(1))


def in_steps(module: nn.Module) -> bool:
    """Whether `forward_in_steps` computes what this module does."""
    return (
        is_plain(module, nn.MultiheadAttention)
        and module._parameters.get("in_proj_weight") is not None
        and module.bias_k is None
        and not module.add_zero_attn
        and is_plain(module.out_proj, nn.Linear)
    )


def projections(module: nn.MultiheadAttention) -> tuple[InProjection, ...]:
    """(joint, queries, keys, values)."""
    width = module.embed_dim
    return (
        InProjection(module, 0, 3 * width),
        *(InProjection(module, part * width, (part + 1) * width) for part in range(3)),
    )


def forward_in_steps(
    attention: nn.MultiheadAttention, parts: tuple[InProjection, ...]
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """A forward for this module that calls `parts` and its output projection as modules."""
    return partial(_forward, attention, parts)


def _forward(
    attention: nn.MultiheadAttention,
    parts: tuple[InProjection, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As `nn.MultiheadAttention.forward`, see there; `is_causal` is a hint that `attn_mask` makes good."""
    joint, *separate = parts
    same, batched = query is key and key is value, query.ndim == 3
    if batched and not attention.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    elif not batched:
        query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    inputs = (query, key, value)
    projected = joint(query).chunk(3, -1) if same else [part(x) for part, x in zip(separate, inputs)]
    heads = attention.num_heads
    q_BHLD, k_BHSD, v_BHSD = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in projected)
    mask = _mask(key_padding_mask, attn_mask, heads, q_BHLD.dtype)
    if need_weights:
        scores_BHLS = q_BHLD @ k_BHSD.transpose(-1, -2) / sqrt(q_BHLD.shape[-1])
        weights_BHLS = (scores_BHLS if mask is None else scores_BHLS + mask).softmax(-1)
        mixed_BHLD = weights_BHLS @ v_BHSD
    else:
        mixed_BHLD = F.scaled_dot_product_attention(q_BHLD, k_BHSD, v_BHSD, attn_mask=mask)
    out = attention.out_proj(mixed_BHLD.transpose(1, 2).flatten(2))
    weights = None
    if need_weights:
        weights = weights_BHLS.mean(1) if average_attn_weights else weights_BHLS
        weights = weights if batched else weights.squeeze(0)
    if not batched:
        return out.squeeze(0), weights
    return (out if attention.batch_first else out.transpose(0, 1)), weights


def _mask(padding: Tensor | None, mask: Tensor | None, heads: int, dtype: torch.dtype) -> Tensor | None:
    """Both masks as one to be added to the scores, broadcastable to [B, H, L, S]."""
    added = None if padding is None else _added(padding, dtype)[:, None, None, :]
    if mask is None:
        return added
    own = _added(mask, dtype)
    own = own.unflatten(0, (-1, heads)) if own.ndim == 3 else own
    return own if added is None else own + added


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """−∞ where a boolean mask is true; numbers as they are."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))
