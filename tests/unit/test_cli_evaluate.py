"""`trak evaluate`: figures of the library, as a table and as JSON."""

import json
import re

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import trak
from trak.cli import app
from trak.evaluation import Bank, calibration_slope, noise_ceiling, random_subsets

N, S, R, T = 20, 12, 2, 4


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")

    def run(*words, code=0):
        result = CliRunner().invoke(app, ["evaluate", *map(str, words)])
        assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
        return result

    return run


@pytest.fixture
def made(tmp_path):
    """Scores of six target rows, and a bank of four of them, where the scores are noisy truth."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(N, 6, generator=generator, dtype=torch.float64)
    rows = torch.tensor([5, 0, 3, 2])
    masks = random_subsets(N, S, seed=1)
    noise = torch.randn(S, R, T, generator=generator, dtype=torch.float64)
    outputs = (masks.double() @ scores[:, rows])[:, None] + noise
    bank = Bank(masks=masks, outputs=outputs, target_rows=rows)
    bank.save(tmp_path / "bank")
    np.save(tmp_path / "scores.npy", scores[:, rows].numpy())
    np.save(tmp_path / "all.npy", scores.numpy())
    return tmp_path, scores[:, rows], bank


def expected(scores, bank):
    lds, slope = bank.lds(scores), calibration_slope(scores, bank.masks, bank.outputs)
    ceiling = noise_ceiling(bank.outputs)
    return {
        "lds": (lds.mean, lds.low, lds.high),
        "calibration_slope": (slope.slope, slope.low, slope.high),
        "noise_ceiling": (ceiling.mean, ceiling.low, ceiling.high),
    }


def test_json_is_what_the_library_computes(run, made):
    folder, scores, bank = made
    values = json.loads(run(folder / "scores.npy", folder / "bank", "--json").stdout)
    assert (values["num_train"], values["num_subsets"], values["models_per_subset"]) == (N, S, R)
    for measure, (value, low, high) in expected(scores, bank).items():
        got = values[measure]
        assert got["slope" if measure == "calibration_slope" else "mean"] == pytest.approx(value)
        assert (got["low"], got["high"]) == pytest.approx((low, high))


def test_the_table_has_the_same_figures(run, made):
    folder, scores, bank = made
    result = run(folder / "scores.npy", folder / "bank", "--out", folder / "result.json")
    for value, low, high in expected(scores, bank).values():
        assert f"{value:.3f} {low:.3f} to {high:.3f}" in re.sub(" +", " ", result.stdout)
    assert "20 training rows, 4 targets, 12 subsets × 2 models" in result.stderr
    assert "% of what the noise of retraining allows" in result.stderr
    written = json.loads((folder / "result.json").read_text())
    assert written == json.loads(run(folder / "scores.npy", folder / "bank", "--json").stdout)


def test_other_files_of_the_same_scores(run, made):
    folder, scores, _ = made
    plain = run(folder / "scores.npy", folder / "bank", "--json").stdout
    saved = trak.Attribution(trak.ArrayScores(scores)).save(folder / "saved")
    torch.save({"a": -scores.T / 2, "b": -scores.T / 2}, folder / "turned.pt")
    assert run(folder / "all.npy", folder / "bank", "--all-targets", "--json").stdout == plain
    turned = run(folder / "turned.pt", folder / "bank", "--negate", "--key", "*", "--json").stdout
    as_saved = run(saved, folder / "bank", "--json").stdout
    for other in (turned, as_saved):
        assert json.loads(other)["lds"]["mean"] == pytest.approx(json.loads(plain)["lds"]["mean"])


def test_one_model_per_subset_has_no_ceiling(run, made):
    folder, _, bank = made
    Bank(masks=bank.masks, outputs=bank.outputs[:, :1]).save(folder / "single")
    result = run(folder / "scores.npy", folder / "single")
    assert "noise ceiling" not in result.stdout
    assert "two models" in result.stderr
    assert json.loads(run(folder / "scores.npy", folder / "single", "--json").stdout)["noise_ceiling"] is None


def test_errors(run, made):
    folder, _, _ = made
    assert "does not fit num_train = 20" in run(folder / "all.npy", folder / "bank", code=2).stderr
    assert "target row 5" in run(folder / "scores.npy", folder / "bank", "--all-targets", code=2).stderr
    assert "no bank" in run(folder / "scores.npy", folder / "nothing", code=2).stderr
    assert "no scores at" in run(folder / "nothing.npy", folder / "bank", code=2).stderr
