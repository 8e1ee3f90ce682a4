"""The pages with measurements say what the recorded results say."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def writer():
    spec = importlib.util.spec_from_file_location(
        "performance_page", ROOT / "benchmarks" / "performance_page.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["performance", "numerics"])
def test_pages_hold_the_recorded_results(writer, name):
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    if writer.page(name, text) != text:
        pytest.fail(f"docs/{name}.md is out of date: python benchmarks/performance_page.py")


def test_a_missed_aim_is_marked(writer):
    case = {"parameters": 10, "batch_size": 2, "plain_pass_seconds": 0.5, "rounds": 3, "date": "2026-01-01"}
    ratios = {"Kronecker": 0.9, "Sparse": 1.51, "Rademacher": 6.0}
    record = {"results": {"net": case | {"ratios": ratios}}, "dim": 8, "threads": 1, "machine": "m"}
    text = writer.featurize(record | {"torch": "1", "trak": "0", "clock": "process_time"})
    assert "| 0.90 |" in text and "1.51 ✗" in text and "6.00 |" in text


def test_growth_is_drawn(writer, tmp_path):
    pytest.importorskip("matplotlib")
    record = json.loads((ROOT / "benchmarks" / "results" / "growth.json").read_text())
    writer.draw(record, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
