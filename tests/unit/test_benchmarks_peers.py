"""The peer benchmarks: cases, the protocol between processes, tables. No peer's environment is made here."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    """Imports a module of the benchmarks."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return __import__


@pytest.mark.parametrize(
    ("name", "parameters"), [("resnet9-small", 142_992), ("resnet9", 2_273_856), ("gpt2-128", 1_383_168)]
)
def test_cases_are_the_same_every_time(bench, name, parameters):
    case = bench("cases").CASES[name]
    first, second = case.model(), case.model()
    assert sum(p.numel() for p in first.parameters()) == parameters
    for one, two in zip(first.state_dict().values(), second.state_dict().values()):
        assert torch.equal(one, two)
    for one, two in zip(case.data(3), case.data(3)):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["resnet9-small", "vit", "bert-128", "gpt2-128"])
def test_losses_belong_to_examples(bench, name):
    case = bench("cases").CASES[name]
    model, (inputs, labels) = case.model(), case.data(2)
    both = case.losses(model(inputs), labels)
    alone = torch.cat([case.losses(model(inputs[i : i + 1]), labels[i : i + 1]) for i in range(2)])
    assert both.shape == (2,)
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-4)


def test_full_sizes_are_those_of_bert_and_gpt2(bench):
    cases = bench("cases").CASES
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in cases[name].build().parameters())
            for name in ("bert-base-128", "gpt2-small-128")
        }
    # BERT base without its two token types; GPT-2 with 512 positions of 1,024.
    assert sizes["bert-base-128"] == 109_483_778 - 2 * 768
    assert sizes["gpt2-small-128"] == 124_439_808 - 512 * 768


def test_layers_leave_out_a_tied_output(bench):
    cases = bench("cases")
    names = list(cases.matrix_layers(cases.CASES["gpt2-128"].model()))
    assert len(names) == 16
    assert "lm_head" not in names
    assert cases.side(2048, [2048] * 16) == 11
    assert cases.side(100, [3, 50]) == 10  # 9 + 100 is nearer to 100 than 9 + 81


def test_contenders_are_measured_in_turns_and_failures_listed(bench):
    contenders, measure = bench("contenders"), bench("measure")
    case = replace(bench("cases").CASES["resnet9-small"], rows=2, batch_size=2, dense_rows=2)
    by_key = {contender.key: contender for contender in contenders.CONTENDERS}
    chosen = [
        by_key["plain"],
        by_key["ours-kronecker"],
        replace(by_key["ours-sparse"], key="unknown", call="nothing of the kind"),
        by_key["traker"],
    ]
    pythons = {
        "torch": Path(sys.executable),
        "main": Path(sys.executable),
        "traker": "no environment:\n none",
    }
    entries = measure.measure_case(case, chosen, pythons, measure.Settings(dim=64, rounds=2, budget=1e6))
    assert list(entries) == ["plain", "ours-kronecker", "unknown", "traker"]
    ours = entries["ours-kronecker"]
    assert len(ours["cpu_ratios"]) == len(ours["wall_ratios"]) == 2
    assert min(ours["cpu_ratios"]) > 0
    assert ours["facts"] == {"parameters": 142_992, "kept": 64}
    assert ours["peak_bytes"] > 0
    assert entries["unknown"]["error"] == "KeyError: 'nothing of the kind'"
    assert entries["traker"]["error"] == "no environment: none"


def test_a_process_that_ends_or_hangs_is_an_error(bench, tmp_path):
    measure = bench("measure")
    ends = measure.Peer([sys.executable, "-c", "pass"], threads=1, timeout=60, log=tmp_path / "a")
    with pytest.raises(measure.PeerError, match="ended with code 0"):
        ends.ask(do="round")
    ends.stop()
    sleep = "import time; time.sleep(60)"
    hangs = measure.Peer([sys.executable, "-c", sleep], threads=1, timeout=0.2, log=tmp_path / "b")
    with pytest.raises(measure.PeerError, match=r"no answer in 0\.2 seconds"):
        hangs.ask(do="round")


