"""The whitening of examples/whitening.py is that of EK-FAC and K-FAC, written out densely in float64."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import trak
from trak.blocks import ConvBlock, DenseBlock, IndexBlock, OuterBlock
from trak.evaluation import Bank

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
import whitening  # noqa: E402
from whitening import Factors, Leading, Whitened, fit_factors  # noqa: E402

RATIO = 0.3


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 3)
    )
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    inputs = torch.randn(40, 2, 4, generator=generator, dtype=torch.float64)
    return model, (inputs, torch.randint(3, (40,), generator=generator))


def features(model, data, projection):
    fitted = trak.TRAK(model=model, task="image_classification", projection=projection).fit(data)
    rows = fitted.run.store.rows(0)
    return rows.read(0, rows.num_rows).features, rows.weights()


def dense_kernel(model, data, kind):
    """Σ_p g_p(i)ᵀ (F_p + λ_p I)⁻¹ g_p(j), each F_p [P, P] formed from Kronecker products."""
    gradients_NP, q_N = features(model, data, trak.Identity())
    weights_N = (q_N * (1 - q_N)).double() ** 0.5
    weights_N = weights_N / weights_N.sum()
    fishers, parts, start = [], [], 0
    for parameter in model.parameters():
        part_NP = gradients_NP[:, start : start + parameter.numel()]
        start += parameter.numel()
        matrices_NRC = part_NP.reshape(len(part_NP), parameter.shape[0], -1)
        rows_RR = torch.einsum("n,nrc,nsc->rs", weights_N, matrices_NRC, matrices_NRC)
        columns_CC = torch.einsum("n,nrc,nrd->cd", weights_N, matrices_NRC, matrices_NRC)
        fisher_PP = torch.kron(rows_RR, columns_CC) / columns_CC.trace()
        if kind == "ekfac":
            basis_PP = torch.kron(torch.linalg.eigh(rows_RR)[1], torch.linalg.eigh(columns_CC)[1])
            eigenvalues_P = (weights_N[:, None] * (part_NP @ basis_PP) ** 2).sum(0)
            fisher_PP = basis_PP @ eigenvalues_P.diag() @ basis_PP.T
        fishers.append(fisher_PP)
        parts.append(part_NP)
    floor = 1e-4 * sum(fisher_PP.trace() for fisher_PP in fishers) / gradients_NP.shape[1]
    kernel_NN = torch.zeros(len(q_N), len(q_N), dtype=torch.float64)
    for fisher_PP, part_NP in zip(fishers, parts):
        damping = RATIO * fisher_PP.trace() / len(fisher_PP) + floor
        damped_PP = fisher_PP + damping * torch.eye(len(fisher_PP), dtype=torch.float64)
        kernel_NN += part_NP @ torch.linalg.solve(damped_PP, part_NP.T)
    return kernel_NN


@pytest.mark.parametrize("kind", ["ekfac", "kfac"])
def test_whitened_inner_products_are_those_of_the_kronecker_factored_inverse(problem, kind):
    model, data = problem
    factors = fit_factors({"model": model, "task": "image_classification"}, data, model, kind=kind)
    whitened = Whitened(trak.Identity(), lambda _: factors, RATIO, kind)
    found, _ = features(model, data, whitened)
    torch.testing.assert_close(found @ found.T, dense_kernel(model, data, kind), rtol=1e-8, atol=1e-8)


def test_without_damping_every_whitened_entry_has_a_second_moment_of_one(problem):
    model, data = problem
    factors = fit_factors({"model": model, "task": "image_classification"}, data, model)
    factors = {name: replace(found, floor=0.0) for name, found in factors.items()}
    found, q_N = features(model, data, Whitened(trak.Identity(), lambda _: factors, 0.0, "ekfac"))
    weights_N = (q_N * (1 - q_N)) ** 0.5
    moments_P = (weights_N[:, None] * found**2).sum(0) / weights_N.sum()
    torch.testing.assert_close(moments_P, torch.ones_like(moments_P))


@pytest.mark.parametrize("inner", [trak.Identity(), trak.Sparse(7), trak.Kronecker(30)], ids=repr)
def test_unit_eigenvalues_in_the_standard_basis_change_nothing(problem, inner):
    model, data = problem
    factors = {}
    for name, parameter in model.named_parameters():
        rows, columns = parameter.shape[0], parameter[0].numel()
        eye = [torch.eye(size, dtype=torch.float64) for size in (rows, columns)]
        factors[name] = Factors(*eye, torch.ones(rows, columns, dtype=torch.float64))
    plain, _ = features(model, data, inner)
    found, _ = features(model, data, Whitened(inner, lambda _: factors, 0.0, "ekfac"))
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("ratio", [None, RATIO])
def test_leading_entries_are_the_largest_and_all_of_them_are_exact(problem, ratio):
    model, data = problem
    factors = fit_factors({"model": model, "task": "image_classification"}, data, model)
    size = sum(parameter.numel() for parameter in model.parameters())
    everything, q_N = features(model, data, Leading(size, lambda _: factors, ratio, "ekfac"))
    expected, _ = features(model, data, trak.Identity())
    if ratio is not None:
        expected, _ = features(model, data, Whitened(trak.Identity(), lambda _: factors, ratio, "ekfac"))
    torch.testing.assert_close(everything @ everything.T, expected @ expected.T)
    some, _ = features(model, data, Leading(9, lambda _: factors, ratio, "ekfac"))
    assert torch.equal(some, everything[:, :9])
    if ratio is None:
        moments_P = ((q_N * (1 - q_N)).double() ** 0.5 @ everything**2).tolist()
        assert moments_P[:20] == sorted(moments_P[:20], reverse=True)


def blocks():
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    indices = torch.randint(6, (5, 4), generator=generator)
    convolution = {"stride": (1,), "padding": (1,), "dilation": (1,), "groups": 1, "examples": 5}
    return [
        OuterBlock("p", (6, 3), draw(5, 1, 4, 6), draw(5, 1, 4, 3)),
        OuterBlock("p", (6, 3), draw(5, 2, 4, 3), draw(5, 2, 4, 3)),
        IndexBlock("p", (6, 3), indices, draw(5, 4, 3)),
        ConvBlock("p", (6, 1, 3), draw(5, 1, 4), draw(5, 6, 4), **convolution),
    ]


@pytest.mark.parametrize("block", blocks(), ids=lambda block: f"{type(block).__name__}{block.shape}")
@pytest.mark.parametrize("largest_side", [2048, 5], ids=["turned", "long side not turned"])
@pytest.mark.parametrize("table", [1 << 18, 0], ids=["small", "large table"])
def test_blocks_of_factors_are_whitened_as_dense_ones(block, largest_side, table, monkeypatch):
    monkeypatch.setattr("trak.projection.pieces.SMALL_TABLE", table)
    dense = DenseBlock(block.name, block.shape, block.dense())
    weights_B = torch.rand(5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = []
    for one in (block, dense):
        sides = [
            torch.zeros(side, side, dtype=torch.float64) if side <= largest_side else None for side in (6, 3)
        ]
        whitening._add_moments(one, weights_B, *sides)
        found.append(sides)
    for one, other in zip(*found):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)
    basis = [None if side is None else torch.linalg.eigh(side)[1] for side in found[1]]
    results = []
    for one in (block, dense):
        factors = Factors(*basis, torch.zeros(6, 3, dtype=torch.float64))
        whitening._add_squares(factors.turned(one), weights_B, factors.eigenvalues)
        kept = whitening._entries(factors.turned(one), torch.tensor([0, 7, 17]))
        results.append((factors.eigenvalues, factors.whitened(one, RATIO).dense(), kept))
    torch.testing.assert_close(results[0], results[1])


RECIPE = """
import torch

