"""The segmentation example at a tiny size: from images to models, scores, table and figure; and again, with nothing left to train."""

import importlib
import json
import math
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_a_small_run_leaves_table_and_figure_and_goes_on_from_what_is_there(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("segmentation")
    command = ["--quick", "--out", str(tmp_path)]
    example.main(command)
    assert "| TRAK |" in capsys.readouterr().out
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    result = json.loads((tmp_path / "result.json").read_text())
    found = [one["lds"] for one in result["methods"]]
    assert len(found) == 3 and all(map(math.isfinite, found))

    def kept():
        return {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/*model*")}

    before = kept()
    assert before
    example.main(command)
    assert kept() == before
    again = [one["lds"] for one in json.loads((tmp_path / "result.json").read_text())["methods"]]
    assert again == found
