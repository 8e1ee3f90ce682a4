"""AᵀGB for one block, the cheapest way: what `Block.contract` computes plainly, arranged for narrow factors.

A and B have a handful of columns (a and b are near the square root of the numbers kept), and a product of many rows with a few
columns runs at a tenth of the processor's rate. Written the other way round, few rows times many columns, it runs at the
memory's. An identity is not multiplied by, and where forming G first takes fewer multiplications than contracting its
factors, G is formed.

Legend: B examples, T positions, R rows and C columns of the parameter as a matrix, a and b columns of the factors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trak.blocks import Block, ConvBlock, DenseBlock, IndexBlock, OuterBlock
from trak.projection.pieces import factors_of


@dataclass(frozen=True, eq=False)
class Factor:
    """One side's factor.

    Attributes:
        plain: [n, w]: random signs, or the identity.
        turned: [w, n], the same in its own memory; None for the identity.
    """

    plain: Tensor
    turned: Tensor | None

    @classmethod
    def of(cls, plain: Tensor, *, is_identity: bool) -> Factor:
        """A factor with its transpose beside it."""
        return cls(plain, None if is_identity else plain.T.contiguous())

    def to(self, dtype: torch.dtype) -> Factor:
        """The factor in another dtype."""
        if self.plain.dtype == dtype:
            return self
        return Factor(self.plain.to(dtype), None if self.turned is None else self.turned.to(dtype))

    @property
    def width(self) -> int:
        """Number of columns w."""
        return self.plain.shape[1]


def contract(block: Block, rows: Factor, columns: Factor) -> Tensor:
    """rowsᵀ G columns for each example, [B, a, b]: equal to `block.contract(rows.plain, columns.plain)` up to rounding.

    Computed in the dtype of the block's factors: signs and identities are exact in any.
    """
    if factors := factors_of(block):
        rows, columns = rows.to(factors[0].dtype), columns.to(factors[0].dtype)
    if isinstance(block, OuterBlock) and block.left.shape[1] == 1:
        return _contract_outer(block, rows, columns)
    if isinstance(block, IndexBlock):
        right_BTb = _narrowed(block.values, columns).transpose(1, 2)
        return torch.bmm(rows.plain[block.indices].transpose(1, 2), right_BTb)
    if isinstance(block, DenseBlock):
        return _contract_dense(block.values.reshape(block.batch_size, *block.matrix_shape), rows, columns)
    if isinstance(block, ConvBlock) and block.groups == 1:
        return _contract_convolution(block, rows, columns)
    return block.contract(rows.plain, columns.plain)


def forms_gradient(positions: int, size: tuple[int, int], rows: Factor, columns: Factor) -> bool:
    """Whether G = Σ_t left_t ⊗ right_t is formed first: where that takes fewer multiplications for an example."""
    (length, width), a, b = size, rows.width, columns.width
    left = 0 if rows.turned is None else positions * length * a
    right = 0 if columns.turned is None else positions * width * b
    factored = left + right + positions * a * b
    from_rows = (0 if rows.turned is None else length * width * a) + (
        0 if columns.turned is None else a * width * b
    )
    from_columns = (0 if columns.turned is None else length * width * b) + (
        0 if rows.turned is None else a * length * b
    )
    return positions * length * width + min(from_rows, from_columns) < factored


def _contract_outer(block: OuterBlock, rows: Factor, columns: Factor) -> Tensor:
    left_BTR, right_BTC = block.left[:, 0], block.right[:, 0]
    if forms_gradient(left_BTR.shape[1], block.matrix_shape, rows, columns):
        return _contract_dense(left_BTR.transpose(1, 2) @ right_BTC, rows, columns)
    left_BaT = _narrowed(left_BTR, rows)
    right_BbT = _narrowed(right_BTC, columns)
    return torch.bmm(left_BaT, right_BbT.transpose(1, 2))


def _narrowed(values_BTn: Tensor, factor: Factor) -> Tensor:
    """factorᵀ values_bᵀ for each example, [B, w, T]."""
    values_BnT = values_BTn.transpose(1, 2)
    if factor.turned is None:
        return values_BnT
    return torch.bmm(factor.turned.expand(len(values_BnT), -1, -1), values_BnT)


def _contract_convolution(block: ConvBlock, rows: Factor, columns: Factor) -> Tensor:
    """The columns as filters; then positions or rows first, whichever takes fewer multiplications."""
    images, outputs = block.gradients.shape[:2]
    left_NOL = block.gradients.reshape(images, outputs, -1)
    if columns.turned is None:
        # Patches are what an identity for filters would form: the gradient of a convolution with a outputs.
        narrow = block.gradients if rows.turned is None else (rows.turned.expand(images, -1, -1) @ left_NOL)
        shape = (rows.width, *block.shape[1:])
        narrow = narrow.reshape(images, rows.width, *block.gradients.shape[2:])
        return replace(block, shape=shape, gradients=narrow).dense().reshape(block.examples, rows.width, -1)
    right_NLb = block.filtered(columns.plain)[:, 0].transpose(1, 2)
    if rows.turned is None:
        by_image = left_NOL @ right_NLb
    elif rows.width * (outputs + columns.width) < outputs * columns.width:
        by_image = (rows.turned.expand(images, -1, -1) @ left_NOL) @ right_NLb
    else:
        by_image = rows.turned.expand(images, -1, -1) @ (left_NOL @ right_NLb)
    if images == block.examples:
        return by_image
    return by_image.reshape(block.examples, -1, *by_image.shape[-2:]).sum(1)


def _contract_dense(values_BRC: Tensor, rows: Factor, columns: Factor) -> Tensor:
    """The longer side first."""
    if values_BRC.shape[2] == 1 and columns.turned is None:
        narrow_Ba = values_BRC[:, :, 0] if rows.turned is None else values_BRC[:, :, 0] @ rows.plain
        return narrow_Ba.unsqueeze(2)
    rows_first = rows.turned is not None and (
        columns.turned is None or values_BRC.shape[1] >= values_BRC.shape[2]
    )
    if rows_first and rows.turned is not None:
        narrow_BaC = rows.turned.expand(len(values_BRC), -1, -1) @ values_BRC
        return narrow_BaC if columns.turned is None else narrow_BaC @ columns.plain
    narrow_BRb = values_BRC if columns.turned is None else values_BRC @ columns.plain
    return narrow_BRb if rows.turned is None else rows.turned.expand(len(narrow_BRb), -1, -1) @ narrow_BRb
