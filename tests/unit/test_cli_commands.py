import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import trak
import trak.demo
from trak.cli import app
from trak.scores import ArrayScores
from trak.store import Header, open_store

RECIPE = """
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 3))
inputs, labels = torch.randn(20, 1, 8, 8), torch.arange(20) % 3
train_set = torch.utils.data.TensorDataset(inputs, labels)
targets = (inputs[:4] + 0.1, labels[:4])
task = "image_classification"
checkpoints = [model.state_dict()]
projection = None
damping = 1.0
class_names = ["cat", "dog", "frog"]
train_labels = labels
target_labels = [0, 1, 2, 0]


def make():
    return {"model": model, "train_set": train_set, "targets": targets, "task": task, "damping": 1.0}


def broken():
    return 1 / 0
"""


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words, code=0):
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
        return result

    return run


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def saved(tmp_path):
    scores = np.random.default_rng(0).normal(size=(30, 12)).astype(np.float32)
    attribution = trak.Attribution(
        ArrayScores(scores), outputs=torch.linspace(-1, 1, 12), info={"method": "TRAK"}
    )
    return attribution, attribution.save(tmp_path / "attribution")


# Help and errors


def test_help_lists_every_command_under_a_heading(run):
    shown = run("--help").stdout
    for heading, verb in (("Start here:", "demo"), ("Attribute:", "attribute"), ("Look inside:", "store")):
        assert re.search(rf"{heading}\n(  .*\n)*  {verb} ", shown)
    assert "Examples:" in shown
    assert "..." not in shown.split("Start here")[1]


def test_version(run):
    assert run("--version").stdout == f"trak {trak.__version__}\n"


def test_errors_are_one_message_on_standard_error(run, tmp_path):
    result = run("top", tmp_path / "nothing", code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert "no saved attribution" in result.stderr
    assert "Traceback" not in result.stderr


def test_errors_of_subcommands_too(run, tmp_path):
    assert run("store", "info", tmp_path / "nothing", code=2).stderr.startswith("Error: ")


def test_debug_lets_the_error_through(tmp_path):
    result = CliRunner().invoke(app, ["--debug", "top", str(tmp_path / "nothing")])
    assert isinstance(result.exception, trak.StoreError)


def test_an_error_of_the_system_names_the_file(run, saved, tmp_path):
    blocked = tmp_path / "folder.html"
    blocked.mkdir()
    result = run("report", saved[1], "-o", blocked, code=2)
    assert "folder.html" in result.stderr
    assert "Traceback" not in result.stderr


# attribute


def test_attribute_prints_what_the_library_computes(run, recipe):
    result = run("attribute", recipe, "--top", 3, "--json", "--projection", "sparse:64,seed=1")
    values = json.loads(result.stdout)
    namespace = {}
    exec(compile(RECIPE, "recipe", "exec"), namespace)
    given = {
        name: namespace[name] for name in ("model", "train_set", "targets", "task", "checkpoints", "damping")
    }
    expected = trak.attribute(**given, projection=trak.Sparse(dim=64, seed=1))
    assert (values["num_train"], values["num_targets"]) == (20, 4)
    for target, one in enumerate(values["targets"]):
        assert [entry["row"] for entry in one["proponents"]] == expected.top(3).rows[target].tolist()
        assert [entry["row"] for entry in one["opponents"]] == expected.bottom(3).rows[target].tolist()
        assert [entry["score"] for entry in one["proponents"]] == expected.top(3).scores[target].tolist()
        assert one["output"] == pytest.approx(float(expected.outputs[target]))
        assert one["proponents"][0]["label"] == ["cat", "dog", "frog"][one["proponents"][0]["row"] % 3]


def test_what_a_recipe_prints_leaves_the_json_alone(run, tmp_path):
    path = tmp_path / "talking.py"
    talking = """
print("from the file")

class Talking(torch.utils.data.Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, row):
        print("from the data")
        return inputs[row], labels[row]

def make_talking():
    print("from the function")
    return {**make(), "train_set": Talking()}
"""
    path.write_text(RECIPE + talking)
    result = run("attribute", f"{path}:make_talking", "--json")
    assert json.loads(result.stdout)["num_train"] == 20
    assert all(words in result.stderr for words in ("from the file", "from the function", "from the data"))


def test_attribute_writes_what_is_asked_for(run, recipe, tmp_path):
    files = {name: tmp_path / name for name in ("features", "saved", "report.html", "scores.npy")}
    result = run(
        *(
            "attribute",
            recipe,
            "--projection",
            "sparse:64",
            "--save-dir",
            files["features"],
            "--out",
            files["saved"],
        ),
        *("--report", files["report.html"], "--scores", files["scores.npy"], "--top", 50),
    )
    loaded = trak.Attribution.load(files["saved"])
    np.testing.assert_array_equal(np.load(files["scores.npy"]), np.asarray(loaded.scores))
    assert "Target 3" in files["report.html"].read_text()
    assert "trak attribute" in files["report.html"].read_text()
    for name in ("saved", "report.html", "scores.npy"):
        assert str(files[name]) in result.stderr
        assert str(files[name]) not in result.stdout
    assert result.stdout.count("Target ") == 4
    assert run("store", "verify", files["features"]).exit_code == 0
    run("report", files["saved"], "-o", tmp_path / "again.html", "--recipe", recipe, "--target", 2, "--k", 3)
    again = (tmp_path / "again.html").read_text()
    assert again.count("<article") == 1
    assert "Target 2: frog" in again
    assert "data:image/png" in again


def test_tables_fit_and_have_no_colour_codes_in_a_pipe(run, recipe):
    shown = run("attribute", recipe, "--projection", "sparse:64").stdout
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert "cat" in shown


def test_command_line_goes_before_the_recipe(run, recipe, monkeypatch):
    seen = {}

    def attribute(**arguments):
        seen.update(arguments)
        return trak.Attribution(ArrayScores(np.zeros((20, 4), np.float32)))

    attribute.__signature__ = inspect.signature(trak.attribute)
    monkeypatch.setattr(trak, "attribute", attribute)
    run("attribute", f"{recipe}:make", "--damping", "relative:0.5", "--batch-size", 7, "--device", "cpu")
    assert seen["damping"] == trak.RelativeDamping(0.5)
    assert (seen["batch_size"], seen["device"]) == (7, "cpu")
    assert "save_dir" not in seen
    assert "class_names" not in seen


def test_interruption_says_how_to_go_on(recipe, monkeypatch, tmp_path):
    def attribute(**_):
        raise KeyboardInterrupt

    attribute.__signature__ = inspect.signature(trak.attribute)
    monkeypatch.setattr(trak, "attribute", attribute)
    result = CliRunner().invoke(app, ["attribute", str(recipe), "--save-dir", str(tmp_path / "features")])
    assert result.exit_code != 0
    assert "the same command goes on from there" in result.stderr


def test_a_report_that_cannot_be_written_stops_before_the_work(run, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(trak, "attribute", lambda **_: pytest.fail("worked first"))
    result = run("attribute", recipe, "--report", tmp_path / "nowhere" / "report.html", code=2)
    assert "create it first" in result.stderr


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["{recipe}:broken"], r"stopped at .*recipe.py, line 24: ZeroDivisionError"),
        (["{recipe}:nothing"], "no function 'nothing'"),
        (["{recipe}.no"], "there is no recipe"),
        (["{recipe}", "--projection", "sparse"], "needs its dimension"),
        (["{recipe}", "--damping", "much"], "relative:RATIO"),
    ],
)
def test_wrong_recipes_and_options(run, recipe, words, match):
    result = run("attribute", *[word.format(recipe=recipe) for word in words], code=2)
    assert re.search(match, result.stderr)


