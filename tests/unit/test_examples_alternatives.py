"""examples/alternatives.py compares what TRAK can be on a bank, with whitened gradients too."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from trak.evaluation import Bank

EXAMPLES = Path(__file__).parents[2] / "examples"

RECIPE = """
import pytest
import torch

torch.manual_seed(0)
model = torch.nn.Linear(6, 3)
train_set = torch.randn(30, 6), torch.arange(30) % 3
targets = torch.randn(8, 6), torch.arange(8) % 3
task = "image_classification"
checkpoints = [{name: torch.randn_like(value) for name, value in model.state_dict().items()} for _ in range(3)]
"""


def run(tmp_path, monkeypatch, words):
    (tmp_path / "recipe.py").write_text(RECIPE)
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(12, 30, generator=generator) < 0.5
    Bank(masks=masks.numpy(), outputs=torch.randn(12, 1, 8, generator=generator).numpy()).save(
        tmp_path / "bank"
    )
    words = [tmp_path / "recipe.py", "--bank", tmp_path / "bank", "--json", tmp_path / "result.json", *words]
    monkeypatch.setattr(sys, "argv", ["alternatives.py", *map(str, words)])
    runpy.run_path(str(EXAMPLES / "alternatives.py"), run_name="__main__")
    return json.loads((tmp_path / "result.json").read_text())


def test_another_projection_and_its_directions(tmp_path, monkeypatch):
    words = ["--what", "directions", "--projection", "eigenbasis:9,whitening=1"]
    rows = run(tmp_path, monkeypatch, [*words, "--average", "1", "--checkpoints", "2"])
    names = [f"directions {number:g}" for number in (1.5, 2, 2.5, 3, 4, 6)]
    assert [row["name"] for row in rows] == ["automatic", *names]
    # More directions are less damping; automatically a whitened eigenbasis has 2.5.
    dampings = [row["damping"] for row in rows]
    assert dampings[1:] == sorted(dampings[1:], reverse=True)
    assert dampings[0] == dampings[3]


def test_the_trial_runs_and_compares_with_plain_features(tmp_path, monkeypatch):
    words = ["--what", "whitening", "--dim", "9"]
    words += ["--factors", "ekfac", "kfac", "--ratios", "1", "--samples", "0", "20"]
    words += ["--save-dir", tmp_path / "kept"]
    words += ["--average", "2", "--checkpoints", "1", "2"]
    rows = run(tmp_path, monkeypatch, words)
    assert [row["checkpoints"] for row in rows] == [1] * 26 + [2] * 26
    plain = rows[0]
    assert (plain["name"], plain["gain_low"], plain["gain_high"]) == ("plain, Gram", 0, 0)
    for row in rows:
        assert row["gain_low"] <= row["gain_high"]
        assert -1 <= row["low"] <= row["high"] <= 1
    assert len({row["lds"] for row in rows[:26]}) > 7


def test_multiples_of_the_diagonal(tmp_path, monkeypatch):
    words = ["--what", "diagonal", "--projection", "eigenbasis:9", "--average", "1", "--checkpoints", "2"]
    rows = {row["name"]: row for row in run(tmp_path, monkeypatch, words)}
    assert len(rows) == 1 + 6 * 4
    shares = [rows[f"2 diagonal, trace / {share}"]["damping"] for share in (300, 1000, 3000)]
    # λ is the trace over the share whatever the number of checkpoints, which the rule's own is not.
    assert shares[0] / shares[1] == pytest.approx(10 / 3)
    assert rows["automatic"]["damping"] == pytest.approx(shares[1] / 2**0.5)
    assert rows["0 diagonal, trace / 300"]["damping"] == pytest.approx(shares[0])
    assert rows["0 diagonal, trace / 300"]["lds"] != rows["10 diagonal, trace / 300"]["lds"]
