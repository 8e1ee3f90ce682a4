"""AᵀMB for a block's gradients with some eigenvectors A of its rows and B of its columns, and entries picked from it.

What is cheaper is decided by multiplications for one example: contracting the block's factors, forming its gradient first, or, where few of
the entries of AᵀMB are wanted, Σ_t left[t, r] right[t, c] for each of them. Beside the fast ways stand `Block.dense` and `Side.dense`.

Legend: B examples, T positions, R rows and C columns of the parameter as a matrix, a and b eigenvectors of the two sides, k entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from math import prod

import torch
from torch import Tensor

from trak.blocks import Block, ConvBlock, DenseBlock, IndexBlock, OuterBlock, upcast
from trak.projection.contract import Factor, contract
from trak.projection.factors import Factors
from trak.projection.pieces import PIECE_ENTRIES

PICK_COST = 20
"""Multiplications of a batched matrix product in the time of one between two numbers that are looked up: 11 to 27 on a CPU in float32, for 4 to 512
positions, 25 to 2,222 eigenvectors of a side and 400 to 5,000 entries."""
PICKED_AT_ONCE = 1 << 17
"""Products of looked-up numbers that are held at once, half a megabyte in float32."""


@dataclass(frozen=True, eq=False)
class Side:
    """Some coordinates of one side of a parameter.

    Attributes:
        index: which of the side's n numbers, int64 [w], where the side is not turned; None for all n and for a side that is turned.
        factor: eigenvectors [n, w]; where the side is not turned an identity [w, w] that has no values: it may be as long as a vocabulary.
    """

    index: Tensor | None
    factor: Factor

    @classmethod
    def of(cls, basis: Tensor | None, size: int, chosen: Tensor) -> Side:
        """The chosen coordinates, int64 [w] ascending, in a basis [n, n] or, without one, in the side's own."""
        return cls.used(None if basis is None else basis[:, chosen], size, chosen)

    @classmethod
    def used(cls, vectors: Tensor | None, size: int, chosen: Tensor) -> Side:
        """The same with the chosen eigenvectors alone, [n, w], or None where the side is not turned."""
        if vectors is not None:
            return cls(None, Factor.of(vectors.contiguous(), is_identity=False))
        return cls(None if len(chosen) == size else chosen, _identity(len(chosen)))

    @property
    def vectors(self) -> Tensor | None:
        """The eigenvectors [n, w]; None where the side is not turned."""
        return self.factor.plain if self.is_turned else None

    @property
    def width(self) -> int:
        """W."""
        return self.factor.width

    @property
    def is_turned(self) -> bool:
        """Whether it has a basis of its own."""
        return self.factor.turned is not None

    def of_values(self, values: Tensor) -> Tensor:
        """Coordinates [..., w] of vectors [..., n]."""
        if self.is_turned:
            return values @ self.factor.plain
        return values if self.index is None else values[..., self.index]

    def of_rows(self, values_BnT: Tensor) -> Tensor:
        """Coordinates [B, w, T] of vectors [B, n, T], few rows times many columns."""
        if self.factor.turned is not None:
            return self.factor.turned.expand(len(values_BnT), -1, -1) @ values_BnT
        return values_BnT if self.index is None else values_BnT[:, self.index]

    def dense(self, size: int, like: Tensor) -> Tensor:
        """The coordinates as columns, [n, w]: for references."""
        if self.is_turned:
            return self.factor.plain
        eye = torch.eye(size, dtype=like.dtype, device=like.device)
        return eye if self.index is None else eye[:, self.index]


def full_sides(factors: Factors) -> tuple[Side, Side]:
    """All coordinates of both sides."""
    found = []
    for basis, size in zip((factors.rows, factors.columns), factors.eigenvalues.shape):
        chosen = torch.arange(size, device=factors.eigenvalues.device)
        found.append(Side.of(basis, size, chosen))
    return found[0], found[1]


def turn(block: Block, rows: Side, columns: Side) -> Tensor:
    """AᵀMB of each example, [B, a, b]."""
    if isinstance(block, IndexBlock) and rows.is_turned:
        block, rows = _looked_up(block, rows), Side(None, _identity(rows.width))
    if isinstance(block, OuterBlock) and block.left.shape[1:3] == (1, 1):
        # One vector for an example: all of them in one product each.
        left_Ba, right_Bb = rows.of_values(block.left[:, 0, 0]), columns.of_values(block.right[:, 0, 0])
        return left_Ba[:, :, None] * right_Bb[:, None]
    is_partly_turned = not (rows.is_turned and columns.is_turned)
    if is_partly_turned and is_outer(block) and positions_of(block) <= 2 * block.matrix_shape[0]:
        # Of a side that is not turned only what is wanted is multiplied; with more positions patches would be many more numbers than the gradient.
        block = outer(block)
    if _is_formed(block, rows, columns):
        block = DenseBlock(block.name, block.shape, block.dense())
    return contract(_selected(block, rows, columns), rows.factor, columns.factor)


