"""Golden numbers, and their independence of batch, tiles, cache, form of the block and dtype."""

import math
from dataclasses import replace

import pytest
import torch

from trak.blocks import ConvBlock, DenseBlock, IndexBlock, OuterBlock
from trak.projection import (
    Gaussian,
    Identity,
    Kronecker,
    Rademacher,
    Sparse,
    pieces,
    shifts,
    sparse_sums,
    tiles,
)
from trak.projection.kernels import slices
from trak.testing.projection import SHAPES, example_blocks, flat_gradients, full_matrix, project

KINDS = [
    Rademacher(40),
    Gaussian(40),
    Sparse(40),
    Sparse(40, nonzeros=3),
    Rademacher(60, per_layer=True),
    Gaussian(60, per_layer=True),
    Sparse(60, nonzeros=2, per_layer=True),
    Kronecker(40),
    Kronecker(40, sketches=2),
    Identity(),
]

# First entries of the matrix of "fc.weight" for checkpoint 3, without the scale of the kind.
# They may change only together with `version`.
GOLDEN = {
    Rademacher(40): [
        [-1, 1, 1, -1, 1, -1, -1, -1],
        [1, -1, -1, -1, -1, -1, 1, -1],
        [1, -1, -1, -1, 1, -1, -1, 1],
        [1, 1, -1, -1, 1, -1, -1, -1],
    ],
    Gaussian(40): [
        [-1.8511204, 0.2228789, -0.6628287, 0.7806562],
        [-1.6445463, -1.5418247, 0.0604031, 1.6909781],
        [-0.5338849, 0.7280815, -1.0554079, -1.4886655],
        [-1.0505056, 0.5306151, -2.5241473, 0.3565382],
    ],
    Sparse(5): [[0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, -1]],
    Sparse(6, nonzeros=2): [
        [1, 0, 0, 0, -1, 0],
        [0, 1, 0, 0, 0, -1],
        [0, 0, 1, 1, 0, 0],
        [0, -1, 0, 0, 0, -1],
    ],
    Kronecker(7): [[1], [1], [1], [1]],
    Kronecker(40): [
        [0.7071068, 0, 0, 0, 0, -0.7071068, 0, 0],
        [0.7071068, 0, 0, 0, 0, 0.7071068, 0, 0],
        [0.7071068, 0, 0, 0, 0, 0.7071068, 0, 0],
        [0.7071068, 0, 0, 0, 0, 0.7071068, 0, 0],
    ],
    Rademacher(60, per_layer=True): [
        [-1, 1, 1, -1, 1, -1, -1, -1],
        [1, -1, -1, -1, -1, -1, 1, -1],
        [1, -1, -1, -1, 1, -1, -1, 1],
        [1, 1, -1, -1, 1, -1, -1, -1],
    ],
}


@pytest.mark.parametrize(("projection", "rows"), GOLDEN.items(), ids=lambda value: repr(value)[:40])
def test_golden_values(projection, rows):
    assert projection.version == 2
    state = projection.init(SHAPES, checkpoint=3, dtype=torch.float64)
    matrix = projection.matrix(state, "fc.weight")
    scaled = (
        matrix / matrix.abs().max() if not isinstance(projection, Gaussian) else matrix * projection.dim**0.5
    )
    start = next(column.start for column in projection.columns(SHAPES) if column.name in ("all", "fc"))
    got = scaled[: len(rows), start : start + len(rows[0])]
    torch.testing.assert_close(got, torch.tensor(rows, dtype=torch.float64), rtol=0, atol=5e-7)


@pytest.mark.parametrize("projection", KINDS, ids=repr)
def test_same_matrix_in_float32_and_float64(projection):
    single, double = full_matrix(projection, dtype=torch.float32), full_matrix(projection)
    torch.testing.assert_close(single.double(), double, rtol=2e-7, atol=0)


@pytest.mark.parametrize("kind", [Rademacher, Gaussian, Sparse])
def test_cache_changes_no_bit(kind):
    blocks = example_blocks(dtype=torch.float32)
    expected = None
    for cache_bytes in (1 << 30, 100, 0):
        projection = kind(130, cache_bytes=cache_bytes)
        state = projection.init(SHAPES)
        for _ in range(2):
            out = state.zeros(3)
            for block in blocks:
                projection.add(state, block, out)
            expected = out if expected is None else expected
            assert torch.equal(out, expected)
        assert state.cache.used <= cache_bytes


