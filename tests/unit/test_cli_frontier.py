"""`trak frontier`: the library's figures from a recipe and a bank."""

import json

import pytest
from test_frontier_run import make
from typer.testing import CliRunner

from trak.cli import app

RECIPE = """
import sys
sys.path.insert(0, {here!r})
from test_frontier_run import make

problem, bank = make()
model, train_set, targets = problem.model, problem.train_set, problem.targets
task, checkpoints, device, progress = problem.task, problem.checkpoints, "cpu", False
damping = 1.0
passes_per_model = 10
title = "Tiny"
def train_part():
    make(checkpoints=1)
    return 0.5
"""
METHODS = ("--methods", "trak,gradient-cosine", "--methods", "empirical-influence random")


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")

    def run(*words, code=0):
        result = CliRunner().invoke(app, ["frontier", *map(str, words)])
        assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
        return result

    return run


@pytest.fixture
def made(tmp_path):
    from pathlib import Path

    recipe = tmp_path / "tiny_frontier.py"
    recipe.write_text(RECIPE.format(here=str(Path(__file__).parent)))
    make()[1].save(tmp_path / "bank")
    return recipe, tmp_path / "bank", tmp_path / "out"


def test_table_json_csv_and_figure(run, made):
    recipe, bank, out = made
    result = run(recipe, "--bank", bank, "--out", out, "--checkpoints", "1,3", *METHODS)
    assert "TRAK, not projected" in result.stdout
    assert "Random scores" in result.stdout
    assert "damping have no effect" in result.stderr.replace("\n", " ")
    assert "Training a model takes" in result.stderr
    assert (out / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    assert "| **" in (out / "frontier.md").read_text()
    assert len((out / "frontier.csv").read_text().splitlines()) == 1 + 6
    values = json.loads((out / "frontier.json").read_text())
    assert [point["budget"] for point in values["points"]] == [1, 3, 1, 3, 8, 0]
    assert values["training"]["passes_per_model"] == 10
    # Again: nothing is measured, and the same is said.
    points = {file: file.stat().st_mtime_ns for file in (out / "points").iterdir()}
    again = run(
        recipe, "--bank", bank, "--out", out, "--checkpoints", "1", "--checkpoints", "3", *METHODS, "--json"
    )
    assert json.loads(again.stdout)["points"] == values["points"]
    assert {file: file.stat().st_mtime_ns for file in (out / "points").iterdir()} == points


def test_seconds_may_be_given_and_passes_drawn(run, made):
    recipe, bank, out = made
    words = (recipe, "--bank", bank, "--out", out, "--methods", "gradient-dot", "--checkpoints", 2)
    result = run(*words, "--seconds-per-model", 7, "--clock", "wall", "--passes", "--targets", 4, "--json")
    values = json.loads(result.stdout)
    assert values["points"][0]["train_seconds"] == {"wall": 14.0, "processor": 14.0}
    assert (values["clock"], values["bank"]["num_targets"]) == ("wall", 4)
    assert not (out / "training.json").exists()


def test_the_list_of_methods_needs_no_bank(run, made):
    listed = json.loads(run(made[0], "--list", "--json").stdout)
    assert {"trak", "influence-ekfac", "random"} <= {row["name"] for row in listed}
    assert "gas" in run(made[0], "--list").stdout


def test_errors(run, made, tmp_path):
    recipe, bank, out = made
    assert "--bank is needed" in run(recipe, code=2).stderr
    assert "no method is called" in run(recipe, "--bank", bank, "--methods", "shap", code=2).stderr
    assert "whole numbers" in run(recipe, "--bank", bank, "--checkpoints", "1,x", code=2).stderr
    assert "no bank" in run(recipe, "--bank", tmp_path / "nothing", "--out", out, code=2).stderr
    other = tmp_path / "untimed.py"
    other.write_text(recipe.read_text().split("passes_per_model")[0])
    message = run(other, "--bank", bank, "--out", out, "--methods", "random", code=2).stderr
    assert "train_part or seconds_per_model" in message


def test_recipes_of_frontiers_are_recipes_of_attribution(made):
    result = CliRunner().invoke(app, ["attribute", str(made[0]), "--top", "1", "--json"])
    assert result.exit_code == 0, result.output
    assert "not used" not in result.stderr