# top


def test_top_is_the_ranking(run, saved):
    attribution, folder = saved
    values = json.loads(run("top", folder, "-t", 3, "-t", 7, "--k", 4, "--json").stdout)
    assert [one["target"] for one in values["targets"]] == [3, 7]
    for one in values["targets"]:
        assert [entry["row"] for entry in one["proponents"]] == attribution.top(4).rows[
            one["target"]
        ].tolist()
        assert "opponents" not in one
    values = json.loads(run("top", folder, "--bottom", "--json", "--k", 99).stdout)
    assert len(values["targets"]) == 12
    for one in values["targets"]:
        assert [entry["row"] for entry in one["opponents"]] == attribution.bottom(30).rows[
            one["target"]
        ].tolist()
        assert "proponents" not in one


def test_top_shows_people_the_first_targets_and_says_so(run, saved):
    result = run("top", saved[1], "--k", 2)
    assert result.stdout.count("Target ") == 10
    assert "2 more targets" in result.stderr
    assert "+1.00" in run("top", saved[1], "-t", 11).stdout


@pytest.mark.parametrize("target", [12, -1])
def test_top_refuses_targets_that_are_not_there(run, saved, target):
    assert "targets 0 to 11" in run("top", saved[1], "--target", target, code=2).stderr


# report


def test_report_prints_its_path_only(run, saved, tmp_path):
    path = tmp_path / "report.html"
    result = run("report", saved[1], "-o", path)
    assert result.stdout == f"{path}\n"
    assert path.read_text().count("<article") == 12


# store


@pytest.fixture
def store(tmp_path):
    header = Header(
        num_rows=6,
        dim=4,
        columns=[("all", 0, 4)],
        parameters={"weight": (2, 3)},
        projection={"kind": "sparse", "dim": 4},
        task={"task": "Test"},
    )
    store = open_store(tmp_path / "features", header, shard_rows=3)
    store.add_checkpoint(0, "abc")
    store.add_experiment("val", 2)
    return store


def fill(store, start, stop, experiment=None):
    rows = torch.arange(start, stop)
    with store.rows(0, experiment).writer() as writer:
        writer.add(rows, torch.randn(len(rows), 4), torch.randn(len(rows)), torch.rand(len(rows)))


