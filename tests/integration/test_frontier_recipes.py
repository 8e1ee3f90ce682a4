"""The recipes of examples/recipes run as their docstrings say."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trak.cli import app

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"


@pytest.mark.slow
def test_cifar2(shared, tmp_path, monkeypatch):
    monkeypatch.setenv("TRAK_SHARED", str(shared))
    words = ["frontier", RECIPES / "cifar2.py", "--bank", shared / "banks" / "cifar2", "--out", tmp_path]
    words += ["--methods", "representation-cosine,empirical-influence,random", "--checkpoints", "1"]
    words += ["--targets", "100", "--seconds-per-model", "500", "--passes", "--json"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert [point["error"] for point in values["points"]] == [None] * 3
    assert values["training"]["passes_per_model"] == 12
    assert (tmp_path / "frontier.png").is_file()


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.py")), ids=lambda recipe: recipe.stem)
def test_recipes_say_how_they_are_run_and_what_they_cost(recipe):
    text = recipe.read_text()
    assert f"trak frontier examples/recipes/{recipe.name} --bank" in text
    for name in (
        "model",
        "train_set",
        "targets",
        "task",
        "checkpoints",
        "passes_per_model",
        "def train_part",
    ):
        assert name in text, name


def test_the_page_has_the_recorded_tables():
    import importlib.util

    path = RECIPES.parents[1] / "benchmarks" / "frontier_page.py"
    spec = importlib.util.spec_from_file_location("frontier_page", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.PAGE.read_text(encoding="utf-8")
    if module.page(text) != text:
        pytest.fail("docs/frontier.md is out of date: python benchmarks/frontier_page.py")
    for file in module.RESULTS.glob("frontier-*.json"):
        assert (module.PAGE.parent / "assets" / f"{file.stem}.png").is_file()
