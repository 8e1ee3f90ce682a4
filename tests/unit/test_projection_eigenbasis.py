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
    Moments,
    factors_from_tensors,
    factors_to_tensors,
    from_fingerprint,
    joined,
)
from trak.projection.leading import largest
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
@pytest.mark.parametrize("table", [1 << 18, 0], ids=["small", "large table"])
@pytest.mark.parametrize("piece", [1 << 24, 100], ids=["whole", "example by example"])
def test_factors_are_those_of_dense_gradients(kind, largest_side, table, piece, monkeypatch):
    monkeypatch.setattr("trak.projection.pieces.SMALL_TABLE", table)
    monkeypatch.setattr("trak.projection.turning.PIECE_ENTRIES", piece)
    batches = drawn_batches()
    gradients_NP, weights_N = gradients_and_weights(batches)
    found = fitted(batches, FactorOptions(kind, None, largest_side))
    expected = reference_factors(gradients_NP, weights_N, SHAPES, kind=kind, largest_side=largest_side)
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
        ConvBlock("p", (6, 1, 3), draw(5, 2, 4), draw(5, 6, 4), **{**plain, "groups": 2}),
    ]


@pytest.mark.parametrize(
    "block", many_blocks(), ids=lambda block: f"{type(block).__name__}{block.batch_size}"
)
@pytest.mark.parametrize("largest_side", [2048, 5, 2], ids=["turned", "rows not turned", "not turned"])
@pytest.mark.parametrize("piece", [1 << 24, 30])
def test_every_kind_of_block_is_treated_as_a_dense_one(block, largest_side, piece, monkeypatch):
    monkeypatch.setattr("trak.projection.turning.PIECE_ENTRIES", piece)
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
