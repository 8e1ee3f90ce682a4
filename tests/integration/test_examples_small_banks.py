"""The small banks at a tiny size: every setting from its data to the tables and again, and the algebra by N × N matrices against TRAK."""

import importlib
import json
import lzma
from pathlib import Path

import numpy as np
import pytest
import torch

import trak
from trak.evaluation import Bank
from trak.methods.runs import RunOptions
from trak.precondition import FixedDamping

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("small_banks")


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("small_banks_kernels")


@pytest.fixture
def settings(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("small_banks_settings")


@pytest.fixture
def sentences(tmp_path):
    """Facts like those of T-REx: thirty of four sentences, of which one is too short and one is there twice."""
    places, verbs = ("paris", "rome", "oslo", "bern", "lima"), ("born", "raised", "buried")
    lines = []
    for index in range(30):
        name, place = f"person{index % 10}", places[index % 5]
        texts = [f"the writer {name} was {verb} in {place} ." for verb in verbs]
        texts += [f"in {place} number {index % 7} lived {name} .", "too short .", texts[0]]
        lines.append(json.dumps({"p": "P19", "s": name, "o": place, "ev": [[t, name, place] for t in texts]}))
    with lzma.open(tmp_path / "lama_trex_28rel.jsonl.xz", "wt", encoding="utf-8") as file:
        file.write("\n".join(lines))
    return tmp_path


@pytest.mark.parametrize("name", ["rows", "regression", "language"])
def test_a_small_run_leaves_banks_and_tables_and_goes_on_from_them(
    example, sentences, name, tmp_path, capsys, monkeypatch
):
    if name == "regression":
        pytest.importorskip("sklearn")
    out = tmp_path / "out"
    command = ["--setting", name, "--quick", "--data", str(sentences), "--out", str(out)]
    example.main(command)
    printed = capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())

    # The length that is used has the least loss of unseen rows, and bank and checkpoints are of that length.
    losses = {int(length): of["unseen"] for length, of in result["losses"].items()}
    assert result["epochs"] == min(losses, key=losses.get)
    bank = Bank.load(out / f"bank-{result['epochs']}")
    checkpoints = Bank.load(out / f"checkpoints-{result['epochs']}")
    assert bank.outputs.shape == (6, 2, 6)
    assert (bank.masks.sum(dim=1) == 20).all()
    assert checkpoints.masks.all()
    assert len({path.read_bytes() for path in checkpoints.models}) == 2  # different seeds

    # Outputs are the task's f; the first row is what the one call gives.
    setting = example.make_setting(name, sentences, quick=True)
    for row, chosen in zip(
        (one for one in result["methods"] if one["features"] == "Eigenbasis"),
        ([checkpoints.models[:1], checkpoints.models[1:]], [checkpoints.models]),
    ):
        attributions = [
            trak.attribute(
                setting.build(),
                setting.train_set,
                setting.targets,
                task=setting.task,
                checkpoints=files,
                projection=trak.Eigenbasis(64),
                batch_size=50,
            )
            for files in chosen
        ]
        expected = np.mean([bank.lds(attribution.scores).mean for attribution in attributions])
        assert row["checkpoints"] == len(chosen[0])
        assert row["lds"] == pytest.approx(expected, abs=1e-6)
        assert row["low"] <= row["high"]
        assert importlib.import_module("experiment_page").number(row["lds"]) in printed
    gains = [one for one in result["methods"] if "gain" in one]
    assert len(gains) == len(result["methods"]) - 2  # all but the first of each M

    monkeypatch.setattr(trak.TRAK, "fit", lambda *_: pytest.fail("attributed again"))
    monkeypatch.setattr(
        importlib.import_module("small_banks_kernels"), "make_kernel", lambda *_: pytest.fail("made again")
    )
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*/subset-*")}
    example.main(command)
    assert kept == {path: path.stat().st_mtime_ns for path in kept}  # models are read, not trained again
    again = json.loads((out / "result.json").read_text())
    assert again["methods"] == result["methods"]
    assert again["effective dimensions"] == result["effective dimensions"]


@pytest.fixture
def problem():
    """A model in float64 with more parameters than there are rows, and three checkpoints."""
    torch.manual_seed(0)
    models = [
        torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
        for _ in range(3)
    ]
    inputs, labels = torch.randn(30, 6, dtype=torch.float64), torch.arange(30) % 3
    return models, (inputs, labels), (inputs[:4] + 0.1, labels[:4])


