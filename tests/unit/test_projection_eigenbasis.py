"""Projections fitted to gradients: the fast ways against dense float64 formulas."""

import json
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trak
from trak.blocks import ConvBlock, DenseBlock, IndexBlock, OuterBlock
from trak.errors import ProjectionError
from trak.projection import (
    FactorOptions,
    Factors,
    Moments,
    factors_from_tensors,
    factors_to_tensors,
    from_fingerprint,
    joined,
    moments,
)
from trak.projection.entries import Entries, leading_to_tensors
from trak.projection.leading import largest
from trak.projection.moments import _add_moments, _stays_factored
from trak.projection.turning import is_outer
from trak.testing.factors import Known, reference_factors, reference_features, reference_kernel
from trak.testing.projection import CHECKS, SHAPES, example_blocks, flat_gradients

OPTIONS = FactorOptions("ekfac", None, 2048)


def fitted(batches, options=OPTIONS, shapes=SHAPES):
    """Factors by the two passes; `batches` are (blocks, weights)."""
    together = []
    for blocks, weights_B in batches:
        found = {}
        for block in blocks:
            found.setdefault(block.name, []).append(block)
        together.append(({name: joined(several) for name, several in found.items()}, weights_B))
    moments = Moments.zeros(shapes, options, device=torch.device("cpu"), dtype=torch.float64)
    for blocks, weights_B in together:
        moments.add(blocks, weights_B)
    squares = moments.turned()
    if squares.needed:
        for blocks, weights_B in together:
            squares.add(blocks, weights_B)
    return squares.factors()


def drawn_batches(count=3, batch_size=5):
    generator = torch.Generator().manual_seed(7)
    return [
        (
            example_blocks(batch_size, seed=seed),
            torch.rand(batch_size, generator=generator, dtype=torch.float64),
        )
        for seed in range(count)
    ]


def gradients_and_weights(batches):
    return (
        torch.cat([flat_gradients(blocks) for blocks, _ in batches]),
        torch.cat([weights_B for _, weights_B in batches]),
    )


FACTORS = fitted(drawn_batches())
LONG = fitted(drawn_batches(), FactorOptions("ekfac", None, 7))


# Not those of random maps and of equality: nothing is drawn for a checkpoint, and factors are no part of the configuration.
LINEAR_CHECKS = [
    check
    for check in CHECKS
    if check.__name__ not in ("check_reproducible", "check_unbiased", "check_configuration")
]


