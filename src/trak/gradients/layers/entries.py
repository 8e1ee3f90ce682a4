"""What norms with one weight per normalised entry (the last dimensions) have in common."""

from __future__ import annotations

from torch import Tensor

from trak.gradients.layers.base import LayerCall


def summed_product(call: LayerCall, normalised: Tensor) -> Tensor:
    """Σ_t ∇y_bt x̂_bt, [B, entries], for a weight that scales the last dimensions."""
    entries = call.module.weight.numel()
    product = call.gradient.reshape(call.batch_size, -1, entries) * normalised.reshape(
        call.batch_size, -1, entries
    )
    return product.sum(1)