def test_messages_are_one_short_line(bench):
    shorten = bench("measure").shorten
    assert shorten("a\n  b") == "a b"
    assert len(shorten("x" * 1000)) == bench("measure").ERROR_LENGTH


def entry(ratio: float, peak_mib: float, **facts) -> dict:
    return {
        "rows": 8,
        "batch_size": 8,
        **{f"{clock}_ratio": ratio for clock in ("cpu", "wall")},
        **{f"{clock}_ratios": [ratio] * 3 for clock in ("cpu", "wall")},
        **{f"{clock}_seconds_per_example": ratio / 100 for clock in ("cpu", "wall")},
        "peak_bytes": peak_mib * 2**20,
        "setup_seconds": 0.0,
        "facts": {"parameters": 1000, **facts},
    }


@pytest.fixture
def record():
    return {
        "machine": {"processor": "A processor", "cores": 2, "python": "3.11", "system": "Linux"},
        "versions": {"traker": "0.3.2"},
        "settings": {"dim": 2048, "threads": 1, "device": "cpu"},
        "cases": {
            "resnet9": {
                "title": "ResNet-9",
                "kind": "image",
                "tokens": None,
                "parameters": 1000,
                "date": "2026-01-01",
                "minutes": 3.2,
                "load": [0.5, 1.25],
                "contenders": {
                    "plain": entry(1.0, 10),
                    "ours-kronecker": entry(2.0, 30, kept=2048),
                    "ours-sparse": entry(1.5, 20, kept=2048),
                    "traker": entry(1.75, 25, kept=2048),
                    "logix": {"rows": 8, "batch_size": 8, "error": "KeyError: a|b"},
                },
            }
        },
    }


def test_the_tables_name_errors_and_those_that_do_better(bench, record):
    page = bench("peers_page")
    text = page.section(record)
    assert "### ResNet-9: 1,000 parameters" in text
    assert (
        "| traker | gradients of all parameters, projected | 1.75 | 57.1 | 25 | all, 2,048 | 3 × 8 |" in text
    )
    assert "KeyError: a\\|b" in text
    assert "**faster**: traker, 1.75 (ours, Kronecker: 2)" in text
    assert "**less memory**: traker, 25 (ours, Kronecker: 30)" in text
    others = record["cases"]["resnet9"]["contenders"]
    others["traker"]["facts"]["parameters"] = 10  # not the same work
    assert "No peer that does the same work is faster" in page.section(record)


def test_the_page_keeps_what_stands_around_the_tables(bench, record):
    page = bench("peers_page")
    text = "before\n<!-- begin peers -->\nold\n<!-- end peers -->\nafter"
    new = page.page(text, record)
    assert new.startswith("before\n<!-- begin peers -->")
    assert new.endswith("<!-- end peers -->\nafter")
    assert "old" not in new
    assert page.page(new, record) == new
    with pytest.raises(SystemExit, match="once each"):
        page.page("no comments", record)


def test_the_picture_is_drawn(bench, record, tmp_path):
    bench("peers_page").draw(record, tmp_path / "assets" / "a.png")
    assert (tmp_path / "assets" / "a.png").stat().st_size > 1000


def test_the_page_has_the_recorded_tables(bench):
    page = bench("peers_page")
    text = page.PAGE.read_text(encoding="utf-8")
    if page.page(text, json.loads(page.RESULTS.read_text(encoding="utf-8"))) != text:
        pytest.fail("docs/benchmarks.md is out of date: python benchmarks/peers_page.py")
    assert page.PICTURE.is_file()


def test_every_environment_is_listed_with_versions(bench):
    for contender in bench("contenders").CONTENDERS:
        assert (BENCHMARKS / "peers" / f"run_{contender.runner}.py").is_file()
        if contender.env in ("main", "torch"):
            continue
        lines = (BENCHMARKS / "envs" / f"{contender.env}.txt").read_text().splitlines()
        assert all("==" in line for line in lines if not line.startswith("#"))