@pytest.mark.parametrize("check", LINEAR_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(
    ("projection", "factors"),
    [
        pytest.param(projection, factors, id=f"{projection.kind}-{index}")
        for index, (projection, factors) in enumerate(
            [
                (trak.Eigenbasis(20), FACTORS),
                (trak.Eigenbasis(1), FACTORS),
                (trak.Eigenbasis(1000, whitening=None), FACTORS),
                (trak.Eigenbasis(60, whitening=0.1), LONG),
                (trak.Whitened(trak.Sparse(20)), FACTORS),
                (trak.Whitened(trak.Kronecker(40), whitening=0.5), LONG),
                (trak.Whitened(trak.Rademacher(9), factors="kfac"), FACTORS),
                (trak.Whitened(trak.Identity()), LONG),
            ]
        )
    ],
)
def test_contract(projection, factors, check):
    check(Known(projection, factors))


@pytest.mark.parametrize("kind", ["ekfac", "kfac"])
@pytest.mark.parametrize("largest_side", [2048, 7], ids=["turned", "long sides not turned"])
@pytest.mark.parametrize("largest_vector", [512, 2], ids=["vectors turned", "long vectors not turned"])
@pytest.mark.parametrize("panel", [128, 2], ids=["one panel", "panels"])
@pytest.mark.parametrize("piece", [1 << 24, 100], ids=["whole", "example by example"])
def test_factors_are_those_of_dense_gradients(kind, largest_side, largest_vector, panel, piece, monkeypatch):
    monkeypatch.setattr("trak.projection.factors.LARGEST_VECTOR", largest_vector)
    monkeypatch.setattr("trak.projection.moments.PANEL_ROWS", panel)
    monkeypatch.setattr("trak.projection.turning.PIECE_ENTRIES", piece)
    batches = drawn_batches()
    gradients_NP, weights_N = gradients_and_weights(batches)
    found = fitted(batches, FactorOptions(kind, None, largest_side))
    options = {"largest_side": largest_side, "largest_vector": largest_vector}
    expected = reference_factors(gradients_NP, weights_N, SHAPES, kind=kind, **options)
    for name in SHAPES:
        torch.testing.assert_close(found[name].eigenvalues, expected[name].eigenvalues, rtol=1e-9, atol=1e-12)
        assert found[name].floor == pytest.approx(expected[name].floor)
        for side, other in zip(
            (found[name].rows, found[name].columns), (expected[name].rows, expected[name].columns)
        ):
            if side is not None:
                # Eigenvectors up to their signs.
                torch.testing.assert_close(
                    (side.T @ other).abs(), torch.eye(len(other)).double(), rtol=0, atol=1e-7
                )


@pytest.mark.parametrize("largest_side", [2048, 7], ids=["turned", "long sides not turned"])
@pytest.mark.parametrize("candidates", [1, 9, 40, 131, 132])
@pytest.mark.parametrize("cost", [0, 10**9], ids=["picked", "contracted"])
@pytest.mark.parametrize("piece", [1 << 24, 100], ids=["whole", "example by example"])
def test_candidates_are_measured_and_the_rest_is_scaled(largest_side, candidates, cost, piece, monkeypatch):
    monkeypatch.setattr("trak.projection.turning.PICK_COST", cost)
    monkeypatch.setattr("trak.projection.turning.PIECE_ENTRIES", piece)
    batches = drawn_batches()
    gradients_NP, weights_N = gradients_and_weights(batches)
    found = fitted(batches, FactorOptions("ekfac", None, largest_side, candidates))
    expected = reference_factors(
        gradients_NP, weights_N, SHAPES, largest_side=largest_side, candidates=candidates
    )
    every = reference_factors(gradients_NP, weights_N, SHAPES, largest_side=largest_side)
    for name in SHAPES:
        values_RC = found[name].eigenvalues
        torch.testing.assert_close(values_RC, expected[name].eigenvalues, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(values_RC.sum(), every[name].eigenvalues.sum())
        assert (values_RC >= 0).all()


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 131), st.integers(1, 20))
def test_few_candidates_keep_every_parameters_sum(seed, candidates, count):
    blocks = example_blocks(count, seed=seed)
    weights_N = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.01
    some = fitted([(blocks, weights_N)], FactorOptions("ekfac", None, 2048, candidates))
    every = fitted([(blocks, weights_N)])
    same = 0
    for name in SHAPES:
        torch.testing.assert_close(some[name].eigenvalues.sum(), every[name].eigenvalues.sum())
        gaps = (some[name].eigenvalues - every[name].eigenvalues).abs()
        same += int((gaps <= 1e-9 * every[name].eigenvalues.max()).sum())
    assert same >= candidates


def test_only_what_may_be_kept_is_turned(monkeypatch):
    """The second pass of a projection to few columns never turns a whole gradient."""
    wide = {"p": (60, 50)}
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(5, 1, 4, size, generator=generator) for size in (60, 50))
    batches = [([OuterBlock("p", (60, 50), left, right)], torch.ones(5))]
    options = trak.Eigenbasis(10).factor_options
    assert options.candidates == 40
    assert trak.Whitened(trak.Sparse(10)).factor_options.candidates is None
    every = fitted(batches, OPTIONS, wide)["p"].eigenvalues

    def never(*args):
        raise AssertionError("a whole gradient is turned")

    monkeypatch.setattr("trak.projection.turning.PICK_COST", 0)
    monkeypatch.setattr("trak.projection.turning.turn", never)
    monkeypatch.setattr("trak.projection.moments.turn", never)
    found = fitted(batches, options, wide)["p"].eigenvalues
    assert ((found - every).abs() < 1e-9).sum() >= 40
    # Of four times as many the kept ones are among the largest.
    assert found.flatten().topk(10).values.sum() > 0.9 * every.flatten().topk(10).values.sum()


