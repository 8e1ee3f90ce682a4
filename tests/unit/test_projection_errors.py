"""Refusals: what they say, and configurations as values."""

import pytest
import torch

from trak.blocks import DenseBlock, IndexBlock, OuterBlock
from trak.errors import ProjectionError
from trak.projection import (
    Columns,
    Eigenbasis,
    Gaussian,
    Identity,
    Kronecker,
    Rademacher,
    Sparse,
    default_projection,
    from_fingerprint,
)
from trak.projection.default import DEFAULT_DIM, LARGE_DIM, LARGE_MODEL

KINDS = [Rademacher, Gaussian, Sparse, Kronecker]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [0, -5, 2.0, "8", None, True])
def test_impossible_dim(kind, dim):
    with pytest.raises(ProjectionError, match="dim must be an int of at least 1, got"):
        kind(dim)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [1.5, None, "0", False])
def test_impossible_seed(kind, seed):
    with pytest.raises(ProjectionError, match="seed must be an int, got"):
        kind(8, seed=seed)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sparse(4, nonzeros=5), "nonzeros must be an int of at least 1 and at most 4, got 5"),
        (lambda: Sparse(4, nonzeros=0), "nonzeros must be"),
        (lambda: Kronecker(4, sketches=0), "sketches must be"),
        (lambda: Rademacher(4, cache_bytes=-1), "cache_bytes"),
        (lambda: Gaussian(4, cache_bytes=1.5), "cache_bytes"),
        (lambda: Kronecker(1).init({"a.w": (3,), "b.w": (3,)}), "raise dim to 2 or more"),
        (lambda: Sparse(1, per_layer=True).init({"a.w": (3,), "b.w": (3,)}), "per_layer=False"),
        (lambda: Rademacher(4).init({"w": (3, 0)}), "holds no numbers"),
        (lambda: Identity().init({}), "no parameters"),
        (lambda: Identity().init({"w": (2,)}, checkpoint=-1), "checkpoint must be"),
        (lambda: Sparse(4).init({"w": (2,)}, dtype=torch.bfloat16), "torch.float32 or torch.float64"),
        (lambda: default_projection({}), "no parameters"),
        (lambda: from_fingerprint({"kind": "magic"}), "expected one of gaussian, identity"),
        (lambda: from_fingerprint({}), "unknown projection kind None"),
        (
            lambda: from_fingerprint({**Rademacher(4).fingerprint(), "version": 0}),
            "version 0 .* draws version 2",
        ),
        (
            lambda: from_fingerprint({"kind": "rademacher", "version": 1, "dim": 4}),
            "expected .*'per_layer', 'seed'",
        ),
        (lambda: from_fingerprint({**Identity().fingerprint(), "dim": 4}), "has options"),
    ],
)
def test_messages(make, message):
    with pytest.raises(ProjectionError, match=message):
        make()


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            DenseBlock("other", (4, 6), torch.zeros(2, 4, 6)),
            "unknown parameter 'other'.*drawn for 1 parameters",
        ),
        (DenseBlock("w", (6, 4), torch.zeros(2, 6, 4)), r"has shape \(6, 4\), expected \(4, 6\)"),
        (DenseBlock("w", (4, 6), torch.zeros(2, 24)), "do not fit its shape"),
        (
            DenseBlock("w", (4, 6), torch.zeros(2, 4, 6, device="meta")),
            "is on meta, the projection is on cpu",
        ),
        (OuterBlock("w", (4, 6), torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 5)), "do not fit its shape"),
        (OuterBlock("w", (4, 6), torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 3, 6)), "do not fit its shape"),
        (OuterBlock("w", (4, 6), torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 2, 6)), "do not fit its shape"),
        (IndexBlock("w", (4, 6), torch.zeros(2, 3).long(), torch.zeros(2, 3, 5)), "do not fit its shape"),
        (IndexBlock("w", (4, 6), torch.zeros(2, 2).long(), torch.zeros(2, 3, 6)), "do not fit its shape"),
    ],
)
def test_wrong_blocks(block, message):
    state = Rademacher(4).init({"w": (4, 6)})
    with pytest.raises(ProjectionError, match=message):
        Rademacher(4).add(state, block, state.zeros(2))


def test_a_state_of_another_kind():
    state = Sparse(4).init({"w": (3,)})
    for projection in (Rademacher(4), Identity(), Kronecker(4)):
        with pytest.raises(ProjectionError, match="SparseState, expected"):
            projection.add(state, DenseBlock("w", (3,), torch.zeros(1, 3)), state.zeros(1))


def test_configurations_are_values():
    assert Rademacher(8) == Rademacher(dim=8, seed=0, per_layer=False) != Rademacher(8, seed=1)
    assert Rademacher(8) != Gaussian(8)
    assert Sparse(8) == Sparse(8, cache_bytes=0)
    assert len({Sparse(8), Sparse(8, cache_bytes=0), Sparse(8, nonzeros=2)}) == 2
    assert repr(Sparse(8, cache_bytes=0)) == "Sparse(dim=8, seed=0, nonzeros=1, per_layer=False)"
    assert "cache_bytes" not in Rademacher(8).fingerprint()
    with pytest.raises(AttributeError):
        Rademacher(8).dim = 9


def test_columns_are_layers():
    shapes = {"w": (4,), "a.w": (3, 3), "a.b": (3,), "a.c.w": (50, 50)}
    assert Rademacher(30).columns(shapes) == (Columns("all", 0, 30),)
    layers = (Columns("(root)", 0, 4), Columns("a", 4, 16), Columns("a.c", 16, 30))
    assert Kronecker(30).columns(shapes) == layers
    assert Sparse(30, per_layer=True).columns(shapes) == layers
    assert [column.stop for column in Identity().columns(shapes)] == [4, 16, 2516]


def test_default():
    assert default_projection({"w": (DEFAULT_DIM,)}) == Identity()
    large = default_projection({"w": (DEFAULT_DIM + 1,)}, seed=3)
    assert large == Sparse(DEFAULT_DIM, seed=3)
    assert default_projection({"w": (DEFAULT_DIM + 1,)}, is_fitted=True) == Eigenbasis(DEFAULT_DIM)
    assert default_projection({"w": (DEFAULT_DIM,)}, is_fitted=True) == Identity()
    for is_fitted in (False, True):
        huge = default_projection({"w": (LARGE_MODEL + 1,)}, seed=3, is_fitted=is_fitted)
        assert huge == Kronecker(LARGE_DIM, seed=3)
    with pytest.raises(ProjectionError, match="dim must be"):
        default_projection({"w": (3,)}, dim=0)
