"""What norms with one weight per channel (dimension 1) have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from trak.blocks import Block
from trak.gradients.layers.base import LayerCall


def channel_blocks(call: LayerCall, normalised: Callable[[], Tensor]) -> Iterator[Block]:
    """∇γ_b = Σ_l ∇y_bl x̂_bl and ∇β_b = Σ_l ∇y_bl.

    `normalised` gives x̂ [N, C, ...], a tensor of its own to be written to, and is called only if needed.
    """
    rows, channels = call.gradient.shape[:2]
    gradient_NCL = call.gradient.reshape(rows, channels, -1)
    if "weight" in call.names:
        # In place: this tensor is ours. A product of matrices, row by row with row, would take twice as long.
        product_NCL = normalised().reshape(rows, channels, -1).to(gradient_NCL.dtype).mul_(gradient_NCL)
        weight_NC = product_NCL.sum(2)
        yield from call.dense("weight", weight_NC.reshape(call.batch_size, -1, channels).sum(1))
    if "bias" in call.names:
        bias_NC = gradient_NCL.sum(2)
        yield from call.dense("bias", bias_NC.reshape(call.batch_size, -1, channels).sum(1))
