"""The diffusion example at a tiny size: from images to models, scores, table and figure; and again, with nothing left to train."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch

import trak
from trak.evaluation import Bank

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("diffusion")


def test_a_small_run_leaves_table_and_figure_and_goes_on_from_what_is_there(
    example, tmp_path, capsys, monkeypatch
):
    command = ["--quick", "--out", str(tmp_path)]
    example.main(command)
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert (tmp_path / "proponents.png").read_bytes()[:4] == b"\x89PNG"
    assert len(result["methods"]) == 4
    for one in result["methods"]:
        assert math.isfinite(one["lds"]) and one["interval"][0] < one["interval"][1]
        assert f"| {one['method']} |" in printed

    # What the bank holds is the task's output: minus the loss under the same noise for every model.
    data, alphas_T = example.read_data(example.QUICK), example.cosine_schedule(example.QUICK.steps)
    task = trak.Diffusion(alphas_T, num_samples=example.QUICK.samples)
    whole = Bank.load(tmp_path / "checkpoints")
    model = example.Denoiser(example.QUICK.width, alphas_T)
    model.load_state_dict(trak.load_checkpoint(whole.models[1]))
    with torch.no_grad():
        torch.testing.assert_close(task.output(model, data.targets), whole.outputs[0, 1].float())

    def kept():
        return {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/*model*")}

    before = kept()
    assert len(before) == 6 + 2 * 2
    monkeypatch.setattr(example, "train_model", None)
    monkeypatch.setattr(example, "methods", lambda *_: dict.fromkeys(m["method"] for m in result["methods"]))
    example.main(command)
    assert kept() == before
    assert json.loads((tmp_path / "result.json").read_text())["methods"] == result["methods"]
