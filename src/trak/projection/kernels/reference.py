"""What the kernels compute: target += scale · values @ matrix[skip : skip + n], the matrix drawn whole.

Legend: B examples, n rows, K columns, c blocks of 128 rows.
"""

from __future__ import annotations

from torch import Tensor

from trak.projection.kernels.entries import Entries
from trak.projection.philox import Key


def add_by_reference(
    target_BK: Tensor,
    values_Bn: Tensor,
    *,
    skip: int,
    entries: Entries,
    key: Key,
    blocks_c: Tensor,
    scale: float,
) -> None:
    """Add to `target_BK` (in its dtype); value i belongs to row skip + i of the blocks, side by side."""
    rows_nK = entries.reference(key, blocks_c, target_BK.shape[1])[skip : skip + values_Bn.shape[1]]
    target_BK += scale * (values_Bn.to(target_BK.dtype) @ rows_nK.to(target_BK.dtype))
