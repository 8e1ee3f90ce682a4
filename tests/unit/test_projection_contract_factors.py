"""The arranged products of `Kronecker` against `Block.contract`, the readable one."""

import pytest
import torch

from trak.blocks import ConvBlock, DenseBlock, IndexBlock, OuterBlock
from trak.projection.contract import Factor, contract, forms_gradient

torch.manual_seed(0)
B, T, R, C = 3, 5, 6, 4


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


BLOCKS = {
    "outer": OuterBlock("w", (R, C), draw(B, 1, T, R), draw(B, 1, T, C)),
    "one position": OuterBlock("w", (R, C), draw(B, 1, 1, R), draw(B, 1, 1, C)),
    "many positions": OuterBlock("w", (R, C), draw(B, 1, 200, R), draw(B, 1, 200, C)),
    "groups": OuterBlock("w", (R, C), draw(B, 2, T, R // 2), draw(B, 2, T, C)),
    "dense": DenseBlock("w", (R, C), draw(B, R, C)),
    "tall": DenseBlock("w", (R, 2, 2), draw(B, R, 2, 2)),
    "table": IndexBlock("w", (R, C), torch.randint(R, (B, T)), draw(B, T, C)),
    "convolution": ConvBlock(
        "w", (R, 2, 2, 1), draw(B, 2, 5, 5), draw(B, R, 4, 5), (1, 1), (0, 0), (1, 1), 1, B
    ),
    "narrow convolution": ConvBlock(
        "w", (2, 2, 2, 1), draw(B, 2, 5, 5), draw(B, 2, 4, 5), (1, 1), (0, 0), (1, 1), 1, B
    ),
    "two images of each example": ConvBlock(
        "w", (R, 2, 3), draw(2 * B, 2, 7), draw(2 * B, R, 5), (2,), (2,), (1,), 1, B
    ),
    "groups of a convolution": ConvBlock(
        "w", (R, 2, 3), draw(B, 4, 7), draw(B, R, 3), (2,), (0,), (1,), 2, B
    ),
}


@pytest.mark.parametrize("rows_exact", [False, True])
@pytest.mark.parametrize("columns_exact", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_contraction_is_the_plain_one(name, rows_exact, columns_exact):
    block = BLOCKS[name]
    rows, columns = (
        torch.eye(size, dtype=torch.float64) if exact else draw(size, 3)
        for size, exact in zip(block.matrix_shape, (rows_exact, columns_exact))
    )
    got = contract(
        block, Factor.of(rows, is_identity=rows_exact), Factor.of(columns, is_identity=columns_exact)
    )
    torch.testing.assert_close(got, block.contract(rows, columns))


@pytest.mark.parametrize("is_identity", [False, True])
def test_a_vector(is_identity):
    block, one = (
        DenseBlock("b", (R,), draw(B, R)),
        Factor.of(torch.ones(1, 1, dtype=torch.float64), is_identity=True),
    )
    rows = torch.eye(R, dtype=torch.float64) if is_identity else draw(R, 3)
    got = contract(block, Factor.of(rows, is_identity=is_identity), one)
    torch.testing.assert_close(got, block.contract(rows, one.plain))


def test_the_gradient_is_formed_where_that_takes_fewer_multiplications():
    wide = Factor.of(draw(64, 47), is_identity=False)
    narrow = Factor.of(draw(64, 4), is_identity=False)
    assert not forms_gradient(1, (64, 64), wide, wide)
    assert forms_gradient(1000, (64, 64), wide, wide)
    assert not forms_gradient(1000, (64, 64), narrow, narrow)
    identity = Factor.of(torch.eye(64, dtype=torch.float64), is_identity=True)
    assert forms_gradient(1000, (64, 64), identity, identity) is False