def pick(block: Block, rows: Side, columns: Side, row_k: Tensor, column_k: Tensor) -> Tensor:
    """Entries (row_k, column_k) of AᵀMB of each example, [B, k]."""
    if isinstance(block, IndexBlock) and rows.is_turned:
        block, rows = _looked_up(block, rows), Side(None, _identity(rows.width))
    if is_outer(block) and _is_picked(block, rows, columns, row_k):
        left_BaT, right_BbT = _narrowed(block, rows, columns)
        return _picked(left_BaT, right_BbT, row_k, column_k)
    return turn(block, rows, columns).flatten(1)[:, row_k * columns.width + column_k]


def multiplications(block: Block, rows: Side, columns: Side, count: int) -> int:
    """Of `pick` for one example, of a block that `is_outer` and of two sides that are turned."""
    (length, width), positions, a, b = block.matrix_shape, positions_of(block), rows.width, columns.width
    narrowed = positions * (length * a + width * b + min(a * b, PICK_COST * count))
    turned = min(length * width * a + a * width * b, length * width * b + length * a * b)
    return min(narrowed, positions * length * width + turned)


def _picked(left_BaT: Tensor, right_BbT: Tensor, row_k: Tensor, column_k: Tensor) -> Tensor:
    """Σ_t left[:, row_k, t] right[:, column_k, t], [B, k]: vectors are looked up, for few examples at a time, so that they stay in the cache."""
    picked_Bk = left_BaT.new_empty(len(left_BaT), len(row_k))
    step = max(1, PICKED_AT_ONCE // max(1, len(row_k) * left_BaT.shape[2]))
    for first in range(0, len(picked_Bk), step):
        own = slice(first, first + step)
        products_bkT = left_BaT[own].index_select(1, row_k).mul_(right_BbT[own].index_select(1, column_k))
        torch.sum(products_bkT, 2, out=picked_Bk[own])
    return picked_Bk


def _is_picked(block: Block, rows: Side, columns: Side, row_k: Tensor) -> bool:
    """Whether entries are computed one by one, from factors that are turned anyway; a single position has nothing to sum up."""
    if positions_of(block) == 1:
        return True
    if (
        isinstance(block, ConvBlock)
        and rows.is_turned
        and columns.is_turned
        and _is_formed(block, rows, columns)
    ):
        return False
    return PICK_COST * len(row_k) < rows.width * columns.width


def _narrowed(block: Block, rows: Side, columns: Side) -> tuple[Tensor, Tensor]:
    """Factors of AᵀMB of a block that `is_outer`, [B, a, T] and [B, b, T]."""
    if isinstance(block, ConvBlock) and columns.is_turned:
        left_NRT, right_NbT = block.gradients.flatten(2), block.filtered(columns.factor.plain)[:, 0]
        left_BRT, right_BbT = (
            values.unflatten(0, (block.examples, -1)).transpose(1, 2).flatten(2)
            for values in (left_NRT, right_NbT)
        )
    else:
        block = outer(block)
        left_BRT, right_BbT = (
            block.left[:, 0].transpose(1, 2),
            columns.of_rows(block.right[:, 0].transpose(1, 2)),
        )
    return rows.of_rows(left_BRT), right_BbT


def example_pieces(block: Block, entries: int) -> Iterator[tuple[slice, Block]]:
    """(examples, their block): few enough at once for `entries` numbers of each to be held."""
    step = max(1, PIECE_ENTRIES // max(1, entries))
    for first in range(0, block.batch_size, step):
        examples = slice(first, min(first + step, block.batch_size))
        yield examples, block if step >= block.batch_size else take_examples(block, examples)


def take_examples(block: Block, examples: slice) -> Block:
    """The block of some of its examples (views)."""
    if isinstance(block, OuterBlock):
        return replace(block, left=block.left[examples], right=block.right[examples])
    if isinstance(block, IndexBlock):
        return replace(block, indices=block.indices[examples], values=block.values[examples])
    if isinstance(block, ConvBlock):
        each = len(block.inputs) // block.examples
        images = slice(examples.start * each, examples.stop * each)
        return replace(
            block,
            inputs=block.inputs[images],
            gradients=block.gradients[images],
            examples=examples.stop - examples.start,
        )
    return DenseBlock(block.name, block.shape, block.dense()[examples])


def scaled(block: Block, factor_B: Tensor) -> Block:
    """The block of each example's gradient times a number."""
    if isinstance(block, OuterBlock):
        return replace(block, left=block.left * factor_B[:, None, None, None])
    if isinstance(block, IndexBlock):
        return replace(block, values=block.values * factor_B[:, None, None])
    if isinstance(block, ConvBlock):
        factor_N = factor_B.repeat_interleave(len(block.gradients) // block.examples)
        return replace(
            block, gradients=block.gradients * factor_N.view(-1, *[1] * (block.gradients.ndim - 1))
        )
    values = block.dense()
    return DenseBlock(block.name, block.shape, values * factor_B.view(-1, *[1] * (values.ndim - 1)))


def is_outer(block: Block) -> bool:
    """Whether it is, or can be written as, one sum of outer products over positions: not where groups see inputs of their own."""
    return (isinstance(block, OuterBlock) and block.left.shape[1] == 1) or (
        isinstance(block, ConvBlock) and block.groups == 1
    )


def positions_of(block: Block) -> int:
    """T of a block that `is_outer`: of a convolution the output positions of all images of an example."""
    if isinstance(block, OuterBlock):
        return block.left.shape[2]
    assert isinstance(block, ConvBlock)
    return prod(block.gradients.shape[2:]) * (len(block.gradients) // block.examples)


def outer(block: Block) -> OuterBlock:
    """A block that `is_outer` as left [B, 1, T, R] and right [B, 1, T, C]: of a convolution output gradients and patches."""
    if isinstance(block, OuterBlock):
        return block
    assert isinstance(block, ConvBlock)
    left_NTR = block.gradients.flatten(2).transpose(1, 2)
    right_NTC = block.patches()[:, 0]
    left, right = (values.reshape(block.examples, 1, -1, values.shape[2]) for values in (left_NTR, right_NTC))
    return OuterBlock(block.name, block.shape, left, right)


def joined(blocks: list[Block]) -> Block:
    """One block of a parameter that came in several: their sum, in the form of factors where that can be."""
    if len(blocks) == 1:
        return blocks[0]
    # Nothing is summed up in half precision.
    dtype = torch.float64 if any(_dtype(block) == torch.float64 for block in blocks) else torch.float32
    blocks = [upcast(block, dtype) for block in blocks]
    name, shape = blocks[0].name, blocks[0].shape
    if all(isinstance(block, IndexBlock) for block in blocks):
        parts = [block for block in blocks if isinstance(block, IndexBlock)]
        return IndexBlock(
            name,
            shape,
            torch.cat([part.indices for part in parts], 1),
            torch.cat([part.values for part in parts], 1),
        )
    if all(isinstance(block, IndexBlock) or _is_outer(block) for block in blocks):
        # A tied embedding: the head's factors are as wide as the one-hot vectors of the tokens.
        outer = [_one_hot(block) if isinstance(block, IndexBlock) else block for block in blocks]
        left = torch.cat([block.left for block in outer if isinstance(block, OuterBlock)], 2)
        right = torch.cat([block.right for block in outer if isinstance(block, OuterBlock)], 2)
        return OuterBlock(name, shape, left, right)
    total = blocks[0].dense()
    for block in blocks[1:]:
        total = total + block.dense()
    return DenseBlock(name, shape, total)


def _dtype(block: Block) -> torch.dtype:
    tensors = (getattr(block, field.name) for field in fields(block))
    return next(
        tensor.dtype for tensor in tensors if isinstance(tensor, Tensor) and tensor.is_floating_point()
    )


def _is_outer(block: Block) -> bool:
    return isinstance(block, OuterBlock) and block.left.shape[1] == 1


def _one_hot(block: IndexBlock) -> OuterBlock:
    left_BTR = block.values.new_zeros(*block.indices.shape, block.matrix_shape[0])
    left_BTR.scatter_(2, block.indices.unsqueeze(2), 1.0)
    return OuterBlock(block.name, block.shape, left_BTR.unsqueeze(1), block.values.unsqueeze(1))


def _looked_up(block: IndexBlock, rows: Side) -> OuterBlock:
    """Σ_t (Aᵀ e_index) ⊗ values: rows of the eigenvectors are looked up as the embedding's were."""
    left_BTa = rows.factor.plain[block.indices]
    shape = (rows.width, block.matrix_shape[1])
    return OuterBlock(block.name, shape, left_BTa.unsqueeze(1), block.values.unsqueeze(1))


def _identity(width: int) -> Factor:
    return Factor.of(torch.empty(width, width, device="meta"), is_identity=True)


def _selected(block: Block, rows: Side, columns: Side) -> Block:
    """The block of those rows and columns that are wanted of sides that are not turned."""
    if rows.index is None and columns.index is None:
        return block
    if isinstance(block, OuterBlock) and block.left.shape[1] == 1:
        left, right = block.left, block.right
        left = left if rows.index is None else left[..., rows.index]
        right = right if columns.index is None else right[..., columns.index]
        return OuterBlock(block.name, (left.shape[3], right.shape[3]), left, right)
    values_BRC = block.dense().reshape(block.batch_size, *block.matrix_shape)
    if rows.index is not None:
        values_BRC = values_BRC[:, rows.index]
    if columns.index is not None:
        values_BRC = values_BRC[:, :, columns.index]
    return DenseBlock(block.name, tuple(values_BRC.shape[1:]), values_BRC)


def _is_formed(block: Block, rows: Side, columns: Side) -> bool:
    """Whether the gradient is formed before it is turned; of a convolution where that takes fewer multiplications for an image."""
    if not isinstance(block, ConvBlock):
        return not (_is_outer(block) or isinstance(block, DenseBlock))
    if block.groups > 1 or not (rows.is_turned and columns.is_turned):
        return True
    (length, width), a, b = block.matrix_shape, rows.width, columns.width
    positions = prod(block.gradients.shape[2:])
    factored = positions * (length * a + width * b + a * b)
    turned = min(length * width * a + a * width * b, length * width * b + a * length * b)
    return positions * length * width + turned < factored
