"""`run_frontier` on a linear classifier: figures, charges, failures, going on."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

import trak
from trak.errors import InputError, StoreError
from trak.evaluation import Bank, random_subsets
from trak.frontier import (
    Contender,
    Frontier,
    Problem,
    Seconds,
    Training,
    built_in_contenders,
    choose_contenders,
    markdown_table,
    measure_training,
    run_frontier,
    write_csv,
)
from trak.frontier.clock import OverTimeError, default_clock, time_limit

N, T, D, S = 40, 5, 4, 16
TRAINING = Training(seconds=Seconds(wall=3.0, processor=2.0), passes=6.0)
CHEAP = ["trak-sparse-1024", "gradient-cosine", "representation-dot", "empirical-influence", "random"]


def build(hidden):
    if not hidden:
        return nn.Linear(D, 2, dtype=torch.float64)
    return nn.Sequential(nn.Linear(D, hidden), nn.Tanh(), nn.Linear(hidden, 2)).double()


def fit(inputs, labels, rows, seed, hidden):
    """A few steps of gradient descent."""
    torch.manual_seed(seed)
    model = build(hidden)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
        optimizer.step()
    return model


def make(checkpoints=3, hidden=0):
    """A problem, and a bank of the same kind of models."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(N + T) % 2
    inputs = torch.randn(N + T, D, generator=generator, dtype=torch.float64) + labels[:, None]
    data, targets = (inputs[:N], labels[:N]), (inputs[N:], labels[N:])
    task = trak.ImageClassification()
    masks = random_subsets(N, S + checkpoints, seed=1)
    models = [fit(*data, mask.nonzero()[:, 0], seed, hidden) for seed, mask in enumerate(masks)]
    with torch.no_grad():
        outputs = torch.stack([task.output(model, targets) for model in models[checkpoints:]])
    problem = Problem(
        model=build(hidden),
        train_set=data,
        targets=targets,
        task="image_classification",
        checkpoints=[model.state_dict() for model in models[:checkpoints]],
        options={"device": "cpu", "progress": False},
    )
    return problem, Bank(masks=masks[checkpoints:], outputs=outputs[:, None])


@pytest.fixture(scope="module")
def made():
    return make()


def measure(made, folder, names=CHEAP, **options):
    problem, bank = made
    contenders = choose_contenders(built_in_contenders(problem), names)
    options = {"training": TRAINING, "checkpoints": (1, 3), "num_bootstrap": 50, **options}
    return run_frontier(problem, bank, contenders, folder=folder, **options)


@pytest.fixture(scope="module")
def frontier(made, tmp_path_factory):
    return measure(made, tmp_path_factory.mktemp("frontier"))


def test_every_method_at_every_budget(frontier):
    rows = [(point.method, point.budget, point.num_models) for point in frontier.points]
    assert rows == [
        ("trak-sparse-1024", 1, 1),
        ("trak-sparse-1024", 3, 3),
        ("gradient-cosine", 1, 1),
        ("gradient-cosine", 3, 3),
        ("representation-dot", 1, 1),
        ("representation-dot", 3, 3),
        ("empirical-influence", 8, 8),
        ("random", 0, 0),
    ]
    assert not [point.error for point in frontier.points if point.error]
    assert frontier.machine["threads"] == torch.get_num_threads()
    assert frontier.clock == "processor"


def test_lds_is_what_the_method_gives_by_itself(made, frontier):
    problem, bank = made
    alone = trak.attribute(
        problem.model,
        problem.train_set,
        problem.targets,
        task=problem.task,
        checkpoints=problem.checkpoints,
        projection=trak.Identity(),
        device="cpu",
    )
    found = next(
        point for point in frontier.points if (point.method, point.budget) == ("trak-sparse-1024", 3)
    )
    expected = bank.lds(alone.scores, num_bootstrap=50)
    assert (found.lds, found.low, found.high) == pytest.approx((expected.mean, expected.low, expected.high))
    assert found.lds > 0.3


def test_a_method_that_reads_the_bank_is_judged_by_the_rest_of_it(made, frontier, tmp_path):
    problem, bank = made
    point = next(point for point in frontier.points if point.method == "empirical-influence")
    measure(made, tmp_path, ["empirical-influence"])
    (file,) = (tmp_path / "points").glob("*.json")
    kept = json.loads(file.read_text())
    estimated, judged = set(kept["facts"]["read"]), set(kept["subsets"])
    assert not estimated & judged
    assert len(estimated | judged) == S
    rows = torch.tensor(sorted(estimated))
    method = trak.EmpiricalInfluence(masks=bank.masks[rows], outputs=bank.outputs[rows])
    scores = method.fit(problem.train_set).attribute(problem.targets).scores
    rest = bank.subset(subsets=torch.tensor(sorted(judged)))
    assert point.lds == pytest.approx(rest.lds(scores, num_bootstrap=50).mean)
    assert (point.num_subsets, point.common_lds) == (len(judged), pytest.approx(point.lds))
    # All others are judged by the whole bank, and compared on the rest.
    other = frontier.points[0]
    assert other.num_subsets == S
    assert other.common_lds != other.lds
    assert frontier.bank["common_subsets"] == len(judged)


