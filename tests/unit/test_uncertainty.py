"""Standard errors over checkpoints: against the jackknife written out, and closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trak
from trak import ArrayScores, Attribution, InputError
from trak.scores import KernelScores, Member
from trak.uncertainty import StandardErrors, jackknife, standard_errors

N, T, K = 37, 4, 5


class Features:
    def __init__(self, features):
        self.features, self.num_rows = features, len(features)

    def read(self, start, stop):
        return Features(self.features[start:stop])


def make(checkpoints=4, dtype=torch.float64):
    """An attribution as TRAK's, and its kernels [M, N, T] and weights [M, N]."""
    members = tuple(
        Member(Features(torch.randn(N, K, dtype=dtype)), torch.randn(T, K, dtype=dtype))
        for _ in range(checkpoints)
    )
    weights = torch.rand(checkpoints, N, dtype=dtype)
    scores = KernelScores(members, weights.mean(0), torch.device("cpu"))
    attribution = Attribution(
        scores,
        members=tuple(scores.member(m, weights[m]) for m in range(checkpoints)),
        info={"method": "TRAK"},
    )
    kernels = torch.stack([member.rows.features @ member.solved_TK.T for member in members])
    return attribution, kernels, weights


def by_definition(kernels, weights):
    """The estimator itself on each set of all checkpoints but one."""
    count = len(kernels)
    left_out = []
    for m in range(count):
        kept = [other for other in range(count) if other != m]
        left_out.append(kernels[kept].mean(0) * weights[kept].mean(0)[:, None])
    left_out = torch.stack(left_out)
    return ((count - 1) / count * ((left_out - left_out.mean(0)) ** 2).sum(0)).sqrt()


