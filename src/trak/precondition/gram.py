"""The Gram matrix ΦᵀΦ, summed over fixed row ranges in a fixed order.

A product of a matrix with its own transpose is symmetric: only the panels on and below the diagonal are formed, little more than half of the
multiplications, and mirrored at the end.

Shape legend: R rows of one range, K projected, k columns of one group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Group = tuple[int, int]
"""(start, stop): a slice of the K columns that is preconditioned on its own."""

PANEL_COLUMNS = 512
"""Columns of ΦᵀΦ that are formed at once: wide enough for products at full speed, narrow enough to save nearly half of them."""


@dataclass(frozen=True, eq=False)
class Moments:
    """What a preconditioner needs of the training features.

    Attributes:
        num_rows: N.
        groups: the column slices.
        grams: ΦᵀΦ of each group, [k, k] float64.
        cross: Φᵀf of each group, [k] float64: for choosing the damping from data.
        outputs_square: Σ f², float.
        product_dtype: the precision in which products were formed before being summed in float64.
    """

    num_rows: int
    groups: tuple[Group, ...]
    grams: tuple[Tensor, ...]
    cross: tuple[Tensor, ...]
    outputs_square: float
    product_dtype: torch.dtype


def accumulate_moments(
    blocks: Iterable[tuple[Tensor, Tensor]],
    groups: Sequence[Group],
    *,
    product_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Moments:
    """Sum ΦᵀΦ and Φᵀf over row ranges.

    Each range's product is formed in `product_dtype` and added in float64, so that the sum does not lose small rows to large
    totals however many ranges there are.

    Args:
        blocks: (features [R, K], outputs [R]) in a fixed order; the order and the ranges decide the last bits.
        groups: column slices: one of all columns is the paper's K × K matrix, one per layer is block-diagonal.
        product_dtype: float32 or float64.
        device: where products are formed and sums are kept.
    """
    device = torch.device(device)
    grams = [
        torch.zeros(stop - start, stop - start, dtype=torch.float64, device=device) for start, stop in groups
    ]
    cross = [torch.zeros(stop - start, dtype=torch.float64, device=device) for start, stop in groups]
    num_rows, square = 0, 0.0
    for features_RK, outputs_R in blocks:
        features_RK = features_RK.to(device=device, dtype=product_dtype)
        outputs_R = outputs_R.to(device=device, dtype=product_dtype)
        for index, (start, stop) in enumerate(groups):
            part_Rk = features_RK[:, start:stop]
            _add_lower_panels(grams[index], part_Rk)
            cross[index] += part_Rk.T @ outputs_R
        num_rows += features_RK.shape[0]
        square += float(outputs_R.double().square().sum())
    for gram in grams:
        _mirror(gram)
    return Moments(num_rows, tuple(groups), tuple(grams), tuple(cross), square, product_dtype)


def _add_lower_panels(gram_kk: Tensor, part_Rk: Tensor) -> None:
    """Gram += partᵀ part, on and below the diagonal; some of what is above it."""
    size = gram_kk.shape[0]
    for start in range(0, size, PANEL_COLUMNS):
        stop = min(start + PANEL_COLUMNS, size)
        gram_kk[start:, start:stop] += part_Rk[:, start:].T @ part_Rk[:, start:stop]


def _mirror(gram_kk: Tensor) -> None:
    """The part below the panels on the diagonal, copied above it."""
    size = gram_kk.shape[0]
    for start in range(0, size, PANEL_COLUMNS):
        stop = min(start + PANEL_COLUMNS, size)
        gram_kk[start:stop, stop:] = gram_kk[stop:, start:stop].T
