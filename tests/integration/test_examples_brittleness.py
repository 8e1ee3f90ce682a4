"""The brittleness experiment, small: from images to networks, scores, removals, table and figure; and again, with nothing left to train."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def brittle(monkeypatch):
    for package in ("matplotlib", "PIL"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("brittleness")


@pytest.fixture
def images(brittle):
    """Two classes that differ in the direction of a ramp."""

    def draw(count):
        labels = torch.arange(count) % 2
        ramp = torch.linspace(-1, 1, 8) * (2 * labels - 1)[:, None, None, None]
        return 0.7 * ramp + torch.randn(count, 3, 8, 8), labels

    return brittle.Images(draw(60), draw(80))


@pytest.fixture
def settings(brittle):
    return brittle.Settings(
        num_train=60,
        num_checkpoints=2,
        num_targets=3,
        num_seeds=1,
        k=(5, 25),
        recipe=brittle.Recipe(epochs=2, batch_size=20),
    )


def test_a_small_run_ends_with_a_table_and_a_figure_and_goes_on_from_what_is_there(
    brittle, images, settings, tmp_path
):
    methods = list(brittle.LABELS)
    result = brittle.run(images, settings, methods, tmp_path)
    assert list(result["methods"]) == methods
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "retrainings").glob("rows-*")}
    assert result["networks"] == len(kept) + 2
    for found in result["methods"].values():
        assert [flip["target"] for flip in found["flips"]] == [0, 1, 2]
        for flip in found["flips"]:
            assert set(flip["tried"]) <= {0, 5, 25}
            assert flip["num_removed"] in (None, 0, 5, 25)
    text = brittle.section(result)
    assert all(f"| {label} |" in text for label in brittle.LABELS.values())
    assert (tmp_path / "brittleness.png").read_bytes()[:4] == b"\x89PNG"

    again = brittle.run(images, settings, methods, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "retrainings").glob("rows-*")} == kept
    assert json.dumps(again["methods"]) == json.dumps(result["methods"])
    # What was written is what the page is made of.
    assert brittle.section(json.loads((tmp_path / "result.json").read_text())) == brittle.section(again)


def test_baselines_that_know_no_labels_start_with_the_predicted_class(brittle, images, settings, tmp_path):
    problem = brittle.make_problem(images, settings, tmp_path)
    labels, classes = images.train[1], problem.targets[1]
    for method in ("representation", "random"):
        scores = torch.from_numpy(brittle.score(method, problem, settings))
        assert scores.shape == (60, brittle.POOL)
        for target in range(4):
            ranked = labels[scores[:, target].argsort(descending=True)]
            assert (ranked[:30] == classes[target]).all()
    first, second = (classes == classes[0]).nonzero().squeeze(1)[:2]
    assert torch.equal(scores[:, first], scores[:, second])  # random: one order, whose networks are shared


def test_the_margin_is_of_the_class_that_was_predicted(brittle, images, settings, tmp_path):
    problem = brittle.make_problem(images, settings, tmp_path)
    margins = brittle.retrainer(problem, settings.recipe)(torch.arange(60), 3)
    network, _ = brittle.train(*images.train, settings.recipe, 3)
    with torch.no_grad():
        logits = network(problem.targets[0])
    predicted = logits.argmax(1) == problem.targets[1]
    assert torch.equal(margins >= 0, predicted)
    assert torch.allclose(margins.abs(), (logits[:, 0] - logits[:, 1]).abs())


def test_training_takes_all_that_is_random_from_its_seed(brittle, images, settings):
    state = torch.get_rng_state()
    first, kept = brittle.train(*images.train, settings.recipe, 0, keep_epochs=(1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(3)
    same, _ = brittle.train(*images.train, settings.recipe, 0)
    other, _ = brittle.train(*images.train, settings.recipe, 1)
    weight = "0.weight"
    assert torch.equal(first.state_dict()[weight], same.state_dict()[weight])
    assert not torch.equal(first.state_dict()[weight], other.state_dict()[weight])
    assert torch.equal(kept[2][weight], first.state_dict()[weight])
    assert not torch.equal(kept[1][weight], kept[2][weight])


def test_shares_count_the_predictions_that_stood(brittle):
    flips = [{"num_removed": one, "verified": one == 20} for one in (20, 80, 20, None)]
    flips.append({"num_removed": 0, "verified": None})
    found = brittle.summarize(flips, (20, 40, 80), seed=0)
    assert [share for share, _, _ in found["shares"].values()] == [0.5, 0.5, 0.75]
    assert all(low <= share <= high for share, low, high in found["shares"].values())
    assert (found["targets"], found["median"], found["verified"]) == (4, 50, [2, 4])
    unknown = brittle.summarize([{"num_removed": None, "verified": None}] * 3, (20,), seed=0)
    assert unknown["median"] is None
    assert np.array(unknown["shares"]["20"]).tolist() == [0, 0, 0]


def test_methods_are_compared_target_by_target(brittle):
    first = [{"num_removed": k} for k in (10, 20, None, 0, 40, None)]
    second = [{"num_removed": k} for k in (20, 20, None, 0, 10, 320)]
    assert brittle.against(first, second) == [1, 2, 2]
    assert brittle.against(second, first) == [2, 2, 1]


def test_missing_data_are_said(brittle, tmp_path):
    with pytest.raises(SystemExit, match="pass --data FOLDER"):
        brittle.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_page_has_the_recorded_result(brittle):
    page = importlib.import_module("experiment_page")
    file = page.PAGES / "brittleness.md"
    result = json.loads((page.RESULTS / "experiments-brittleness.json").read_text())
    text = file.read_text(encoding="utf-8")
    assert page.with_section(text, "brittleness", brittle.section(result)) == text
    assert (page.ASSETS / "experiments-brittleness.png").stat().st_size < 200_000