def test_store_info(run, store):
    fill(store, 0, 3)
    values = json.loads(run("store", "info", store.where, "--json").stdout)
    assert (values["num_rows"], values["dim"], values["projection"]["kind"]) == (6, 4, "sparse")
    (one,) = values["checkpoints"]
    assert one["train"] == {"num_rows": 6, "missing": 3}
    assert one["experiments"] == {"val": {"num_rows": 2, "missing": 2}}
    shown = run("store", "info", store.where).stdout
    assert re.search(r"training set +3 +3 +abc", shown)
    assert max(map(len, shown.splitlines())) <= 80


def test_store_verify_tells_whole_from_incomplete_from_damaged(run, store):
    fill(store, 0, 3)
    result = run("store", "verify", store.where, code=1)
    assert "Incomplete" in result.stdout
    values = json.loads(run("store", "verify", store.where, "--json", code=1).stdout)
    assert (values["ok"], values["complete"]) == (True, False)
    assert values["missing"][0]["ranges"] == [[3, 6]]
    fill(store, 3, 6)
    fill(store, 0, 2, "val")
    assert "Whole" in run("store", "verify", store.where).stdout
    assert json.loads(run("store", "verify", store.where, "--json").stdout)["complete"]
    _damage_a_shard(store)
    result = run("store", "verify", store.where, code=1)
    assert "Damaged" in result.stdout
    assert len(json.loads(run("store", "verify", store.where, "--json", code=1).stdout)["corrupt"]) == 1


def _damage_a_shard(store):
    shard = max(Path(store.where).rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-4] + b"oops")


# demo


class Result:
    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return str(self.path)

    def __str__(self):
        return "LDS 0.3"

    def to_dict(self):
        return {"report": str(self.path), "lds": float("nan")}


@pytest.fixture
def demo_calls(monkeypatch, tmp_path):
    calls = []

    def demo(**arguments):
        calls.append(arguments)
        return Result(tmp_path / "report.html")

    monkeypatch.setattr(trak.demo, "run", demo)
    return calls


def test_demo_passes_its_options_and_prints_the_report(run, demo_calls, tmp_path):
    result = run("demo", "--quick", "--out", tmp_path, "--seed", 3)
    assert demo_calls == [{"quick": True, "out": tmp_path, "seed": 3}]
    assert result.stdout == f"LDS 0.3\n\nReport: {(tmp_path / 'report.html').resolve()}\n"
    assert json.loads(run("demo", "--json").stdout)["lds"] is None


def test_demo_opens_the_report_only_if_asked(run, demo_calls, monkeypatch, tmp_path):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda uri: opened.append(uri) or False)
    run("demo")
    assert opened == []
    assert "no browser" in run("demo", "--open").stderr
    assert opened == [(tmp_path / "report.html").resolve().as_uri()]


def test_demo_needs_the_report_packages_before_it_trains(run, demo_calls, monkeypatch):
    monkeypatch.setattr("trak.report.dependencies._installed", lambda module: module != "jinja2")
    assert "pip install" in run("demo", code=2).stderr
    assert demo_calls == []


# Mistakes that are found early


def test_a_misspelt_name_in_a_recipe_is_remarked_on(run, tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE.replace("checkpoints =", "checkpoint ="))
    shown = run("attribute", path, "--top", 1).stderr
    assert "defines 'checkpoint', which is not used; did you mean 'checkpoints'?" in shown


def test_a_recipe_without_names_points_to_its_function(run, tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text("def helper(x):\n    return x\n\n\ndef make():\n    return {}\n")
    assert "recipe.py:make" in run("attribute", path, code=2).stderr.replace("\n", "")


def test_folders_that_cannot_be_written_are_refused_before_the_recipe_runs(run, tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text("raise RuntimeError('ran')")
    for option in ("--out", "--scores", "--report"):
        shown = run("attribute", path, option, tmp_path, code=2).stderr
        assert "ran" not in shown
        assert str(tmp_path) in shown


@pytest.mark.parametrize("name", ["attribution.json", "scores.npy", "vectors.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"[]", b"{"])
def test_a_damaged_attribution_is_one_message(run, saved, name, content):
    (saved[1] / name).unlink()
    if content is not None:
        (saved[1] / name).write_bytes(content)
    shown = run("top", saved[1], code=2).stderr
    assert name in shown
    assert "Traceback" not in shown


def test_a_report_refuses_another_data_set(run, recipe, saved, tmp_path):
    shown = run("report", saved[1], "--recipe", recipe, "-o", tmp_path / "r.html", code=2).stderr
    assert "train_set has 20 rows" in shown


def test_store_info_counts_parameters_and_cuts_digests(run, recipe, tmp_path):
    run("attribute", recipe, "--save-dir", tmp_path / "features", "--top", 1)
    lines = run("store", "info", tmp_path / "features").stdout.splitlines()
    facts = {line[:16].strip(): line[16:].strip() for line in lines if line[:1].isalpha()}
    assert facts["parameters"] == f"{64 * 6 + 6 + 6 * 3 + 3} in 4 tensors"
    assert facts["task"].startswith("ImageClassification")
    assert len(facts["extra"]) == len("train sample ") + 12


def test_a_checkpoint_missing_from_the_current_folder_reads_well(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.py").write_text(RECIPE.replace("[model.state_dict()]", "['run.pt']"))
    assert "no file run.pt in the current folder." in run("attribute", "recipe.py", code=2).stderr
