"""Removal curves and brittleness that were cut short go on from what their folder holds."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from trak import ArrayScores, CorruptShardError, FingerprintError, InputError, StoreError
from trak.evaluation import brittleness, removal_curve

N, T = 40, 3
SCORES = np.random.default_rng(0).normal(size=(N, T))


class Linear:
    """f_t = sum of the kept rows' scores and noise by seed; counts calls, and may stop at one of them."""

    def __init__(self, stop_at=None, kill=False):
        self.calls, self.stop_at, self.kill = 0, stop_at, kill

    def __call__(self, indices, seed):
        self.calls += 1
        if self.calls == self.stop_at:
            if self.kill:
                os._exit(9)
            raise RuntimeError("stopped")
        noise = np.random.default_rng(seed).normal(size=T)
        return SCORES[indices.numpy()].sum(0) + 0.1 * noise


def curves(train, **options):
    return removal_curve(
        train, {"a": SCORES, "b": -SCORES}, k=[2, 5], num_seeds=2, num_bootstrap=20, **options
    )


def flips(train, **options):
    return brittleness(train, SCORES, max_fraction=0.5, threshold=2.0, num_seeds=2, **options)


def same(first, second):
    if hasattr(first, "flips"):
        return first == second
    return all(
        np.array_equal(curve.changes, second.curves[name].changes) for name, curve in first.curves.items()
    ) and np.array_equal(first.full_outputs, second.full_outputs)


@pytest.mark.parametrize("measure", [curves, flips])
@pytest.mark.parametrize("stop_at", [1, 2, 9])
def test_resumed_is_uninterrupted(tmp_path, measure, stop_at):
    plain = Linear()
    expected = measure(plain)
    with pytest.raises(RuntimeError, match="stopped"):
        measure(Linear(stop_at), folder=tmp_path)
    kept = len(list(tmp_path.glob("rows-*.safetensors")))
    assert kept == stop_at - 1
    rest = Linear()
    assert same(measure(rest, folder=tmp_path), expected)
    assert rest.calls <= plain.calls - kept
    never = Linear()
    assert same(measure(never, folder=tmp_path), expected)
    assert never.calls == 0
    assert measure(Linear(), folder=tmp_path).num_trainings == plain.calls


@pytest.mark.parametrize("measure", ["curves", "flips"])
def test_a_killed_process(tmp_path, measure):
    code = (
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "import test_counterfactuals_interrupted as here\n"
        f"here.{measure}(here.Linear(stop_at=8, kill=True), folder={str(tmp_path)!r})\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert len(list(tmp_path.glob("rows-*.safetensors"))) == 7
    rest, plain, run = Linear(), Linear(), globals()[measure]
    assert same(run(rest, folder=tmp_path), run(plain))
    assert rest.calls <= plain.calls - 7


def test_both_measures_and_other_scores_share_models(tmp_path):
    first = Linear()
    removal_curve(first, {"a": SCORES}, k=[1, 2, 4], num_seeds=2, random=False, folder=tmp_path)
    second = Linear()
    result = flips(second, folder=tmp_path)
    assert second.calls < result.num_trainings
    third = Linear()
    again = removal_curve(
        third, {"c": ArrayScores(SCORES)}, k=[1, 2], num_seeds=2, random=False, folder=tmp_path
    )
    assert third.calls == 0
    assert again.num_trainings == 2 * (1 + 2 * T)


def other(indices, seed):
    return np.zeros(T)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"version": "2"}, "version: stored None, asked for '2'"),
        ({"train": other}, "train: stored 'Linear', asked for 'other'"),
        ({"scores": SCORES[:, :2]}, "num_targets: stored 3, asked for 2"),
        ({"scores": SCORES[:30]}, "num_train: stored 40, asked for 30"),
    ],
)
def test_another_training_is_refused(tmp_path, change, difference):
    curves(Linear(), folder=tmp_path)
    options = {"train": Linear(), "scores": SCORES, "folder": tmp_path, **change}
    with pytest.raises(FingerprintError, match=difference):
        brittleness(options.pop("train"), options.pop("scores"), **options)


def test_bad_arguments(tmp_path):
    with pytest.raises(InputError, match=r"pass folder= too"):
        flips(Linear(), version="1")
    with pytest.raises(InputError, match="version must be a string"):
        curves(Linear(), folder=tmp_path, version=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="no folder"):
        curves(Linear(), folder=tmp_path / "file")


def test_damaged_files_are_named(tmp_path):
    curves(Linear(), folder=tmp_path)
    file = next(tmp_path.glob("rows-*"))
    data = file.read_bytes()
    file.write_bytes(data[:-3])
    with pytest.raises(CorruptShardError, match=file.name):
        curves(Linear(), folder=tmp_path)
    file.unlink()
    mended = Linear()
    curves(mended, folder=tmp_path)
    assert mended.calls == 1
    (tmp_path / "retrainings.json").write_text("{")
    with pytest.raises(CorruptShardError, match=r"retrainings\.json"):
        curves(Linear(), folder=tmp_path)


def test_a_file_of_another_folder_is_refused(tmp_path):
    curves(Linear(), folder=tmp_path / "a")
    curves(Linear(), folder=tmp_path / "b", version="2")
    for file in (tmp_path / "b").glob("rows-*"):
        (tmp_path / "a" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(FingerprintError, match="from another folder"):
        curves(Linear(), folder=tmp_path / "a")


def test_outputs_that_are_refused_are_not_kept(tmp_path):
    with pytest.raises(InputError, match="one output for each"):
        removal_curve(lambda indices, seed: torch.zeros(2), {"a": SCORES}, k=1, folder=tmp_path)
    assert not list(tmp_path.glob("rows-*"))