def test_training_is_charged_for_each_model(frontier):
    for point in frontier.points:
        assert point.train_seconds == TRAINING.seconds * point.num_models
        assert point.seconds.wall == pytest.approx(3.0 * point.num_models + point.attribute_seconds.wall)
    assert frontier.seconds_per_pass == pytest.approx(2.0 / 6)


def test_stored_features_are_charged_to_every_method_that_reads_them(made, tmp_path):
    slow = 0.1

    class Slow(trak.ImageClassification):
        def output_and_weight(self, model, batch):
            time.sleep(slow)
            return super().output_and_weight(model, batch)

    problem, bank = made
    made = dataclasses.replace(problem, task=Slow()), bank
    found = measure(made, tmp_path, ["gradient-cosine", "gradient-dot"])
    seconds = {(point.method, point.budget): point.attribute_seconds.wall for point in found.points}
    # Reading stored features takes milliseconds; a training set and targets take two batches at each checkpoint.
    for method in ("gradient-cosine", "gradient-dot"):
        assert seconds[method, 1] > 2 * slow
        assert seconds[method, 3] - seconds[method, 1] > 4 * slow


def test_every_method_computes_its_own_gram_matrices(made, tmp_path, monkeypatch):
    from trak.store.rows import RowSet

    saved, save = [], RowSet.save_derived
    monkeypatch.setattr(
        RowSet, "save_derived", lambda self, name, *rest: (saved.append(name), save(self, name, *rest))
    )
    measure(made, tmp_path, ["trak", "trak-paper"], checkpoints=(2,))
    # Both read the same features, at two checkpoints.
    assert len(list((tmp_path / "features").rglob("derived-*"))) == 2
    assert len(saved) == 4


def test_best_is_what_no_cheaper_point_reaches(frontier):
    best = frontier.best()
    for point in frontier.points:
        cheaper = [one for one in best if one.seconds.processor <= point.seconds.processor]
        assert max(one.lds for one in cheaper) >= point.lds
    assert [point.lds for point in best] == sorted(point.lds for point in best)


# Failing


class Broken(trak.RandomScores):
    def fit(self, train_set, checkpoints=None):
        raise RuntimeError("no such luck\nand more of it")


def own(name, make, **options):
    return Contender(name=name, label=name.title(), family="data", make=make, reads="data", **options)


def test_a_method_that_fails_is_a_row(made, tmp_path):
    problem, bank = made
    contenders = [own("broken", lambda trial: Broken()), own("fine", lambda trial: trak.RandomScores())]
    seen = []
    found = run_frontier(
        problem, bank, contenders, training=TRAINING, folder=tmp_path, num_bootstrap=20, on_point=seen.append
    )
    broken, fine = found.points
    assert broken.error == "RuntimeError: no such luck and more of it"
    assert (broken.lds, broken.low, broken.common_lds) == (None, None, None)
    assert fine.error is None
    assert fine.lds is not None
    assert "failed: RuntimeError" in str(seen[0])
    assert "failed" in markdown_table(found)
    # It is tried again, the other one is not.
    again = run_frontier(
        problem,
        bank,
        [own("broken", lambda trial: trak.RandomScores()), own("fine", lambda trial: Broken())],
        training=TRAINING,
        folder=tmp_path,
        num_bootstrap=20,
    )
    assert [point.error for point in again.points] == [None, None]


class Endless(trak.RandomScores):
    def fit(self, train_set, checkpoints=None):
        try:
            time.sleep(60)
        except Exception as error:  # what a library may do
            raise AssertionError from error


def test_a_time_limit_is_a_row_too_and_kept_until_there_is_more(made, tmp_path):
    problem, bank = made

    def run(make, limit):
        found = run_frontier(
            problem,
            bank,
            [own("endless", make)],
            training=TRAINING,
            folder=tmp_path,
            num_bootstrap=20,
            limit=limit,
        )
        return found.points[0]

    assert run(lambda trial: Endless(), 0.2).error == "not done after 0.2 s"
    assert run(lambda trial: trak.RandomScores(), 0.2).error == "not done after 0.2 s"
    assert run(lambda trial: trak.RandomScores(), 30).error is None


