import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trak.errors import InputError, SingularGramError
from trak.precondition import (
    AutomaticDamping,
    FixedDamping,
    MarquardtDamping,
    RelativeDamping,
    accumulate_moments,
    fit_preconditioner,
    resolve_damping,
)
from trak.precondition.damping import GroupMoments


def moments(features, groups=None, rows=7, **options):
    outputs = torch.arange(len(features), dtype=features.dtype)
    blocks = [(features[i : i + rows], outputs[i : i + rows]) for i in range(0, len(features), rows)]
    return accumulate_moments(blocks, groups or [(0, features.shape[1])], **options)


def test_moments_are_the_products():
    features = torch.randn(30, 6, dtype=torch.float64)
    got = moments(features, [(0, 2), (2, 6)], product_dtype=torch.float64)
    torch.testing.assert_close(got.grams[1], features[:, 2:].T @ features[:, 2:])
    torch.testing.assert_close(got.cross[0], features[:, :2].T @ torch.arange(30, dtype=torch.float64))
    assert got.num_rows == 30
    assert got.outputs_square == sum(i * i for i in range(30))


@pytest.mark.parametrize("columns", [1, 4, 5, 9, 11])
def test_panels_below_the_diagonal_make_the_whole_matrix(columns, monkeypatch):
    monkeypatch.setattr("trak.precondition.gram.PANEL_COLUMNS", 4)
    features = torch.randn(30, 12, dtype=torch.float64)
    got = moments(features, [(0, columns), (columns, 12)], product_dtype=torch.float64)
    torch.testing.assert_close(got.grams[0], features[:, :columns].T @ features[:, :columns])
    torch.testing.assert_close(got.grams[1], features[:, columns:].T @ features[:, columns:])
    assert torch.equal(got.grams[1].tril(-4), got.grams[1].T.tril(-4))


def test_small_rows_are_not_lost_beside_large_ones():
    # In a float32 sum 1e8 + 1e-1 is 1e8: blocks are added in float64.
    features = torch.full((2001, 1), 0.1)
    features[0] = 1e4
    got = moments(features, rows=1)
    torch.testing.assert_close(float(got.grams[0]), 1e8 + 2000 * 0.01, rtol=1e-9, atol=0.0)


@settings(max_examples=25)
@given(
    rows=st.integers(1, 40), columns=st.integers(1, 8), damping=st.floats(1e-3, 1e3), seed=st.integers(0, 99)
)
def test_solve_and_leverage(rows, columns, damping, seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    fitted = fit_preconditioner(moments(features, product_dtype=torch.float64), FixedDamping(damping))
    inverse = torch.linalg.inv(features.T @ features + damping * torch.eye(columns, dtype=torch.float64))
    targets = torch.randn(3, columns, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(fitted.solve(targets), targets @ inverse, rtol=1e-7, atol=1e-9)
    leverage = fitted.leverage(features)
    torch.testing.assert_close(
        leverage, torch.einsum("ri,ij,rj->r", features, inverse, features), rtol=1e-7, atol=1e-9
    )
    assert (leverage >= 0).all() and (leverage <= 1 + 1e-9).all()


def test_groups_are_solved_apart():
    features = torch.randn(30, 6, dtype=torch.float64)
    fitted = fit_preconditioner(
        moments(features, [(0, 2), (2, 6)], product_dtype=torch.float64), FixedDamping(0.5)
    )
    targets = torch.randn(4, 6, dtype=torch.float64)
    expected = torch.cat(
        [
            targets[:, a:b]
            @ torch.linalg.inv(
                features[:, a:b].T @ features[:, a:b] + 0.5 * torch.eye(b - a, dtype=torch.float64)
            )
            for a, b in [(0, 2), (2, 6)]
        ],
        1,
    )
    torch.testing.assert_close(fitted.solve(targets), expected)


def test_damping_rules():
    features = torch.randn(50, 4, dtype=torch.float64)
    got = moments(features, product_dtype=torch.float64)
    trace = float((features**2).sum())
    rules = {
        0.3: 0.3,
        RelativeDamping(0.5): 0.5 * trace / 4,
        "auto": trace / 1000,
        AutomaticDamping(share=50): trace / 50,
    }
    for rule, expected in rules.items():
        assert fit_preconditioner(got, resolve_damping(rule)).dampings[0] == pytest.approx(expected)
    assert isinstance(resolve_damping("auto"), AutomaticDamping)
    # An ensemble of nine is damped a third as much.
    nine = fit_preconditioner(got, resolve_damping("auto"), num_checkpoints=9)
    assert nine.dampings[0] == pytest.approx(trace / 3000)


def automatic(features, **options):
    """λ of the automatic rule, and the effective dimension that it leaves."""
    num_checkpoints = options.pop("num_checkpoints", 1)
    got = moments(features, product_dtype=torch.float64)
    (damping,) = fit_preconditioner(
        got, AutomaticDamping(**options), num_checkpoints=num_checkpoints
    ).dampings
    eigenvalues = torch.linalg.eigvalsh(features.T @ features)
    return damping, float((eigenvalues / (eigenvalues + damping)).sum())


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 2**31), st.floats(0, 2), st.floats(0.3, 4), st.sampled_from([1, 3, 10]), st.floats(0.1, 10)
)
def test_automatic_damping_bounds_the_effective_dimension(seed, decay, directions, num_checkpoints, scale):
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, 91, dtype=torch.float64) ** -decay
    features = torch.randn(120, 90, dtype=torch.float64, generator=generator) * spectrum
    options = {"directions": directions, "num_checkpoints": num_checkpoints}
    damping, dimension = automatic(features, **options)
    bound = directions * 120**0.5 * num_checkpoints ** (1 / 3)
    by_trace, dimension_by_trace = automatic(features, **{**options, "directions": None})
    if dimension_by_trace <= bound:
        assert damping == by_trace
    else:
        assert damping > by_trace
        assert dimension == pytest.approx(bound, rel=1e-4)
    assert automatic(scale * features, **options)[0] == pytest.approx(scale**2 * damping, rel=1e-4)