torch.manual_seed(0)
model = torch.nn.Linear(6, 3)
train_set = torch.randn(30, 6), torch.arange(30) % 3
targets = torch.randn(8, 6), torch.arange(8) % 3
task = "image_classification"
checkpoints = [{name: torch.randn_like(value) for name, value in model.state_dict().items()} for _ in range(3)]
"""


def test_the_trial_runs_and_compares_with_plain_features(tmp_path, monkeypatch):
    (tmp_path / "recipe.py").write_text(RECIPE)
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(12, 30, generator=generator) < 0.5
    Bank(masks=masks.numpy(), outputs=torch.randn(12, 1, 8, generator=generator).numpy()).save(
        tmp_path / "bank"
    )
    words = [tmp_path / "recipe.py", "--bank", tmp_path / "bank", "--what", "whitening", "--dim", "9"]
    words += ["--factors", "ekfac", "kfac", "--ratios", "1", "--save-dir", tmp_path / "kept"]
    words += ["--json", tmp_path / "result.json", "--average", "2", "--checkpoints", "1", "2"]
    monkeypatch.setattr(sys, "argv", ["alternatives.py", *map(str, words)])
    runpy.run_path(str(EXAMPLES / "alternatives.py"), run_name="__main__")
    rows = json.loads((tmp_path / "result.json").read_text())
    assert [row["checkpoints"] for row in rows] == [1] * 14 + [2] * 14
    plain = rows[0]
    assert (plain["name"], plain["gain_low"], plain["gain_high"]) == ("plain, Gram", 0, 0)
    for row in rows:
        assert row["gain_low"] <= row["gain_high"]
        assert -1 <= row["low"] <= row["high"] <= 1
    assert len({row["lds"] for row in rows[:14]}) > 7
