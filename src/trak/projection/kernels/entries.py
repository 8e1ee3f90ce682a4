"""The two kinds of entries of a dense matrix, and the form in which their tiles are kept."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from trak.projection.normals import draw_normals, reference_normals
from trak.projection.philox import Key
from trak.projection.signs import draw_packed_signs, reference_signs, unpack_signs


class Entries(Enum):
    """Unscaled entries: random signs, kept one bit each, or standard normal numbers, kept as they are."""

    SIGNS = "signs"
    NORMALS = "normals"

    def draw(self, key: Key, blocks_c: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        """The kept form of blocks of 128 rows, blocks_c int64 [c], and columns 0 to K - 1."""
        if self is Entries.SIGNS:
            return draw_packed_signs(key, blocks_c, columns)
        return draw_normals(key, blocks_c, columns, dtype)

    def expand(self, kept: Tensor, dtype: torch.dtype, scratch: Tensor | None = None) -> Tensor:
        """[128·c, K] in `dtype`, valid until `scratch` is used again."""
        return unpack_signs(kept, dtype, scratch) if self is Entries.SIGNS else kept

    def reference(self, key: Key, blocks_c: Tensor, columns: int) -> Tensor:
        """[128·c, K] by the plainest way."""
        plain = reference_signs if self is Entries.SIGNS else reference_normals
        return plain(key, blocks_c, columns)


SIGNS, NORMALS = Entries.SIGNS, Entries.NORMALS


class Part(NamedTuple):
    """Some consecutive rows of a product.

    Attributes:
        values_Bn: gradients.
        skip: the row of the tile that the first of the n rows is.
        kept: the tile, as `Entries.draw` returns it.
    """

    values_Bn: Tensor
    skip: int
    kept: Tensor
