"""y = x W + b with W [I, O]: the Hugging Face layer that GPT-2 is made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from trak.blocks import Block, OuterBlock
from trak.gradients.layers.base import LayerCall, LayerRule, own_parameters

_HOMES = ("transformers.pytorch_utils", "transformers.modeling_utils")


@dataclass(frozen=True)
class TransformersConv1DRule(LayerRule):
    """`transformers.pytorch_utils.Conv1D`, recognised by name so that transformers need not be there.

    ∇W_b = Σ_t x_bt ⊗ ∇y_bt.
    """

    positions_are_rows = True
    multiplies_as_given = True

    def covers(self, module: nn.Module) -> frozenset[str]:
        """Weight and bias."""
        kind = type(module)
        if kind.__name__ != "Conv1D" or kind.__module__ not in _HOMES or "forward" in vars(module):
            return frozenset()
        return own_parameters(module, "weight", "bias")

    def event_ndim(self, module: Any) -> int:
        """One vector."""
        return 1

    def blocks(self, call: LayerCall) -> Iterator[Block]:
        """An outer product of x [B, 1, T, I] and ∇y [B, 1, T, O]: the transposed of a Linear's.

        The bias dense.
        """
        gradient_BTO = call.gradient.reshape(call.batch_size, -1, call.gradient.shape[-1])
        if "weight" in call.names:
            inputs_BTI = call.inputs.reshape(call.batch_size, -1, call.inputs.shape[-1])
            shape = (inputs_BTI.shape[-1], gradient_BTO.shape[-1])
            yield OuterBlock(call.names["weight"], shape, inputs_BTI.unsqueeze(1), gradient_BTO.unsqueeze(1))
        if "bias" in call.names:
            yield from call.dense("bias", call.summed(gradient_BTO, 1))