def test_the_alarm_is_put_back():
    import signal

    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(OverTimeError), time_limit(0.05):
        time.sleep(5)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


# Going on


def test_finished_points_are_not_measured_again(made, tmp_path, monkeypatch):
    first = measure(made, tmp_path)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "points").iterdir()}
    monkeypatch.setattr(trak.RandomScores, "fit", Broken.fit)
    second = measure(made, tmp_path)
    assert dataclasses.replace(second, machine={}) == dataclasses.replace(first, machine={})
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "points").iterdir()} == files
    assert measure(made, tmp_path, ["random"], fresh=True).points[0].error is not None


def test_what_is_kept_can_be_shown_without_measuring_more(made, tmp_path):
    measure(made, tmp_path, ["random"])
    found = measure(made, tmp_path, ["random", "gradient-dot"], only_kept=True)
    assert [point.method for point in found.points] == ["random"]
    with pytest.raises(InputError, match="no point of these methods"):
        measure(made, tmp_path, ["gradient-dot"], only_kept=True)
    with pytest.raises(InputError, match="choose one"):
        measure(made, tmp_path, ["random"], only_kept=True, fresh=True)


def test_a_point_is_known_by_all_that_decides_it(made, tmp_path):
    problem, bank = made
    measure(made, tmp_path, ["representation-dot"], checkpoints=(1,))

    def count(**options):
        changed = options.pop("made", made)
        measure(changed, tmp_path, ["representation-dot"], checkpoints=(1,), **options)
        return len(list((tmp_path / "points").glob("*.json")))

    assert count() == 1
    assert count(training=Training(seconds=Seconds(wall=9, processor=9))) == 1
    assert count(num_targets=3) == 2
    assert count(num_bootstrap=60) == 3
    other = dataclasses.replace(problem, checkpoints=problem.checkpoints[::-1])
    assert count(made=(other, bank)) == 4
    moved = dataclasses.replace(problem, train_set=(problem.train_set[0] + 1, problem.train_set[1]))
    assert count(made=(moved, bank)) == 5
    assert count(made=(problem, Bank(masks=bank.masks, outputs=bank.outputs + 1))) == 6


KILLED = """
import os, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {here!r})
import test_frontier_run as here
seen = []
def stop(point):
    seen.append(point)
    if len(seen) == 3:
        os._exit(9)
here.measure(here.make(), {folder!r}, on_point=stop)
"""


def test_a_killed_run_goes_on(made, frontier, tmp_path):
    code = KILLED.format(here=os.path.dirname(__file__), folder=str(tmp_path))
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    kept = sorted((tmp_path / "points").glob("*.json"))
    assert len(kept) == 3
    assert len(list((tmp_path / "points").glob("*.safetensors"))) == 3
    times = [file.stat().st_mtime_ns for file in kept]
    found = measure(made, tmp_path)
    assert [file.stat().st_mtime_ns for file in kept] == times
    assert len(list((tmp_path / "points").glob("*.json"))) == len(found.points)
    assert [point.lds for point in found.points] == pytest.approx([point.lds for point in frontier.points])


# Targets


def test_slow_methods_get_fewer_targets_and_say_so(made, tmp_path):
    problem, bank = made
    contenders = [
        own("slow", lambda trial: trak.RandomScores(seed=1), is_slow=True),
        own("fast", lambda trial: trak.RandomScores()),
    ]
    found = run_frontier(
        problem,
        bank,
        contenders,
        training=TRAINING,
        folder=tmp_path,
        num_targets=4,
        slow_targets=2,
        num_bootstrap=20,
    )
    slow, fast = found.points
    assert (slow.num_targets, fast.num_targets) == (2, 4)
    assert found.bank["common_targets"] == 2
    assert found.is_judged_by_less(slow)
    assert not found.is_judged_by_less(fast)
    scores = (
        trak.RandomScores().fit(problem.train_set).attribute(tuple(x[:4] for x in problem.targets)).scores
    )
    part = bank.subset(targets=slice(0, 2))
    assert fast.common_lds == pytest.approx(part.lds(scores[:, :2], num_bootstrap=20).mean)
    assert fast.lds == pytest.approx(bank.subset(targets=slice(0, 4)).lds(scores, num_bootstrap=20).mean)


def test_the_first_targets_of_a_dataset(made, tmp_path):
    problem, bank = made
    pairs = [(problem.targets[0][row], int(problem.targets[1][row])) for row in range(T)]
    as_dataset = dataclasses.replace(problem, targets=torch.utils.data.DataLoader(pairs, batch_size=2))
    one = measure((as_dataset, bank), tmp_path / "a", ["representation-dot"], num_targets=3)
    other = measure(made, tmp_path / "b", ["representation-dot"], num_targets=3)
    assert [point.lds for point in one.points] == pytest.approx([point.lds for point in other.points])