@pytest.mark.parametrize("projection", KINDS, ids=repr)
def test_tiles_and_pieces_change_no_number(projection, monkeypatch):
    blocks = example_blocks(batch_size=4)
    expected = project(projection, blocks)
    monkeypatch.setattr(tiles, "tile_rows", lambda columns: 128)
    monkeypatch.setattr(pieces, "PIECE_ENTRIES", 50)
    got = project(projection, blocks)
    if isinstance(projection, (Sparse, Identity)):
        assert torch.equal(got, expected)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("projection", [Rademacher(33), Rademacher(1024), Gaussian(33)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_tiles_and_odd_pieces(projection, dtype, monkeypatch):
    """Five tiles, the last one short, and pieces that start anywhere in them."""
    left, right = (torch.randn(2, 1, 2, size, dtype=dtype) for size in (19, 31))
    block = OuterBlock("w", (19, 31), left, right)
    state = projection.init({"w": (19, 31)}, dtype=dtype)
    expected = block.dense().flatten(1) @ projection.matrix(state, "w")
    monkeypatch.setattr(tiles, "tile_rows", lambda columns: 128)
    monkeypatch.setattr(pieces, "PIECE_ENTRIES", 2 * 31 * 3)
    for cache_bytes in (1 << 30, 0):
        state = replace(projection, cache_bytes=cache_bytes).init({"w": (19, 31)}, dtype=dtype)
        out = state.zeros(2)
        projection.add(state, block, out)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("projection", [Sparse(40), Sparse(40, nonzeros=3), Identity()], ids=repr)
def test_batches_change_no_bit(projection):
    block = DenseBlock("w", (300, 70), torch.randn(9, 300, 70))
    state = projection.init({"w": (300, 70)})
    whole = state.zeros(9)
    projection.add(state, block, whole)
    for start, stop in ((0, 1), (1, 3), (3, 9)):
        part = state.zeros(stop - start)
        projection.add(state, DenseBlock("w", (300, 70), block.values[start:stop]), part)
        assert torch.equal(part, whole[start:stop])


@pytest.mark.parametrize("projection", KINDS, ids=repr)
@pytest.mark.parametrize("piece_entries", [1 << 24, 30])
def test_tables_are_projected_without_a_dense_gradient(projection, piece_entries, monkeypatch):
    """Rows touched often, once and never, by one example or several; in one piece and in many."""
    monkeypatch.setattr(pieces, "PIECE_ENTRIES", piece_entries)
    monkeypatch.setattr(sparse_sums, "PIECE_ENTRIES", piece_entries)
    indices = torch.tensor([[0, 3, 3, 10], [3, 7, 7, 7], [1, 0, 9, 2]])
    block = IndexBlock("embed.weight", (11, 4), indices, torch.randn(3, 4, 4, dtype=torch.float64))
    expected = flat_gradients([block]) @ full_matrix(projection)
    monkeypatch.setattr(pieces, "SMALL_TABLE", 0)
    if not isinstance(projection, Identity) and "embed" not in _exact_layers(projection):
        monkeypatch.setattr(IndexBlock, "dense", lambda block: pytest.fail("the dense gradient was formed"))
    torch.testing.assert_close(project(projection, [block]), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "projection", [Sparse(40), Sparse(40, nonzeros=3), Sparse(60, nonzeros=2, per_layer=True)], ids=repr
)
@pytest.mark.parametrize("cached_entries", [1 << 20, 60])
@pytest.mark.parametrize(
    ("few_blocks", "superblocks", "small_table"), [(0, 1, 0), (0, 16, 1 << 18), (4, 16, 0)]
)
def test_slices_are_the_product(
    projection, cached_entries, few_blocks, superblocks, small_table, monkeypatch
):
    """Blocks alone and several at once, in small tiles, and pieces that begin and end anywhere in them."""
    monkeypatch.setattr(sparse_sums, "SHORT_BLOCK", 0)
    monkeypatch.setattr(slices, "FEW_BLOCKS", few_blocks)
    monkeypatch.setattr(shifts, "SUPERBLOCKS", superblocks)
    monkeypatch.setattr(slices, "TILE_ENTRIES", 7)
    monkeypatch.setattr(pieces, "CACHED_ENTRIES", cached_entries)
    monkeypatch.setattr(pieces, "SMALL_TABLE", small_table)
    blocks = example_blocks(batch_size=4, dtype=torch.float64)
    expected = flat_gradients(blocks) @ full_matrix(projection)
    torch.testing.assert_close(project(projection, blocks), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("nonzeros", [1, 3])
@pytest.mark.parametrize("few_blocks", [0, 4])
@pytest.mark.parametrize("short_block", [0, 1 << 20])
def test_pieces_and_tiles_change_no_bit(nonzeros, few_blocks, short_block, monkeypatch):
    """Of one way: slices of short blocks and of long ones, or entries one by one."""
    monkeypatch.setattr(sparse_sums, "SHORT_BLOCK", short_block)
    projection, shape = Sparse(130, nonzeros=nonzeros), (40, 70)
    block = DenseBlock("w", shape, torch.randn(7, *shape))
    monkeypatch.setattr(slices, "FEW_BLOCKS", few_blocks)
    outs = []
    for tile_entries, piece in ((1 << 18, 2800), (100, 2800), (100, 97)):
        monkeypatch.setattr(slices, "TILE_ENTRIES", tile_entries)
        monkeypatch.setattr(sparse_sums, "TILE_ENTRIES", tile_entries)

        def cut(block, piece=piece):
            values_Bn = block.values.flatten(1)
            for examples in (slice(0, 3), slice(3, 7)):
                for first in range(0, 2800, piece):
                    yield examples, first, values_Bn[examples, first : first + piece]

        monkeypatch.setattr(sparse_sums, "cached_pieces", cut)
        state = projection.init({"w": shape})
        outs.append(state.zeros(7))
        projection.add(state, block, outs[-1])
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    expected = block.values.flatten(1) @ projection.matrix(state, "w")
    torch.testing.assert_close(outs[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("short_block", [0, 256])
@pytest.mark.parametrize(
    "values",
    [
        torch.randn(40, 300, 6).permute(2, 0, 1),
        torch.randn(1, 40, 300).expand(6, -1, -1),
        torch.randn(12, 40, 300)[::2],
    ],
    ids=["transposed", "expanded", "every second"],
)
def test_gradients_of_any_strides(values, short_block, monkeypatch):
    monkeypatch.setattr(sparse_sums, "SHORT_BLOCK", short_block)
    state = Sparse(100).init({"w": (40, 300)})
    out = state.zeros(6)
    Sparse(100).add(state, DenseBlock("w", (40, 300), values), out)
    torch.testing.assert_close(out, values.flatten(1) @ Sparse(100).matrix(state, "w"), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("nonzeros", [1, 3])
@pytest.mark.parametrize("columns", [10, 700, 9000])
@pytest.mark.parametrize("cached_entries", [1 << 20, 50_000])
def test_slices_of_large_parameters(nonzeros, columns, cached_entries, monkeypatch):
    """Superblocks of many blocks, of some and of one; pieces of some rows of some examples."""
    monkeypatch.setattr(sparse_sums, "SHORT_BLOCK", 0)
    monkeypatch.setattr(pieces, "CACHED_ENTRIES", cached_entries)
    projection, shape = Sparse(columns, nonzeros=nonzeros), (210, 700)
    block = OuterBlock("w", shape, *(torch.randn(3, 1, 2, size, dtype=torch.float64) for size in shape))
    state = projection.init({"w": shape}, dtype=torch.float64)
    assert (state.shifts["w"].lanes > 1) == (columns // nonzeros < 9000)
    out = state.zeros(3)
    projection.add(state, block, out)
    expected = state.zeros(3)
    for columns_n, signs_n in zip(*state.draw_range("w", 0, 210 * 700)):
        values_Bn = block.dense().flatten(1) * signs_n
        expected.scatter_add_(1, columns_n.expand(values_Bn.shape), values_Bn)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)


def test_a_parameter_of_one_block_is_moved_without_loss():
    state = Sparse(40).init({"w": (5, 8)}, dtype=torch.float64)
    matrix = Sparse(40).matrix(state, "w")
    assert torch.equal(matrix @ matrix.T, torch.eye(40, dtype=torch.float64))


@pytest.mark.parametrize("cached_entries", [1 << 20, 100, 1])
def test_pieces_for_the_cache_cover_every_gradient_once(cached_entries, monkeypatch):
    monkeypatch.setattr(pieces, "CACHED_ENTRIES", cached_entries)
    shape = (70, 3)
    grouped = OuterBlock("w", shape, torch.randn(5, 2, 3, 35), torch.randn(5, 2, 3, 3))
    plain = OuterBlock("w", shape, torch.randn(5, 1, 3, 70), torch.randn(5, 1, 3, 3))
    images = ConvBlock("w", (6, 2, 3), torch.randn(10, 2, 7), torch.randn(10, 6, 5), (1,), (0,), (1,), 1, 5)
    signal = ConvBlock("w", (6, 2, 3), torch.randn(5, 2, 72), torch.randn(5, 6, 70), (1,), (0,), (1,), 1, 5)
    assert images.prefers_patches and not signal.prefers_patches
    for block in (grouped, plain, images, signal, DenseBlock("w", shape, torch.randn(5, *shape))):
        found, times = torch.zeros(5, math.prod(block.shape)), torch.zeros(5, math.prod(block.shape))
        for examples, first, values_bn in pieces.cached_pieces(block):
            found[examples, first : first + values_bn.shape[1]] += values_bn
            times[examples, first : first + values_bn.shape[1]] += 1
        assert (times == 1).all()
        torch.testing.assert_close(found, block.dense().flatten(1))


def test_a_table_is_drawn_whole_or_where_it_is_touched(monkeypatch):
    indices = torch.tensor([[0, 3, 3, 10], [3, 7, 7, 7], [1, 0, 9, 2]])
    block = IndexBlock("embed.weight", (11, 4), indices, torch.randn(3, 4, 4))
    found = []
    for table_entries, cache_bytes in ((44, 1 << 20), (43, 1 << 20), (44, 0)):
        monkeypatch.setattr(sparse_sums, "TABLE_ENTRIES", table_entries)
        state = Sparse(40, nonzeros=2, cache_bytes=cache_bytes).init({"embed.weight": (11, 4)})
        found.append(state.zeros(3))
        Sparse(40, nonzeros=2).add(state, block, found[-1])
        assert state.cache.used == (2 * 44 * 8 if table_entries == 44 and cache_bytes else 0)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


SORTED = [Sparse(40), Sparse(40, nonzeros=3), Sparse(60, nonzeros=2, per_layer=True)]


@pytest.mark.parametrize("projection", SORTED, ids=repr)
@pytest.mark.parametrize("small_table", [0, 1 << 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sorted_sums_are_those_of_slices(projection, small_table, dtype, monkeypatch):
    """What runs on CUDA, here on a CPU: several tiles, and pieces that cover them in part."""
    blocks = example_blocks(batch_size=4, dtype=dtype)
    expected = project(projection, blocks, dtype=dtype)
    monkeypatch.setattr(sparse_sums, "choose_way", lambda device, dtype: "sorted")
    monkeypatch.setattr(sparse_sums, "SORTED_ENTRIES", 7)
    monkeypatch.setattr(pieces, "PIECE_ENTRIES", 50)
    monkeypatch.setattr(sparse_sums, "PIECE_ENTRIES", 50)
    monkeypatch.setattr(pieces, "SMALL_TABLE", small_table)
    got = project(projection, blocks, dtype=dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("piece_entries", [1, 3 * 128 * 4, 1 << 24])
@pytest.mark.parametrize("width", [1, 5, 128, 130])
def test_tokens_in_pieces_are_the_rows_that_they_touch(width, piece_entries, monkeypatch):
    """What runs on CUDA, here on a CPU: pieces of tokens, whose rows may be in two of them, and rows that are left over."""
    indices = torch.randint(0, 9, (3, 14)) ** 2
    block = IndexBlock("t", (70, width), indices, torch.randn(3, 14, width, dtype=torch.float64))
    monkeypatch.setattr(pieces, "PIECE_ENTRIES", piece_entries)
    found, count = torch.zeros(3, 70, width, dtype=torch.float64), 0
    for rows_u, values_BuC in pieces._touched_by_tokens(block):
        assert values_BuC.shape == (3, len(rows_u), width)
        found.index_add_(1, rows_u, values_BuC)
        count += 1
    torch.testing.assert_close(found, block.dense(), rtol=1e-12, atol=1e-12)
    assert count == {1: 42, 3 * 128 * 4: -(-42 // (4 if width <= 128 else 3)), 1 << 24: 1}[piece_entries]


@pytest.mark.parametrize("way", ["slices", "sorted"])
@pytest.mark.parametrize("small_table", [0, 1 << 18])
@pytest.mark.parametrize("table_entries", [0, 1 << 22])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)], ids=str)
@pytest.mark.parametrize("projection", [Sparse(6), Rademacher(6)], ids=repr)
def test_no_tokens_give_nothing(projection, shape, table_entries, small_table, way, monkeypatch):
    monkeypatch.setattr(sparse_sums, "choose_way", lambda device, dtype: way)
    monkeypatch.setattr(sparse_sums, "TABLE_ENTRIES", table_entries)
    monkeypatch.setattr(pieces, "SMALL_TABLE", small_table)
    state = projection.init({"t": (40, 5)})
    out = state.zeros(shape[0])
    projection.add(
        state, IndexBlock("t", (40, 5), torch.zeros(*shape, dtype=torch.int64), torch.zeros(*shape, 5)), out
    )
    assert not out.any()


def _exact_layers(projection):
    state = projection.init(SHAPES)
    return {name.rpartition(".")[0] for name, place in state.placements.items() if place.exact}


@pytest.mark.parametrize("projection", KINDS, ids=repr)
def test_large_outer_products_come_in_pieces(projection, monkeypatch):
    block = OuterBlock(
        "fc.weight", (6, 8), *(torch.randn(2, 2, 3, size, dtype=torch.float64) for size in (3, 8))
    )
    state = projection.init({"fc.weight": (6, 8)}, dtype=torch.float64)
    expected, got = state.zeros(2), state.zeros(2)
    projection.add(state, DenseBlock("fc.weight", (6, 8), block.dense()), expected)
    monkeypatch.setattr(pieces, "PIECE_ENTRIES", 33)
    assert [start for start, _ in pieces.dense_pieces(block)] == [0, 16, 24, 40]
    projection.add(state, block, got)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


def test_gaussian_entries_are_normal():
    state = Gaussian(400, seed=1).init({"w": (500,)}, dtype=torch.float64)
    entries = Gaussian(400, seed=1).matrix(state, "w").flatten() * 400**0.5
    count = entries.numel()
    for power, (moment, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
        assert abs((entries**power).mean() - moment) < 5 * (variance / count) ** 0.5
    assert 4 < entries.abs().max() < 6.77


@pytest.mark.parametrize("kind", [Rademacher, Gaussian, Sparse])
def test_other_keys_give_uncorrelated_matrices(kind):
    shapes = {"a.weight": (20, 30), "b.weight": (20, 30)}
    drawn = []
    for seed in (0, 1, -1):
        for checkpoint in (0, 1):
            state = kind(64, seed).init(shapes, checkpoint=checkpoint, dtype=torch.float64)
            drawn += [kind(64, seed).matrix(state, name).flatten() for name in shapes]
    stacked = torch.stack(drawn)
    stacked = stacked / stacked.norm(dim=1, keepdim=True)
    correlation = stacked @ stacked.T - torch.eye(len(drawn), dtype=torch.float64)
    # The sparse kind has the same variance: one block of 64 entries in 64 meets its like, and rarely two of ten do.
    limit = 5 / (600 * 64) ** 0.5 if kind is not Sparse else 5 * (2 * 64) ** 0.5 / 600
    assert correlation.square().sum() / (len(drawn) * (len(drawn) - 1)) < 2 / (600 * 64)
    assert correlation.abs().max() < limit


def test_one_parameter_does_not_depend_on_the_others():
    alone = Rademacher(40).init({"fc.weight": (5, 8)})
    among = Rademacher(40).init(SHAPES)
    assert torch.equal(Rademacher(40).matrix(alone, "fc.weight"), Rademacher(40).matrix(among, "fc.weight"))


@pytest.mark.parametrize("checkpoint", [0, 1])
def test_identity_is_the_concatenation(checkpoint):
    blocks = example_blocks()
    state = Identity().init(SHAPES, checkpoint=checkpoint, dtype=torch.float64)
    out = state.zeros(3)
    for block in blocks:
        Identity().add(state, block, out)
    torch.testing.assert_close(out, flat_gradients(blocks), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    "projection", [Kronecker(500), *(kind(500, per_layer=True) for kind in (Rademacher, Sparse))]
)
def test_more_columns_than_numbers_keeps_them_all(projection):
    torch.testing.assert_close(project(projection, example_blocks()), project(Identity(), example_blocks()))


def test_empty_batch():
    for projection in KINDS:
        blocks = example_blocks(batch_size=0)
        blocks = [block for block in blocks if block.name != "conv.weight"]
        assert project(projection, blocks).shape == (0, projection.output_dim(SHAPES))