@pytest.mark.parametrize("name", ["classification", "regression"])
@pytest.mark.parametrize("size", [1, 3])
def test_scores_from_inner_products_are_those_of_trak(kernels, problem, tmp_path, name, size):
    models, train_set, targets = problem
    task = trak.ImageClassification()
    if name == "regression":
        models = [torch.nn.Sequential(model, torch.nn.Linear(3, 1).double()) for model in models]
        train_set, targets = ((inputs, labels.double()) for inputs, labels in (train_set, targets))
        task = trak.Regression()
    states = [model.state_dict() for model in models[:size]]
    options = {"model": models[0], "task": task, "projection": trak.Identity()}
    found = [
        kernels.Gram.of(
            kernels.make_kernel(RunOptions(**options), train_set, targets, state),
            is_log_loss=task.is_log_loss,
        )
        for state in states
    ]
    # The automatic rule's eigenvalues are those of float32.
    rule = trak.AutomaticDamping(directions=1.0)
    for damping, tolerance in ((FixedDamping(0.3), 1e-9), (rule, 1e-5)):
        expected = trak.TRAK(**options, damping=damping).fit(train_set, states).attribute(targets).scores
        scores = kernels.dual_scores(found, damping)
        assert (scores - expected.tensor()).norm() <= tolerance * scores.norm()

    # The bound is what decides here, and the effective dimension is at it; so it is where it is asked for.
    bound = 30**0.5 * size ** (1 / 3)
    assert found[0].dimension(found[0].damping(rule, size)) == pytest.approx(bound, rel=1e-4)
    assert found[0].dimension(found[0].damping(7.0, size)) == pytest.approx(7.0, rel=1e-6)
    dots = trak.TracIn(**options, target="output").fit(train_set, states).attribute(targets).scores.tensor()
    torch.testing.assert_close(sum(gram.kernel.dot_products for gram in found), dots)


def test_the_language_model_sees_words_to_the_left_only_and_is_asked_for_known_words(settings, sentences):
    setting = settings.make_setting("language", sentences, quick=True)
    model, batch = setting.build(), setting.targets
    is_asked = batch["labels"] != -100
    assert (batch["input_ids"][is_asked] != settings.UNKNOWN).all()
    assert (batch["attention_mask"][is_asked] == 1).all()
    tokens = batch["input_ids"].clone()
    tokens[:, 5] = settings.UNKNOWN
    before, after = (model(ids, batch["attention_mask"]) for ids in (batch["input_ids"], tokens))
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5], after[:, 5])
    trained = {tuple(row.tolist()) for row in setting.train_set["input_ids"]}
    assert not trained & {tuple(row.tolist()) for row in batch["input_ids"]}  # no target was trained on


def test_the_regressions_units_are_those_of_its_training_rows(settings):
    pytest.importorskip("sklearn")
    setting = settings.regression(settings.RECIPES["regression"])
    inputs, values = setting.train_set
    assert len(values) == 353
    assert len(setting.targets[1]) == 89
    torch.testing.assert_close(inputs.mean(0), torch.zeros(10), atol=1e-5, rtol=0)
    torch.testing.assert_close(values.std(), torch.tensor(1.0), atol=1e-4, rtol=0)
    parameters = sum(parameter.numel() for parameter in setting.build().parameters())
    assert parameters > setting.recipe.dim  # otherwise nothing is projected


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--setting", "language"], "pass --data with the folder"),
        (["--setting", "rows", "--quick", "--checkpoints", "3"], "must be from 1 to 2"),
        (["--setting", "rows", "--quick", "--page"], "leave out --quick"),
    ],
)
def test_what_is_wrong_is_said(example, tmp_path, capsys, arguments, reason):
    with pytest.raises(SystemExit) as raised:
        example.main([*arguments, "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert reason in f"{raised.value} {capsys.readouterr().err}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["rows", "regression", "language"])
def test_the_page_has_the_recorded_results(example, name):
    page = importlib.import_module("experiment_page")
    text = (page.PAGES / "small-banks.md").read_text(encoding="utf-8")
    result = json.loads((page.RESULTS / f"experiments-small-banks-{name}.json").read_text())
    assert page.with_section(text, f"small-banks-{name}", example.section(result)) == text


def test_gains_are_paired_with_the_first_scores(example):
    alternatives, generator = importlib.import_module("alternatives"), torch.Generator().manual_seed(0)
    masks, effects_NT = torch.rand(20, 12, generator=generator) < 0.5, torch.randn(12, 5, generator=generator)
    outputs_ST = masks.float() @ effects_NT + 0.5 * torch.randn(20, 5, generator=generator)
    bank = Bank(masks=masks, outputs=outputs_ST[:, None].double())
    noisy_NT = effects_NT + torch.randn(12, 5, generator=generator)
    scores = {
        "true": [effects_NT],
        "again": [2 * effects_NT],
        "both": [noisy_NT, effects_NT],
        "noisy": [noisy_NT],
    }
    found = alternatives.compared(bank, scores)
    assert list(found) == list(scores)
    assert "gain" not in found["true"]
    assert found["again"]["gain"] == [0.0, 0.0]  # the same ranks in the same resamples
    assert found["true"]["lds"] == bank.lds(effects_NT).mean
    assert found["both"]["lds"] == pytest.approx((found["true"]["lds"] + found["noisy"]["lds"]) / 2)
    # Half as far from the first, and so are the ends of its interval.
    assert found["both"]["gain"] == pytest.approx([end / 2 for end in found["noisy"]["gain"]])
    assert (
        found["noisy"]["gain"][1] < 0 < found["noisy"]["low"] < found["noisy"]["lds"] < found["noisy"]["high"]
    )