# Files


def test_json_and_csv_have_everything(frontier, tmp_path):
    path = frontier.save(tmp_path / "frontier.json")
    again = Frontier.load(path)
    assert again.points == frontier.points
    assert again == frontier
    import csv

    with open(write_csv(frontier, tmp_path / "frontier.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(frontier.points)
    assert float(rows[0]["lds"]) == frontier.points[0].lds
    assert rows[0]["error"] == ""
    assert float(rows[1]["train_seconds_wall"]) == 9.0


def test_other_files_are_refused(tmp_path):
    with pytest.raises(StoreError, match="no frontier at"):
        Frontier.load(tmp_path / "nothing.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(StoreError, match="format"):
        Frontier.load(tmp_path / "other.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(StoreError, match="no JSON"):
        Frontier.load(tmp_path / "broken.json")


def test_damaged_points_are_an_error(made, tmp_path):
    measure(made, tmp_path, ["random"])
    (file,) = (tmp_path / "points").glob("*.json")
    file.write_text("{}")
    with pytest.raises(trak.CorruptShardError, match="damaged"):
        measure(made, tmp_path, ["random"])


# Arguments


def test_impossible_arguments(made, tmp_path):
    problem, bank = made

    def refuses(words, change=None, **options):
        changed = dataclasses.replace(problem, **(change or {}))
        with pytest.raises(InputError, match=words):
            measure((changed, bank), tmp_path, ["random"], **options)

    refuses("train_set has 3 rows", {"train_set": tuple(x[:3] for x in problem.train_set)})
    refuses("targets has 2 rows", {"targets": tuple(x[:2] for x in problem.targets)})
    refuses("checkpoints is empty", {"checkpoints": []})
    refuses("their own|own settings", {"options": {"damping": 1.0}})
    refuses("same number of checkpoints", {"runs": [[1, 2], [3]]})
    refuses("belong together", {"train_texts": ["a"] * N})
    refuses("1 texts for 40 rows", {"train_texts": ["a"]})
    refuses("num_targets", num_targets=T + 1)
    refuses("slow_targets", slow_targets=0)
    refuses("estimate from", estimation_share=0.95)
    refuses("checkpoints must be", checkpoints=())
    refuses("clock", clock="sun")
    same = own("same", lambda trial: trak.RandomScores())
    with pytest.raises(InputError, match="different names"):
        run_frontier(problem, bank, [same, same], training=TRAINING, folder=tmp_path)


def test_a_contender_says_what_it_is():
    with pytest.raises(InputError, match="reads must be"):
        Contender(name="a", label="A", family="data", make=lambda trial: None, reads="tea leaves")
    with pytest.raises(InputError, match="lower-case"):
        own("Not a name", lambda trial: None)


# Clocks


def test_training_is_measured_once_and_scaled_to_a_whole_model(tmp_path):
    calls = []

    def part():
        calls.append(1)
        time.sleep(0.05)
        return 0.25

    first = measure_training(part, folder=tmp_path, passes=5)
    assert 0.2 <= first.seconds.wall < 2
    assert measure_training(part, folder=tmp_path, passes=5) == first
    assert len(calls) == 1
    assert first.passes == 5


@pytest.mark.parametrize("share", [0, 1.5, "all", math.nan])
def test_shares_of_a_training(tmp_path, share):
    with pytest.raises(InputError, match="share"):
        measure_training(lambda: share, folder=tmp_path)
    assert not (tmp_path / "training.json").exists()


def test_impossible_trainings():
    with pytest.raises(InputError, match="seconds"):
        Training(seconds=Seconds(wall=-1, processor=0))
    with pytest.raises(InputError, match="passes"):
        Training(seconds=Seconds(wall=1, processor=1), passes=0)


def test_the_clock_that_sees_the_work():
    assert default_clock({"device": "cpu"}) == "processor"
    assert default_clock({"device": torch.device("cuda")}) == "wall"


def test_the_mean_of_predictions_is_judged_as_scores_are(made):
    """Judging predictions by "subset s holds row s" is judging the scores that they are sums of."""
    from trak.evaluation import lds, predictions

    _, bank = made
    scores = np.random.default_rng(0).normal(size=(N, T))
    predicted = predictions(scores, bank.masks)
    direct = lds(scores, bank.masks, bank.outputs, num_bootstrap=30)
    again = lds(predicted, np.eye(S, dtype=bool), bank.outputs, num_bootstrap=30)
    assert (again.mean, again.low, again.high) == (direct.mean, direct.low, direct.high)
