"""The cloze example at a tiny size, on sentences made here: from a file to models, scores, tables and tokens; and again, with nothing left to do."""

import importlib
import json
import lzma
from pathlib import Path

import pytest
import torch

import trak
from trak.evaluation import Bank

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def module(monkeypatch):
    """Any of the example's modules by name."""
    for package in ("transformers", "bm25s"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


@pytest.fixture
def data(tmp_path):
    """Thirty facts of three sentences and one of a single sentence, about five places."""
    folder, places = tmp_path / "data", ("paris", "rome", "oslo", "bern", "lima")
    folder.mkdir()
    lines = []
    for index in range(30):
        name, place = f"person{index}", places[index % 5]
        texts = [f"the writer {name} was {verb} in {place} ." for verb in ("born", "raised", "buried")]
        lines.append({"p": "P19", "s": name, "o": place, "ev": [[text, name, place] for text in texts]})
    alone = "nobody but hermit ever lived in atlantis ."
    lines.append({"p": "P19", "s": "hermit", "o": "atlantis", "ev": [[alone, "hermit", "atlantis"]]})
    with lzma.open(folder / "lama_trex_28rel.jsonl.xz", "wt", encoding="utf-8") as file:
        file.write("\n".join(map(json.dumps, lines)))
    relation = {"relation": "P19", "template": "[X] was born in [Y] ."}
    (folder / "lama_relations.jsonl").write_text(json.dumps(relation))
    return folder


@pytest.mark.parametrize("kind", ["seq2seq", "masked"])
def test_a_small_run_leaves_tables_and_texts_and_goes_on_from_what_is_there(
    module, data, kind, tmp_path, capsys, monkeypatch
):
    example, out = module("cloze"), tmp_path / "out"
    command = ["--model", kind, "--quick", "--data", str(data), "--out", str(out)]
    example.main(command)
    printed = capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    bank = Bank.load(out / f"bank-{result['epochs']}")
    whole = Bank.load(out / f"checkpoints-{result['epochs']}")
    assert bank.outputs.shape == (6, 2, 5) and (bank.masks.sum(dim=1) == 12).all()

    # What is measured is the task's f, and the first row of the last M what the one call gives.
    cloze = module("cloze_task").make_cloze(kind, data, quick=True)
    setting, given = cloze.setting, {"task": cloze.setting.task, "checkpoints": whole.models}
    scores_NT = trak.attribute(setting.build(), setting.train_set, setting.targets, **given).scores.tensor()
    last = [one["lds"] for one in result["methods"] if one["scores"] == "TRAK"][1]
    assert last == pytest.approx(bank.lds(scores_NT).mean, abs=1e-4)
    names = {one["scores"] for one in result["methods"]}
    assert ("representation cosine" in names) == (kind == "seq2seq")
    assert len([one for one in result["methods"] if "gain" in one]) == len(result["methods"]) - 2

    # Proponents are training sentences with their object in the blank.
    best = int(scores_NT[:, 0].argmax())
    row = cloze.train[best]
    text = " ".join(f"**{row.object}**" if word == "[MASK]" else word for word in row.words)
    assert result["proponents"][0]["proponents"][0][1] == text
    assert text in printed
    if kind == "seq2seq":
        assert result["tokens"]["difference"] < 1e-3 < result["tokens"]["end"]

    monkeypatch.setattr(trak, "attribute", lambda *_, **__: pytest.fail("attributed again"))
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*/subset-*")}
    assert kept
    example.main(command)
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    assert json.loads((out / "result.json").read_text())["methods"] == result["methods"]


def test_models_are_asked_for_the_object_only_and_do_not_see_it(module, data):
    task = module("cloze_task")
    for kind, counted in (("seq2seq", 2), ("masked", 1)):
        cloze = task.make_cloze(kind, data, quick=True)
        batch, known = cloze.setting.train_set, task.vocabulary(cloze.train)
        assert ((batch["labels"] != -100).sum(1) == counted).all()
        assert ((batch["input_ids"] == task.BLANK).sum(1) == 1).all()
        for tokens, labels, row in zip(batch["input_ids"], batch["labels"], cloze.train):
            assert known[row.object] not in tokens
            assert labels.max() == known[row.object]
    assert "atlantis" not in known  # one sentence states that fact
    held = {(row.words, row.object) for row in cloze.targets}
    assert len(held) == 5 and not held & {(row.words, row.object) for row in cloze.train}


def test_a_guess_is_the_objects_share_of_the_training_sentences(module):
    task = module("cloze_task")
    rows = [task.Row(words=("[MASK]", "."), object=name) for name in ("a", "a", "b")]
    cloze = task.Cloze(setting=None, train=rows, targets=[rows[0], task.Row(words=(), object="c")])
    expected = -torch.tensor([3 / 6, 1 / 6]).log().mean()  # one more of each
    assert task.guess(cloze) == pytest.approx(float(expected))


def test_what_is_wrong_is_said(module, data, tmp_path, capsys):
    example = module("cloze")
    given = ["--out", str(tmp_path / "out")]
    for arguments, reason in (
        (["--data", str(tmp_path)], "pass --data with the folder"),
        (["--data", str(data)], "1050 sentences are asked for"),
        (["--data", str(data), "--quick", "--page"], "leave out --quick"),
    ):
        with pytest.raises(SystemExit) as raised:
            example.main(["--model", "masked", *arguments, *given])
        assert reason in f"{raised.value} {capsys.readouterr().err}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["seq2seq", "masked"])
def test_the_page_has_the_recorded_results(module, kind):
    page = module("experiment_page")
    text = (page.PAGES / "cloze.md").read_text(encoding="utf-8")
    result = json.loads((page.RESULTS / f"experiments-cloze-{kind}.json").read_text())
    assert page.with_section(text, f"cloze-{kind}", module("cloze").section(result)) == text