@pytest.mark.parametrize("dim", [1, 13, 60, 132])
@pytest.mark.parametrize("whitening", [None, 0.3])
@pytest.mark.parametrize("largest_side", [2048, 7])
@pytest.mark.parametrize("cost", [0, 10**9], ids=["picked", "contracted"])
def test_eigenbasis_is_the_dense_formula(dim, whitening, largest_side, cost, monkeypatch):
    monkeypatch.setattr("trak.projection.turning.PICK_COST", cost)
    batches = drawn_batches()
    factors = fitted(batches, FactorOptions("ekfac", None, largest_side))
    projection = trak.Eigenbasis(dim, whitening=whitening, largest_side=largest_side)
    state = projection.init(SHAPES, factors=factors, dtype=torch.float64)
    blocks = batches[0][0]
    out_BK = state.zeros(5)
    for block in blocks:
        projection.add(state, block, out_BK)
    gradients_NP, weights_N = gradients_and_weights(batches)
    reference = reference_factors(gradients_NP, weights_N, SHAPES, largest_side=largest_side)
    expected = reference_features(gradients_NP[:5], reference, SHAPES, dim=dim, whitening=whitening)
    torch.testing.assert_close(out_BK.abs(), expected.abs(), rtol=1e-7, atol=1e-9)
    assert projection.output_dim(SHAPES) == dim


def many_blocks():
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    indices = torch.randint(6, (5, 4), generator=generator)
    plain = {"stride": (1,), "padding": (1,), "dilation": (1,), "groups": 1, "examples": 5}
    return [
        OuterBlock("p", (6, 3), draw(5, 1, 4, 6), draw(5, 1, 4, 3)),
        OuterBlock("p", (6, 3), draw(5, 1, 1, 6), draw(5, 1, 1, 3)),
        OuterBlock("p", (6, 3), draw(5, 2, 4, 3), draw(5, 2, 4, 3)),
        IndexBlock("p", (6, 3), indices, draw(5, 4, 3)),
        ConvBlock("p", (6, 1, 3), draw(5, 1, 4), draw(5, 6, 4), **plain),
        ConvBlock("p", (6, 1, 3), draw(5, 1, 40), draw(5, 6, 40), **plain),
        ConvBlock("p", (6, 1, 3), draw(10, 1, 4), draw(10, 6, 4), **plain),
        ConvBlock("p", (6, 3, 1, 1), draw(5, 3, 2, 2), draw(5, 6, 1, 2), (2, 1), (0, 0), (1, 1), 1, 5),
        IndexBlock("p", (6, 3), torch.randint(6, (5, 9), generator=generator), draw(5, 9, 3)),
        ConvBlock("p", (6, 1, 3), draw(5, 2, 4), draw(5, 6, 4), **{**plain, "groups": 2}),
    ]


