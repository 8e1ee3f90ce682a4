"""Factors in bfloat16: multiplied as they are where that is fast, raised elsewhere."""

import pytest
import torch

from trak.blocks import ConvBlock, DenseBlock, OuterBlock, upcast
from trak.projection import Gaussian, Identity, Kronecker, Rademacher, Sparse, pieces
from trak.projection.pieces import as_multiplied
from trak.testing.projection import flat_gradients

HALF = torch.bfloat16
SHAPES = {"conv.weight": (6, 2, 3), "fc.weight": (70, 30), "wide.weight": (20, 8)}


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(pieces, "multiplies_bfloat16", lambda device: True)


def errors_of(projection, given):
    """‖φ − φ₆₄‖ / ‖φ₆₄‖ of the features in float32."""
    wide, state = projection.init(SHAPES, dtype=torch.float64), projection.init(SHAPES)
    matrix_PK = torch.cat([projection.matrix(wide, name) for name in SHAPES])
    exact = flat_gradients(in_float64(given), SHAPES) @ matrix_PK
    got = state.zeros(5)
    for block in given:
        projection.add(state, block, got)
    assert got.dtype == torch.float32
    return float((got - exact).norm() / exact.norm())


def blocks(left=HALF, right=HALF):
    torch.manual_seed(0)
    return [
        ConvBlock(
            "conv.weight",
            (6, 2, 3),
            torch.randn(10, 2, 7, dtype=right),
            torch.randn(10, 6, 5, dtype=left),
            (1,),
            (0,),
            (1,),
            1,
            5,
        ),
        OuterBlock(
            "fc.weight", (70, 30), torch.randn(5, 1, 4, 70, dtype=left), torch.randn(5, 1, 4, 30, dtype=right)
        ),
        OuterBlock(
            "wide.weight", (20, 8), torch.randn(5, 2, 4, 10, dtype=left), torch.randn(5, 2, 4, 8, dtype=right)
        ),
    ]


def in_float64(found):
    return [upcast(block, torch.float64) for block in found]


@pytest.mark.parametrize(
    "projection",
    [Sparse(40), Rademacher(40), Rademacher(600), Gaussian(40), Kronecker(60), Kronecker(5000), Identity()],
    ids=repr,
)
@pytest.mark.parametrize("right", [HALF, torch.float32], ids=str)
@pytest.mark.parametrize("piece", [1 << 20, 500])
def test_features_of_factors_in_bfloat16(projection, right, piece, fast, monkeypatch):
    """Within the rounding of a product to bfloat16, in pieces of any size; and rounded they are. Elsewhere they are not."""
    monkeypatch.setattr(pieces, "CACHED_ENTRIES", piece)
    monkeypatch.setattr(pieces, "PIECE_ENTRIES", piece)
    assert 1e-5 < errors_of(projection, blocks(right=right)) < 2**-7
    monkeypatch.setattr(pieces, "multiplies_bfloat16", lambda device: False)
    assert errors_of(projection, blocks(right=right)) < 2e-6


@pytest.mark.parametrize("left", [HALF, torch.float16, torch.float32], ids=str)
def test_all_else_is_raised(left, fast, monkeypatch):
    given = blocks(left=left, right=torch.float32)
    expected = HALF if left == HALF else torch.float32
    for block in given:
        assert {factor.dtype for factor in pieces.factors_of(as_multiplied(block, torch.float32))} == {
            expected
        }
        assert {factor.dtype for factor in pieces.factors_of(as_multiplied(block, torch.float64))} == {
            torch.float64
        }
    dense = DenseBlock("b", (3,), torch.ones(2, 3, dtype=HALF))
    assert as_multiplied(dense, torch.float32).values.dtype == torch.float32
    monkeypatch.setattr(pieces, "multiplies_bfloat16", lambda device: False)
    for block in given:
        assert {factor.dtype for factor in pieces.factors_of(as_multiplied(block, torch.float32))} == {
            torch.float32
        }


def test_factors_of_two_dtypes_are_multiplied_in_the_wider():
    for block in blocks(right=torch.float32):
        got = block.dense()
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, upcast(block, torch.float32).dense())
