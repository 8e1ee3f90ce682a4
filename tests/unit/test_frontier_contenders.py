"""The built-in contenders, and the figure that they make."""

import dataclasses
import struct

import pytest
import torch
from test_frontier_run import TRAINING, N, T, make, measure

import trak
from trak.errors import InputError
from trak.frontier import (
    Seconds,
    Training,
    built_in_contenders,
    choose_contenders,
    draw_frontier,
    run_frontier,
)

OPTIONAL = {
    "influence-ekfac": "curvlinops",
    "influence-arnoldi": "curvlinops",
    "influence-lissa": "curvlinops",
    "datamodel": "sklearn",
    "bm25": "bm25s",
}


@pytest.fixture(scope="module")
def made():
    problem, bank = make(checkpoints=2, hidden=3)
    texts = [f"word{row % 7} sentence number{row}" for row in range(N + T)]
    problem = dataclasses.replace(
        problem,
        train_texts=texts[:N],
        target_texts=texts[N:],
        runs=[[problem.checkpoints[0]], [problem.checkpoints[1]]],
        learning_rates=[0.5],
    )
    return problem, bank


@pytest.fixture(scope="module")
def everything(made, tmp_path_factory):
    problem, bank = made
    return run_frontier(
        problem,
        bank,
        built_in_contenders(problem),
        training=TRAINING,
        folder=tmp_path_factory.mktemp("everything"),
        checkpoints=(1,),
        slow_targets=3,
        num_bootstrap=20,
    )


def is_there(module):
    import importlib.util

    return importlib.util.find_spec(module) is not None


def test_every_method_is_a_row_that_worked(made, everything):
    methods = {point.method for point in everything.points}
    assert methods == {one.name for one in built_in_contenders(made[0])}
    failed = {point.method: point.error for point in everything.points if point.error}
    for name, error in failed.items():
        assert not is_there(OPTIONAL[name]), (name, error)
        assert "pip install" in error


def test_methods_that_follow_training(made, everything, tmp_path):
    problem, bank = made
    point = next(point for point in everything.points if point.method == "tracin")
    assert (point.reads, point.budget, point.label, point.note) == ("runs", 1, "TracIn", "")
    method = trak.TracIn(
        model=problem.model, task=problem.task, learning_rates=[0.5], projection=trak.Identity(), device="cpu"
    )
    scores = method.fit(problem.train_set, [problem.checkpoints[0]]).attribute(problem.targets).scores
    assert point.lds == pytest.approx(bank.lds(scores).mean)
    without = dataclasses.replace(problem, runs=(), learning_rates=None)
    found = measure((without, bank), tmp_path, ["tracin", "gas"])
    assert {(one.label, one.reads) for one in found.points} == {
        ("TracIn (final)", "checkpoints"),
        ("GAS (final)", "checkpoints"),
    }
    assert all("equal weights" in one.note for one in found.points)


def test_texts_are_for_bm25_only(made, tmp_path):
    problem, bank = made
    without = dataclasses.replace(problem, train_texts=None, target_texts=None)
    assert "bm25" not in {one.name for one in built_in_contenders(without)}
    (bm25,) = choose_contenders(built_in_contenders(problem), ["bm25"])
    found = run_frontier(without, bank, [bm25], training=TRAINING, folder=tmp_path, num_bootstrap=20)
    assert "train_texts" in found.points[0].error


def test_large_models_are_projected():
    problem, _ = make(checkpoints=1)
    large = dataclasses.replace(problem, model=torch.nn.Linear(100, 60))
    by_name = {one.name: one for one in built_in_contenders(large)}
    assert by_name["trak-sparse"].projection == trak.Sparse(4096)
    assert by_name["trak-sparse-1024"].label == "TRAK, random columns, K = 1024"
    assert by_name["trak"].projection == trak.Eigenbasis(4096)
    small = {one.name: one for one in built_in_contenders(problem)}
    assert small["trak"].projection == trak.Identity()
    assert "not projected" in small["trak"].label


def test_conjugate_gradients_solve_where_there_are_fewer_numbers(made):
    def settings(model):
        problem = dataclasses.replace(made[0], model=model)
        (contender,) = choose_contenders(built_in_contenders(problem), ["influence-cg"])
        assert contender.make(trak.frontier.Trial(problem=problem)).space == contender.settings["space"]
        return contender.settings["space"]

    assert settings(torch.nn.Linear(N - 1, 1, bias=False)) == "parameters"
    assert settings(torch.nn.Linear(N + 1, 1, bias=False)) == "gradients"


def test_gradients_that_would_fill_the_memory_are_a_failed_point(made, tmp_path, monkeypatch):
    problem, bank = made
    (contender,) = choose_contenders(built_in_contenders(problem), ["influence-cg"])
    monkeypatch.setattr("trak.methods.runs.available_memory", lambda: 1000)
    monkeypatch.setattr("trak.methods.gram.available_memory", lambda: 1000)
    found = run_frontier(problem, bank, [contender], training=TRAINING, folder=tmp_path, num_bootstrap=20)
    assert "GiB of memory are free" in found.points[0].error


def test_names_and_patterns(made):
    contenders = built_in_contenders(made[0])
    assert choose_contenders(contenders, []) == contenders
    chosen = choose_contenders(contenders, ["random", "trak*"])
    trak_s = ["trak", "trak-sparse", "trak-sparse-1024", "trak-per-layer", "trak-paper"]
    assert [one.name for one in chosen] == [*trak_s, "random"]
    with pytest.raises(InputError, match="no method is called 'shap'"):
        choose_contenders(contenders, ["shap"])


# The figure


def test_the_figure_is_written(everything, tmp_path):
    path = draw_frontier(everything, tmp_path / "frontier.png", title="All", dpi=50)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == (480, 280)
    again = draw_frontier(everything, tmp_path / "again.png", title="All", dpi=50)
    assert again.read_bytes() == data
    passes = draw_frontier(everything, tmp_path / "passes.png", unit="passes", dpi=50)
    assert passes.read_bytes() != data


def test_what_cannot_be_drawn(everything, tmp_path):
    with pytest.raises(InputError, match="unit"):
        draw_frontier(everything, tmp_path / "f.png", unit="joules")
    unknown = dataclasses.replace(everything, training={**everything.training, "passes_per_model": None})
    with pytest.raises(InputError, match="passes_per_model"):
        draw_frontier(unknown, tmp_path / "f.png", unit="passes")
    failed = [dataclasses.replace(point, lds=None, error="no") for point in everything.points]
    with pytest.raises(InputError, match="every point failed"):
        draw_frontier(dataclasses.replace(everything, points=tuple(failed)), tmp_path / "f.png")


def test_training_time_of_zero_has_no_passes(everything):
    free = Training(seconds=Seconds(wall=0, processor=0), passes=2)
    values = {"wall": 0.0, "processor": 0.0, "passes_per_model": free.passes}
    assert dataclasses.replace(everything, training=values).seconds_per_pass is None
