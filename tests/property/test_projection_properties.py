"""Properties over many shapes, dimensions and seeds."""

from itertools import pairwise
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trak.blocks import DenseBlock, OuterBlock
from trak.errors import ProjectionError
from trak.projection import (
    Gaussian,
    Identity,
    Kronecker,
    Rademacher,
    Sparse,
    default_projection,
    from_fingerprint,
)
from trak.projection.kronecker import choose_splits
from trak.projection.layout import pool, separate, share_columns

names = st.lists(
    st.sampled_from(["a.w", "a.b", "b.w", "b.c.w", "scale"]), min_size=1, max_size=5, unique=True
)
shapes = names.flatmap(
    lambda chosen: st.fixed_dictionaries(
        {name: st.lists(st.integers(1, 6), max_size=3).map(tuple) for name in chosen}
    )
)
seeds = st.integers(-(2**40), 2**40)


@st.composite
def projections(draw):
    dim, seed = draw(st.integers(1, 300)), draw(seeds)
    kind = draw(st.sampled_from([Rademacher, Gaussian, Sparse, Kronecker, Identity]))
    if kind is Identity:
        return Identity()
    if kind is Kronecker:
        return Kronecker(dim, seed, draw(st.integers(1, 5)))
    options = {"per_layer": draw(st.booleans())}
    if kind is Sparse:
        options["nonzeros"] = draw(st.integers(1, dim))
    return kind(dim, seed, **options)


@settings(max_examples=80)
@given(projections(), shapes, st.integers(0, 50), st.integers(1, 3))
def test_add_is_multiplication_by_the_matrix(projection, shapes, checkpoint, batch_size):
    own_columns = isinstance(projection, Kronecker) or getattr(projection, "per_layer", False)
    layers = {name if isinstance(projection, Kronecker) else name.rpartition(".")[0] for name in shapes}
    if own_columns and projection.dim < len(layers):
        with pytest.raises(ProjectionError, match="columns cannot be split"):
            projection.init(shapes)
        return
    state = projection.init(shapes, checkpoint=checkpoint, dtype=torch.float64)
    out, expected = state.zeros(batch_size), state.zeros(batch_size)
    for name, shape in shapes.items():
        values = torch.randn(batch_size, *shape, dtype=torch.float64)
        projection.add(state, DenseBlock(name, shape, values), out)
        expected += values.reshape(batch_size, -1) @ projection.matrix(state, name)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)


@settings(max_examples=40)
@given(projections(), seeds, st.floats(-3, 3), st.floats(-3, 3))
def test_linear(projection, seed, one, two):
    shape = (4, 6)
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(2, 1, 2, size, generator=generator, dtype=torch.float64) for size in shape)
    dense = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    outer = OuterBlock("w", shape, left, right)
    state = projection.init({"w": shape}, dtype=torch.float64)

    def features(block):
        out = state.zeros(2)
        projection.add(state, block, out)
        return out

    combined = DenseBlock("w", shape, one * outer.dense() + two * dense)
    separately = one * features(outer) + two * features(DenseBlock("w", shape, dense))
    torch.testing.assert_close(features(combined), separately, rtol=1e-10, atol=1e-10)


@settings(max_examples=15)
@given(st.sampled_from([Rademacher, Gaussian, Sparse]), st.booleans(), st.integers(0, 2**40))
def test_distances_are_kept(kind, spread, seed):
    """Johnson–Lindenstrauss: squared distances within ε = 0.5 at K = 1024 (5 standard deviations: 0.22)."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(8, 3000, generator=generator, dtype=torch.float64)
    if not spread:
        points *= torch.logspace(0, -2, 3000, dtype=torch.float64)
    projection = kind(1024, seed)
    state = projection.init({"w": (3000,)}, dtype=torch.float64)
    out = state.zeros(8)
    projection.add(state, DenseBlock("w", (3000,), points), out)
    ratio = torch.pdist(out) ** 2 / torch.pdist(points) ** 2
    assert (ratio - 1).abs().max() < 0.5


@settings(max_examples=200)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 400))
def test_shares_are_equal_between_floor_and_cap(capacities, total):
    if total < len(capacities):
        with pytest.raises(ProjectionError, match="raise dim"):
            share_columns(total, capacities)
        return
    shares = share_columns(total, capacities)
    assert sum(shares) == min(total, sum(capacities))
    assert all(1 <= share <= capacity for share, capacity in zip(shares, capacities))
    # Nobody with room has less than another, but for the remainder of one.
    with_room = [share for share, capacity in zip(shares, capacities) if share < capacity]
    assert not with_room or max(shares) <= min(with_room) + 1


@settings(max_examples=100)
@given(shapes, st.integers(5, 300))
def test_layouts_fill_the_columns(shapes, dim):
    total = sum(prod(shape) for shape in shapes.values())
    for placements, columns in (separate(shapes, dim), separate(shapes, None)):
        taken = sorted((place.start, place.stop) for place in placements.values())
        assert taken[0][0] == 0
        assert all(one[1] == two[0] for one, two in pairwise(taken))
        assert taken[-1][1] == columns[-1].stop <= total
    assert columns[-1].stop == total
    placements, columns = pool(shapes, dim, per_layer=True)
    assert columns[-1].stop == min(dim, total)
    for name, place in placements.items():
        layer = next(column for column in columns if column.name == (name.rpartition(".")[0] or "(root)"))
        assert layer.start <= place.start < place.stop <= layer.stop
        assert place.exact or (place.start, place.stop) == (layer.start, layer.stop)


@settings(max_examples=300)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 500), st.integers(1, 9))
def test_splits_keep_k_different_numbers(rows, columns, k, sketches):
    if k >= rows * columns:
        return
    splits = choose_splits(rows, columns, k, sketches)
    assert sum(split.k for split in splits) == k
    for split in splits:
        kept = split.kept()
        assert split.a <= rows
        assert split.b <= columns
        assert len(kept.unique()) == split.k == len(kept)
        assert kept.max() < split.a * split.b
        # Each row (or column) that is exact has a weight that sums to one.
        side = {"rows": kept // split.b, "columns": kept % split.b, None: torch.zeros_like(kept)}[split.exact]
        count = {"rows": rows, "columns": columns, None: 1}[split.exact]
        weights = torch.zeros(count, dtype=torch.float64).index_add_(0, side, split.scale() ** 2)
        torch.testing.assert_close(weights, torch.ones_like(weights))


@settings(max_examples=100)
@given(projections())
def test_a_fingerprint_gives_the_projection_back(projection):
    assert from_fingerprint(projection.fingerprint()) == projection


@settings(max_examples=50)
@given(shapes, st.integers(1, 200), seeds, st.booleans())
def test_the_default_is_exact_where_it_can_be(shapes, dim, seed, is_fitted):
    total = sum(prod(shape) for shape in shapes.values())
    projection = default_projection(shapes, dim=dim, seed=seed, is_fitted=is_fitted)
    assert isinstance(projection, Identity) == (total <= dim)
    assert projection.output_dim(shapes) == min(total, dim)