@pytest.mark.parametrize("checkpoints", [2, 3, 10])
def test_it_is_the_jackknife_of_the_product_of_means(checkpoints):
    attribution, kernels, weights = make(checkpoints)
    torch.testing.assert_close(
        attribution.scores.tensor(), kernels.mean(0) * weights.mean(0)[:, None], rtol=1e-12, atol=1e-14
    )
    errors = attribution.standard_error
    assert errors.shape == (N, T)
    expected = by_definition(kernels, weights)
    torch.testing.assert_close(errors.tensor(), expected, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(torch.cat([block for _, block in errors.blocks(7)]), expected)
    torch.testing.assert_close(errors[3:9, [2, 0]], expected[3:9][:, [2, 0]])
    assert errors.read(5, 5).shape == (0, T)


def test_few_rows_at_a_time_give_the_same(monkeypatch):
    attribution, kernels, weights = make()
    monkeypatch.setattr("trak.uncertainty.BLOCK_SCORES", 3 * T * 4)
    read = []
    original = KernelScores.read
    monkeypatch.setattr(KernelScores, "read", lambda *a: read.append(a[2] - a[1]) or original(*a))
    torch.testing.assert_close(attribution.standard_error.tensor(), by_definition(kernels, weights))
    assert max(read) == 3


def test_of_a_plain_mean_it_is_the_deviation_over_the_root():
    parts = torch.randn(6, N, T, dtype=torch.float64)
    attribution = Attribution(ArrayScores(parts.mean(0)), members=tuple(ArrayScores(part) for part in parts))
    torch.testing.assert_close(attribution.standard_error.tensor(), parts.std(0) / math.sqrt(6))


def test_weights_that_do_not_differ_only_scale():
    kernels = torch.randn(5, N, T, dtype=torch.float64)
    weights = torch.full((5, 1, 1), 0.3, dtype=torch.float64)
    torch.testing.assert_close(jackknife(kernels, weights), 0.3 * jackknife(kernels, None))
    torch.testing.assert_close(jackknife(kernels, None), kernels.std(0) / math.sqrt(5))


@settings(max_examples=30)
@given(count=st.integers(2, 8), seed=st.integers(0, 1000), scale=st.floats(0.01, 100))
def test_order_does_not_matter_and_scale_does(count, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    kernels = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    weights = torch.rand(count, 6, generator=generator, dtype=torch.float64)
    order = torch.randperm(count, generator=generator)
    error = jackknife(kernels, weights)
    torch.testing.assert_close(jackknife(kernels[order], weights[order]), error)
    torch.testing.assert_close(jackknife(scale * kernels, weights), scale * error)
    assert (jackknife(kernels[:1].expand(count, -1), weights[:1].expand(count, -1)) < 1e-12).all()


def test_it_covers_what_other_checkpoints_would_change():
    """Of kernels and weights that are correlated, where errors of each apart would be wrong."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(400, 20, generator=generator, dtype=torch.float64)
    kernels = 2 + shared + 0.3 * torch.randn(400, 20, generator=generator, dtype=torch.float64)
    weights = 1 - 0.3 * shared
    actual = float((kernels.mean(1) * weights.mean(1)).std())
    estimated = jackknife(kernels.T, weights.T).square().mean().sqrt()
    assert float(estimated) == pytest.approx(actual, rel=0.1)
    apart = (
        jackknife(kernels.T, None) ** 2 * weights.mean() ** 2 + jackknife(weights.T, None) ** 2 * 4
    ).mean()
    assert apart.sqrt() > 1.5 * actual


# Some rows of each target


def test_at_is_each_targets_own_rows():
    attribution, kernels, weights = make()
    values, errors = kernels.mean(0) * weights.mean(0)[:, None], by_definition(kernels, weights)
    rows = torch.randint(N, (T, 6))
    for scores, expected in (
        (attribution.scores, values),
        (attribution.standard_error, errors),
        (ArrayScores(values.numpy()), values),
        (attribution.scores.soft_threshold(0.2), values.sign() * (values.abs() - 0.2).clamp_min(0)),
        (attribution.soft_threshold(0.5).scores, values.sign() * (values.abs() - 0.5 * errors).clamp_min(0)),
    ):
        torch.testing.assert_close(scores.at(rows), expected.T.gather(1, rows))
        torch.testing.assert_close(
            scores.select_targets(torch.tensor([2, 0])).at(rows[:2]), expected.T[[2, 0]].gather(1, rows[:2])
        )
    assert attribution.scores.at(torch.zeros(T, 0, dtype=torch.int64)).shape == (T, 0)
    ranking = attribution.top(5)
    torch.testing.assert_close(attribution.scores.at(ranking.rows), ranking.scores)


def test_at_over_several_blocks(monkeypatch):
    attribution, kernels, weights = make()
    monkeypatch.setattr("trak.scores.DEFAULT_BLOCK_ROWS", 5)
    monkeypatch.setattr("trak.scores.PAIRS_AT_ONCE", 2)
    monkeypatch.setattr("trak.scores.ROWS_PER_READ", 1)
    rows = torch.randint(N, (T, 9))
    expected = (kernels.mean(0) * weights.mean(0)[:, None]).T.gather(1, rows)
    torch.testing.assert_close(attribution.scores.at(rows), expected)


def test_few_rows_are_read_alone(monkeypatch):
    attribution, kernels, weights = make()
    read = []
    original = Features.read
    monkeypatch.setattr(Features, "read", lambda self, a, b: read.append(b - a) or original(self, a, b))
    rows = torch.tensor([[0], [30], [30], [0]])
    expected = (kernels.mean(0) * weights.mean(0)[:, None]).T.gather(1, rows)
    monkeypatch.setattr("trak.scores.ROWS_PER_READ", 3)
    torch.testing.assert_close(attribution.scores.at(rows), expected)
    assert read == [1, 1] * 4


@pytest.mark.parametrize(
    "rows",
    [
        torch.zeros(T, dtype=torch.int64),
        torch.zeros(T - 1, 2, dtype=torch.int64),
        torch.zeros(T, 2),
        torch.full((T, 2), N),
        torch.full((T, 2), -1),
    ],
)
def test_rows_that_are_none(rows):
    with pytest.raises(InputError, match="rows must"):
        make()[0].scores.at(rows)


# Thresholds


@pytest.mark.parametrize("z", [0, 0.5, 2.0])
def test_soft_thresholding_by_standard_errors(z):
    attribution, kernels, weights = make()
    values, errors = kernels.mean(0) * weights.mean(0)[:, None], by_definition(kernels, weights)
    shrunk = attribution.soft_threshold(z)
    expected = values.sign() * (values.abs() - z * errors).clamp_min(0)
    torch.testing.assert_close(shrunk.scores.tensor(), expected)
    torch.testing.assert_close(shrunk.scores[:, 1], expected[:, 1])
    assert shrunk.info == {"method": "TRAK", "soft_threshold_standard_errors": z}
    assert (expected == 0).double().mean() >= (values.abs() < z * errors).double().mean()
    assert not shrunk.has_self_influence
    with pytest.raises(InputError, match="at least 2"):
        _ = shrunk.standard_error


def test_half_precision_features_and_saving(tmp_path):
    attribution, kernels, weights = make(dtype=torch.float32)
    shrunk = attribution.soft_threshold(1.0)
    loaded = Attribution.load(shrunk.save(tmp_path / "saved"))
    torch.testing.assert_close(loaded.scores.tensor(), shrunk.scores.tensor())
    torch.testing.assert_close(
        attribution.standard_error.tensor(), by_definition(kernels, weights), rtol=1e-4, atol=1e-6
    )


def test_one_checkpoint_has_no_standard_error(tmp_path):
    attribution, _, _ = make(1)
    for one in (attribution, Attribution.load(make()[0].save(tmp_path / "saved"))):
        with pytest.raises(InputError, match=r"at least 2 of them, got [01]"):
            _ = one.standard_error
        with pytest.raises(InputError, match="at least 2"):
            one.soft_threshold()


@pytest.mark.parametrize("z", [-1, math.nan, math.inf, "auto"])
def test_a_wrong_number_of_standard_errors(z):
    with pytest.raises(InputError, match="z must be"):
        make()[0].soft_threshold(z)


# What people see


def test_tables_have_the_errors_of_their_rows():
    attribution, kernels, weights = make()
    expected = by_definition(kernels, weights).numpy()
    table = attribution.to_pandas(3)
    np.testing.assert_allclose(table.standard_error, expected[table.row, table.target])
    assert "standard_error" not in make(1)[0].to_pandas(3)
    shown = attribution._repr_html_()
    first = int(attribution.top(1).rows[0, 0])
    assert (
        f"{first}&nbsp;({float(attribution.scores[first, 0]):+.3g}&nbsp;±&nbsp;{expected[first, 0]:.1g})"
        in shown
    )
    assert "±" not in make(1)[0]._repr_html_()


def test_of_a_real_attribution():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 3)).double()
    inputs, labels = torch.randn(20, 6, dtype=torch.float64), torch.arange(20) % 3
    states = [
        {name: tensor + 0.3 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
        for _ in range(3)
    ]
    attribution = trak.attribute(
        model,
        (inputs, labels),
        (inputs[:4] + 0.1, labels[:4]),
        task="image_classification",
        checkpoints=states,
        damping=0.5,
    )
    kernels = torch.stack(
        [
            trak.scores.KernelScores(member.members, torch.ones(20), member.device).tensor()
            for member in attribution.members
        ]
    )
    weights = torch.stack([member.weights for member in attribution.members])
    torch.testing.assert_close(attribution.standard_error.tensor(), by_definition(kernels, weights))
    assert isinstance(standard_errors(attribution.members), StandardErrors)