@pytest.mark.parametrize(
    "block", many_blocks(), ids=lambda block: f"{type(block).__name__}{block.batch_size}"
)
@pytest.mark.parametrize("largest_side", [2048, 5, 2], ids=["turned", "rows not turned", "not turned"])
@pytest.mark.parametrize("piece", [1 << 24, 30])
@pytest.mark.parametrize("cost", [0, 10**9], ids=["picked", "contracted"])
def test_every_kind_of_block_is_treated_as_a_dense_one(block, largest_side, piece, cost, monkeypatch):
    monkeypatch.setattr("trak.projection.turning.PIECE_ENTRIES", piece)
    monkeypatch.setattr("trak.projection.turning.PICKED_AT_ONCE", piece)
    monkeypatch.setattr("trak.projection.turning.PICK_COST", cost)
    shapes = {"p": block.shape}
    dense = DenseBlock(block.name, block.shape, block.dense())
    weights_B = torch.rand(5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    options = FactorOptions("ekfac", None, largest_side)
    factors = fitted([([block], weights_B)], options, shapes)
    other = fitted([([dense], weights_B)], options, shapes)
    torch.testing.assert_close(factors["p"].eigenvalues, other["p"].eigenvalues)
    for projection in (
        trak.Eigenbasis(5, largest_side=largest_side),
        trak.Eigenbasis(18, largest_side=largest_side),
        trak.Whitened(trak.Identity(), largest_side=largest_side),
    ):
        state = projection.init(shapes, factors=factors, dtype=torch.float64)
        found_BK, expected_BK = state.zeros(5), state.zeros(5)
        projection.add(state, block, found_BK)
        projection.add(state, dense, expected_BK)
        torch.testing.assert_close(found_BK, expected_BK)


@pytest.mark.parametrize("block", many_blocks(), ids=lambda block: type(block).__name__)
@pytest.mark.parametrize("sides", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("is_factored", [True, False], ids=["factored", "formed"])
def test_moments_are_those_of_dense_gradients(block, sides, is_factored, monkeypatch):
    """Either way, and of a side that is not turned the diagonal."""
    monkeypatch.setattr(
        "trak.projection.moments._stays_factored", lambda block, *sides: is_factored and is_outer(block)
    )
    rows, columns = (
        torch.zeros((size, size) if is_turned else (size,), dtype=torch.float64)
        for size, is_turned in zip(block.matrix_shape, sides)
    )
    weights_B = torch.rand(5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    _add_moments(block, weights_B, rows, columns)
    matrices_BRC = block.dense().reshape(5, *block.matrix_shape)
    for found, formula in ((rows, "b,brc,bsc->rs"), (columns, "b,brc,brd->cd")):
        expected = torch.einsum(formula, weights_B, matrices_BRC, matrices_BRC)
        if found.ndim == 1:
            torch.testing.assert_close(found, expected.diagonal())
        else:
            torch.testing.assert_close(found.tril(), expected.tril())


def test_what_takes_the_fewest_multiplications_is_taken():
    few, many = (
        ConvBlock(
            "p",
            (32, 16, 3, 3),
            torch.randn(2, 16, n, n),
            torch.randn(2, 32, n, n),
            (1, 1),
            (1, 1),
            (1, 1),
            1,
            2,
        )
        for n in (2, 32)
    )
    grouped = ConvBlock("p", (32, 8, 3, 3), few.inputs, few.gradients, (1, 1), (1, 1), (1, 1), 2, 2)
    full, diagonal = torch.zeros(32, 32), torch.zeros(32)
    assert _stays_factored(few, full, torch.zeros(144, 144))
    assert _stays_factored(few, full, torch.zeros(144))
    assert not _stays_factored(many, full, torch.zeros(144, 144))
    assert not _stays_factored(grouped, full, torch.zeros(72, 72))
    # Where diagonals are all that is wanted there is little to do with the gradient.
    eight = ConvBlock("p", (32, 16, 1), torch.randn(2, 16, 8), torch.randn(2, 32, 8), (1,), (0,), (1,), 1, 2)
    assert _stays_factored(eight, full, torch.zeros(16, 16))
    assert not _stays_factored(eight, diagonal, torch.zeros(16))


@pytest.mark.parametrize("largest_side", [2048, 40], ids=["turned", "columns not turned"])
def test_a_convolution_of_few_positions_is_never_formed(largest_side, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    shapes = {"p": (24, 16, 3)}
    block = ConvBlock(
        "p",
        shapes["p"],
        torch.randn(5, 16, 2, generator=generator, dtype=torch.float64),
        torch.randn(5, 24, 2, generator=generator, dtype=torch.float64),
        (1,),
        (1,),
        (1,),
        1,
        5,
    )
    dense = [([DenseBlock("p", shapes["p"], block.dense())], torch.ones(5))]
    options = FactorOptions("ekfac", None, largest_side, 40)
    expected = fitted(dense, options, shapes)["p"].eigenvalues

    def never(self):
        raise AssertionError("the gradient is formed")

    monkeypatch.setattr(ConvBlock, "dense", never)
    found = fitted([([block], torch.ones(5))], options, shapes)
    torch.testing.assert_close(found["p"].eigenvalues, expected)
    projection = trak.Eigenbasis(10, largest_side=largest_side)
    state = projection.init(shapes, factors=found, dtype=torch.float64)
    out_BK = state.zeros(5)
    projection.add(state, block, out_BK)
    assert (out_BK != 0).any()


@pytest.mark.parametrize("kind", ["outer", "convolution", "two images of each example"])
@pytest.mark.parametrize("count", [1, 30, 200])
@pytest.mark.parametrize("piece", [1 << 24, 300])
def test_entries_by_rows_are_those_of_the_whole_product(kind, count, piece, monkeypatch):
    monkeypatch.setattr("trak.projection.turning.PIECE_ENTRIES", piece)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    plain = {"stride": (1,), "padding": (1,), "dilation": (1,), "groups": 1, "examples": 5}
    block = {
        "outer": lambda: OuterBlock("p", (21, 5, 3), draw(5, 1, 4, 21), draw(5, 1, 4, 15)),
        "convolution": lambda: ConvBlock("p", (21, 5, 3), draw(5, 5, 4), draw(5, 21, 4), **plain),
        "two images of each example": lambda: ConvBlock(
            "p", (21, 5, 3), draw(10, 5, 4), draw(10, 21, 4), **plain
        ),
    }[kind]()
    bases = [torch.linalg.qr(draw(size, size))[0] for size in (21, 15)]
    flat_k = torch.randperm(21 * 15, generator=generator)[:count].sort().values
    entries = Entries.of(Factors(*bases, draw(21, 15)), flat_k)
    expected_Bk = (bases[0].T @ block.dense().flatten(2) @ bases[1]).flatten(1)[:, flat_k]
    for multiplications in (0, 10**12):
        monkeypatch.setattr(
            "trak.projection.entries.multiplications", lambda *args, given=multiplications: given
        )
        found = list(entries.pieces(block))
        assert entries._goes_by_rows(block) == (multiplications > 0)
        assert len(found) > 1 or piece > 300
        torch.testing.assert_close(torch.cat([picked_bk for _, picked_bk in found]), expected_Bk)
    assert torch.cat([torch.arange(count)[group.entries] for group in entries.groups]).tolist() == [
        *range(count)
    ]
    assert sum(group.area for group in entries.groups) <= entries.rows.width * entries.columns.width


def test_rows_of_a_table_that_no_example_touches_are_not_looked_at(monkeypatch):
    """Nor is the gradient formed: a batch's rows are as many as its tokens."""
    sizes = []
    products = moments._add_products
    monkeypatch.setattr(
        moments, "_add_products", lambda one, *a, **k: (sizes.append(one.numel()), products(one, *a, **k))[1]
    )
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(300, (8, 6), generator=generator)
    block = IndexBlock("p", (300, 4), indices, torch.randn(8, 6, 4, generator=generator))
    fitted([([block], torch.ones(8))], shapes={"p": (300, 4)})
    assert max(sizes) <= 8 * 6 * 4


def test_blocks_of_one_parameter_are_summed_up():
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    table = IndexBlock("p", (6, 3), torch.randint(6, (4, 5), generator=generator), draw(4, 5, 3))
    outer = OuterBlock("p", (6, 3), draw(4, 1, 2, 6), draw(4, 1, 2, 3))
    grouped = OuterBlock("p", (6, 3), draw(4, 2, 2, 3), draw(4, 2, 2, 3))
    dense = DenseBlock("p", (6, 3), draw(4, 6, 3))
    for several, kind in [
        ([table, table], IndexBlock),
        ([table, outer, outer], OuterBlock),
        ([outer, grouped], DenseBlock),
        ([dense, table], DenseBlock),
    ]:
        found = joined(several)
        assert type(found) is kind
        torch.testing.assert_close(found.dense(), sum(block.dense() for block in several))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.floats(0.01, 10), st.sampled_from(["ekfac", "kfac"]), st.integers(2, 12))
def test_whitened_inner_products_are_those_of_ekfac_influence(seed, whitening, kind, count):
    generator = torch.Generator().manual_seed(seed)
    weights_N = torch.rand(count, generator=generator, dtype=torch.float64) + 0.01
    blocks = example_blocks(count, seed=seed)
    factors = fitted([(blocks, weights_N)], FactorOptions(kind, None, 2048))
    gradients_NP = flat_gradients(blocks)
    reference = reference_factors(gradients_NP, weights_N, SHAPES, kind=kind)
    expected_NN = reference_kernel(gradients_NP, reference, SHAPES, whitening=whitening)
    for projection in (
        trak.Whitened(trak.Identity(), whitening=whitening),
        trak.Eigenbasis(whitening=whitening),
    ):
        state = projection.init(SHAPES, factors=factors, dtype=torch.float64)
        out_NK = state.zeros(count)
        for block in blocks:
            projection.add(state, block, out_NK)
        torch.testing.assert_close(out_NK @ out_NK.T, expected_NN, rtol=1e-6, atol=1e-8)


def test_a_long_side_takes_no_square_of_it(monkeypatch):
    """A vocabulary's identity is never formed."""
    sizes = []
    eye = torch.eye
    monkeypatch.setattr(
        torch, "eye", lambda size, *args, **options: (sizes.append(size), eye(size, *args, **options))[1]
    )
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(50_000, (3, 4), generator=generator)
    table = IndexBlock("p", (50_000, 2), indices, torch.randn(3, 4, 2, generator=generator))
    head = OuterBlock(
        "p",
        (50_000, 2),
        torch.randn(3, 1, 2, 50_000, generator=generator),
        torch.randn(3, 1, 2, 2, generator=generator),
    )
    for blocks in ([table], [head], [table, head]):
        factors = fitted([(blocks, torch.ones(3))], shapes={"p": (50_000, 2)})
        for projection in (trak.Eigenbasis(100), trak.Whitened(trak.Sparse(100))):
            state = projection.init({"p": (50_000, 2)}, factors=factors)
            out_BK = state.zeros(3)
            for block in blocks:
                projection.add(state, block, out_BK)
            assert out_BK.isfinite().all()
            assert (out_BK != 0).any()
    assert max(sizes, default=0) < 1000


@pytest.mark.parametrize("whitening", [0, 0.05, 1])
def test_mean_squares_are_one_but_for_the_damping(whitening):
    batches = drawn_batches(count=40)
    factors = fitted(batches)
    projection = trak.Eigenbasis(30, whitening=whitening)
    state = projection.init(SHAPES, factors=factors, dtype=torch.float64)
    features = []
    for blocks, _ in batches:
        features.append(state.zeros(5))
        for block in blocks:
            projection.add(state, block, features[-1])
    weights_N = torch.cat([weights_B for _, weights_B in batches])
    squares_K = weights_N @ torch.cat(features) ** 2 / weights_N.sum()
    values_P = torch.cat([factors[name].eigenvalues.flatten() for name in SHAPES])
    means_P = torch.cat(
        [
            torch.full((prod(shape),), float(factors[name].eigenvalues.mean()))
            for name, shape in SHAPES.items()
        ]
    )
    order_K = values_P.argsort(descending=True, stable=True)[:30]
    kept_K = values_P[order_K]
    damping_K = (whitening * means_P[order_K] + factors["scale"].floor).clamp_min(float(kept_K[-1]))
    torch.testing.assert_close(squares_K, kept_K / (kept_K + damping_K), rtol=1e-6, atol=0)
    # The last one that is kept is halved at least.
    assert squares_K.min() <= 0.5 + 1e-9


def test_features_are_in_descending_order_and_fewer_are_a_part():
    unwhitened = trak.Eigenbasis(132, whitening=None)
    batches = drawn_batches()
    gradients_NP, weights_N = gradients_and_weights(batches)
    matrices = {}
    for dim in (132, 50):
        state = trak.Eigenbasis(dim, whitening=None).init(SHAPES, factors=FACTORS, dtype=torch.float64)
        matrices[dim] = torch.cat([unwhitened.matrix(state, name) for name in SHAPES])
    squares_K = weights_N @ (gradients_NP @ matrices[132]) ** 2
    assert (squares_K.diff() <= 1e-9 * squares_K[0]).all()
    torch.testing.assert_close(matrices[50], matrices[132][:, :50])


def test_the_first_of_equal_eigenvalues_come_first():
    values = torch.tensor([1.0, 0.0, 3.0, 0.0, 3.0, 0.0])
    assert largest(values, 5).tolist() == [2, 4, 0, 1, 3]
    assert largest(values, 2).tolist() == [2, 4]


def test_factors_go_through_named_tensors():
    tensors = factors_to_tensors(LONG)
    found = factors_from_tensors(tensors, SHAPES)
    for name, expected in LONG.items():
        assert found[name].floor == expected.floor
        for one, other in zip(
            (found[name].rows, found[name].columns, found[name].eigenvalues),
            (expected.rows, expected.columns, expected.eigenvalues),
        ):
            assert (one is None and other is None) or torch.equal(one, other)
    assert {name: prod(LONG[name].eigenvalues.shape) for name in SHAPES} == {
        name: prod(shape) for name, shape in SHAPES.items()
    }
    with pytest.raises(ProjectionError, match="belong to other parameters"):
        factors_from_tensors(tensors, {"other": (2, 3)})


@pytest.mark.parametrize("factors", [FACTORS, LONG], ids=["turned", "long sides not turned"])
@pytest.mark.parametrize("dim", [1, 13, 60, 200])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kept_entries_give_the_same_numbers(factors, dim, dtype):
    projection = trak.Eigenbasis(dim, whitening=0.3)
    tensors = projection.to_keep(SHAPES, factors)
    kept = projection.from_kept(SHAPES, tensors)
    states = [projection.init(SHAPES, factors=one, dtype=dtype) for one in (factors, kept)]
    blocks, found = example_blocks(5, seed=3), []
    for state in states:
        found.append(state.zeros(5))
        for block in blocks:
            projection.add(state, block, found[-1])
    assert torch.equal(found[0], found[1])
    assert states[0].chosen.keys() == states[1].chosen.keys()
    for name in SHAPES:
        assert torch.equal(projection.matrix(states[0], name), projection.matrix(states[1], name))
    # And once more from what is kept.
    again = leading_to_tensors(kept)
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)


def test_few_entries_keep_few_eigenvectors():
    shapes = {"p": (60, 50), "q": (40, 30)}
    generator = torch.Generator().manual_seed(0)
    batches = [
        (
            [
                OuterBlock(
                    name,
                    shape,
                    scale * torch.randn(5, 1, 4, shape[0], generator=generator),
                    torch.randn(5, 1, 4, shape[1], generator=generator),
                )
                for (name, shape), scale in zip(shapes.items(), (1, 1e-3))
            ],
            torch.ones(5),
        )
    ]
    factors = fitted(batches, trak.Eigenbasis(7).factor_options, shapes)
    tensors = trak.Eigenbasis(7).to_keep(shapes, factors)
    assert len(tensors["entries:p"]) == 7
    # All entries are of the first parameter, and nothing is kept of the other.
    assert sum(tensor.numel() for name, tensor in tensors.items() if name.endswith(":q")) == 0
    assert tensors["rows:p"].shape[1] <= 7
    assert tensors["columns:p"].shape[1] <= 7
    whole = factors_to_tensors(factors)
    assert sum(t.numel() for t in tensors.values()) < sum(t.numel() for t in whole.values()) / 10
    assert trak.Whitened(trak.Sparse(7)).to_keep(shapes, factors).keys() == whole.keys()


LEADING = trak.Eigenbasis(20).from_kept(SHAPES, trak.Eigenbasis(20).to_keep(SHAPES, FACTORS))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: trak.Eigenbasis(21).init(SHAPES, factors=LEADING), "kept entries are 20 of .* expected 21"),
        (lambda: trak.Eigenbasis(20).init({"scale": (3,)}, factors=LEADING), "fit factors for this model"),
        (lambda: trak.Whitened(trak.Sparse(4)).init(SHAPES, factors=LEADING), "needs whole factors"),
        (
            lambda: trak.Eigenbasis(20).from_kept(SHAPES, factors_to_tensors(FACTORS)),
            "there are no kept entries of parameter",
        ),
        (
            lambda: trak.Whitened(trak.Sparse(4)).from_kept(SHAPES, leading_to_tensors(LEADING)),
            "belong to other parameters",
        ),
        (
            lambda: trak.Eigenbasis(20).from_kept(
                {name: (*shape[:-1], shape[-1] + 1) if shape else () for name, shape in SHAPES.items()},
                leading_to_tensors(LEADING),
            ),
            "eigenvectors of lengths",
        ),
        (
            lambda: trak.Eigenbasis(20).from_kept(
                dict.fromkeys(SHAPES, (1,)),
                {
                    key: tensor
                    for key, tensor in leading_to_tensors(LEADING).items()
                    if not key.startswith(("rows", "columns"))
                },
            ),
            "kept entries of parameter",
        ),
    ],
)
def test_kept_entries_of_something_else_are_refused(make, match):
    with pytest.raises(ProjectionError, match=match):
        make()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: trak.Eigenbasis(0), "dim must be an int of at least 1"),
        (lambda: trak.Eigenbasis(whitening=-1), "whitening must be a number ≥ 0"),
        (lambda: trak.Eigenbasis(whitening=float("nan")), "whitening must be a number ≥ 0"),
        (lambda: trak.Eigenbasis(factors="shampoo"), '"ekfac" or "kfac"'),
        (lambda: trak.Eigenbasis(sample=0), "sample"),
        (lambda: trak.Eigenbasis(largest_side=0.5), "largest_side must be an int"),
        (lambda: trak.Whitened(trak.Eigenbasis()), "takes an ordinary projection"),
        (lambda: trak.Whitened("sparse"), "takes an ordinary projection"),
        (lambda: trak.Whitened(trak.Identity(), whitening=None), "whitening must be a number"),
        (lambda: trak.Eigenbasis().init(SHAPES), "fit_factors"),
        (lambda: trak.Whitened(trak.Sparse(4)).init(SHAPES), "there are no factors"),
        (lambda: trak.Eigenbasis().init({"new": (2,)}, factors=FACTORS), "no factors for parameter 'new'"),
        (
            lambda: trak.Eigenbasis().init({"scale": (2,)}, factors=FACTORS),
            "factors of parameter 'scale' have sizes",
        ),
        (lambda: trak.Eigenbasis().init({}, factors=FACTORS), "no parameters"),
        (lambda: fitted([(example_blocks(2), torch.zeros(2))]), "weights of the examples .* sum to 0.0"),
        (lambda: fitted([(example_blocks(2), torch.full((2,), torch.nan))]), "sum to nan"),
        (
            lambda: fitted([([DenseBlock("p", (2,), torch.zeros(3, 2))], torch.ones(3))], shapes={"p": (2,)}),
            "mean square .* is 0.0",
        ),
        (
            lambda: fitted(
                [([DenseBlock("p", (2,), torch.full((3, 2), torch.inf))], torch.ones(3))], shapes={"p": (2,)}
            ),
            "'p' are NaN or infinite",
        ),
    ],
)
def test_refusals(make, match):
    with pytest.raises(ProjectionError, match=match):
        make()


@pytest.mark.parametrize(
    "projection",
    [
        trak.Eigenbasis(7, whitening=None, factors="kfac", sample=None, largest_side=5),
        trak.Eigenbasis(),
        trak.Whitened(trak.Kronecker(9, seed=3), whitening=2.5),
    ],
    ids=repr,
)
def test_fingerprints_lead_back(projection):
    fingerprint = projection.fingerprint()
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    assert from_fingerprint(fingerprint) == projection
    assert hash(from_fingerprint(fingerprint)) == hash(projection)
