"""Rows of a table picked by indices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from trak.blocks import Block, IndexBlock
from trak.gradients.layers.base import LayerCall, LayerRule, is_plain, own_parameters


@dataclass(frozen=True)
class EmbeddingRule(LayerRule):
    """`torch.nn.Embedding`: row index_bt of ∇W_b receives ∇y_bt."""

    positions_are_rows = True

    def covers(self, module: nn.Module) -> frozenset[str]:
        """The weight.

        Not with `max_norm` (changes the weight in the forward pass) or `scale_grad_by_freq` (mixes examples).
        """
        if not is_plain(module, nn.Embedding):
            return frozenset()
        if module.max_norm is not None or module.scale_grad_by_freq:
            return frozenset()
        return own_parameters(module, "weight")

    def event_ndim(self, module: Any) -> int:
        """One index."""
        return 0

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        """Indices [B, T] and values [B, T, C]; the padding row gets zero, as in autograd."""
        module = call.module
        indices_BT = call.inputs.reshape(call.batch_size, -1).long()
        values_BTC = call.gradient.reshape(*indices_BT.shape, -1)
        if module.padding_idx is not None:
            values_BTC = values_BTC.masked_fill((indices_BT == module.padding_idx).unsqueeze(-1), 0)
        yield IndexBlock(call.names["weight"], tuple(module.weight.shape), indices_BT, values_BTC)