def test_automatic_damping_of_a_flat_spectrum_by_hand():
    """Eigenvalues all 1: Σ w / (w + λ) = K / (1 + λ) is 2 √N M^⅓ = 80 where λ = 0.25."""
    features = torch.eye(100, dtype=torch.float64)
    got = GroupMoments(torch.eye(100, dtype=torch.float64), features[0], 400, 1.0, num_checkpoints=8)
    assert AutomaticDamping(directions=1).value(got) == pytest.approx(100 / 40 - 1)
    assert AutomaticDamping(directions=2).value(got) == pytest.approx(0.25)
    assert AutomaticDamping(directions=None).value(got) == pytest.approx(100 / 1000 / 8**0.5)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 2**31),
    st.sampled_from([0.0, 0.3, 2.0]),
    st.floats(10, 1e5),
    st.sampled_from([0.1, 4.0, None]),
    st.sampled_from([1, 3, 16]),
    st.booleans(),
)
def test_marquardt_damping_is_the_formula_group_by_group(
    seed, diagonal, share, directions, num_checkpoints, apart
):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(12, 6, dtype=torch.float64, generator=generator) * torch.arange(1, 7)
    targets = torch.randn(3, 6, dtype=torch.float64, generator=generator)
    groups = [(0, 2), (2, 6)] if apart else [(0, 6)]
    fits = moments(features, groups, product_dtype=torch.float64), {"num_checkpoints": num_checkpoints}
    fitted = fit_preconditioner(fits[0], MarquardtDamping(diagonal, share, directions), **fits[1])
    ridge = fit_preconditioner(fits[0], AutomaticDamping(share, directions), **fits[1])
    assert fitted.dampings == ridge.dampings
    for (start, stop), damping in zip(groups, fitted.dampings):
        part = features[:, start:stop]
        gram = part.T @ part
        expected = gram + diagonal * gram.diagonal().diag() + damping * torch.eye(stop - start)
        torch.testing.assert_close(
            fitted.solve(targets)[:, start:stop], targets[:, start:stop] @ torch.linalg.inv(expected)
        )
    leverage = fitted.leverage(features)
    assert (leverage >= 0).all() and (leverage <= len(groups) + 1e-9).all()


def test_marquardt_damping_divides_uncorrelated_columns_alike():
    """With ΦᵀΦ diagonal and λ nearly 0 every direction is a third of what it is without α = 2."""
    features = torch.diag(torch.tensor([3.0, 1.0, 0.1], dtype=torch.float64))
    got = moments(features, product_dtype=torch.float64)
    plain = fit_preconditioner(got, MarquardtDamping(0.0, share=1e12, directions=None)).solve(features)
    shared = fit_preconditioner(got, MarquardtDamping(2.0, share=1e12, directions=None)).solve(features)
    torch.testing.assert_close(3 * shared, plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [-1, float("nan"), float("inf"), "lots", None, True])
def test_bad_damping(bad):
    with pytest.raises(InputError, match="damping"):
        resolve_damping(bad)
    if isinstance(bad, float):
        with pytest.raises(InputError, match="ratio"):
            RelativeDamping(bad)
        with pytest.raises(InputError, match="share"):
            AutomaticDamping(share=bad)
        with pytest.raises(InputError, match="directions"):
            AutomaticDamping(directions=bad)
        with pytest.raises(InputError, match="diagonal must be a number ≥ 0; got"):
            MarquardtDamping(diagonal=bad)
        with pytest.raises(InputError, match="share must be a positive number; got"):
            MarquardtDamping(share=bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_cases(dtype):
    wide = torch.randn(5, 9, dtype=dtype)
    with pytest.raises(SingularGramError, match="only 5 training rows"):
        fit_preconditioner(moments(wide, product_dtype=dtype), FixedDamping(0.0))
    zero = torch.randn(40, 4, dtype=dtype)
    zero[:, 2] = 0
    repeated = torch.randn(40, 4, dtype=dtype)
    repeated[:, 3] = repeated[:, 0]
    for features in (zero, repeated):
        with pytest.raises(SingularGramError, match=r"columns 0 to 3\) is singular in working precision"):
            fit_preconditioner(
                moments(features, product_dtype=dtype), FixedDamping(0.0), where="checkpoint 1"
            )
        fit_preconditioner(moments(features, product_dtype=dtype), AutomaticDamping())
        fit_preconditioner(moments(features, product_dtype=dtype), MarquardtDamping())
    # The diagonal alone makes a wide matrix definite.
    fit_preconditioner(moments(wide, product_dtype=dtype), MarquardtDamping(1.0, share=1e15, directions=None))


def test_all_zero_features_are_refused_even_with_automatic_damping():
    with pytest.raises(SingularGramError):
        fit_preconditioner(moments(torch.zeros(10, 3)), AutomaticDamping())
