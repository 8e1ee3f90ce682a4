"""Banks whose making was cut short, or whose folder is not what it should be."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from trak import CorruptShardError, FingerprintError, NonFiniteError, StoreError
from trak.evaluation import Bank, RetrainError, model_seed, retrain

N, S, R, T = 30, 5, 2, 3
OPTIONS = {"num_train": N, "num_subsets": S, "models_per_subset": R, "seed": 11}


def train(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(T, generator=generator, dtype=torch.float64) + rows.double().mean()


def outputs(model):
    return model


def keeping(rows, seed):
    return {"weight": train(rows, seed)}


class Failing:
    """Trains like `train`, and fails at the given calls."""

    def __init__(self, *fail_at, error=ValueError):
        self.calls = 0
        self.fail_at = fail_at
        self.error = error

    def __call__(self, rows, seed):
        self.calls += 1
        if self.calls in self.fail_at:
            raise self.error("out of luck")
        return train(rows, seed)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("fail_at", [1, 2, 7, 10])
def test_resumed_is_uninterrupted(tmp_path, workers, fail_at):
    expected = retrain(train, outputs, **OPTIONS)
    failing = Failing(fail_at)
    with pytest.raises(RetrainError, match="ValueError: out of luck"):
        retrain(failing, outputs, folder=tmp_path, workers=workers, **OPTIONS)
    with pytest.raises(StoreError, match="not finished"):
        Bank.load(tmp_path)
    finished = len(list(tmp_path.glob("subset-*")))
    # In-flight models of other threads are kept as well.
    assert fail_at - 1 <= finished <= fail_at - 1 + (workers - 1)
    again = Failing()
    bank = retrain(again, outputs, folder=tmp_path, workers=3 - workers, **OPTIONS)
    assert again.calls == S * R - finished
    assert torch.equal(bank.outputs, expected.outputs)
    assert torch.equal(Bank.load(tmp_path).outputs, expected.outputs)
    never = Failing()
    assert torch.equal(retrain(never, outputs, folder=tmp_path, **OPTIONS).outputs, expected.outputs)
    assert never.calls == 0


def test_errors_name_subset_and_seed():
    with pytest.raises(RetrainError) as caught:
        retrain(Failing(4), outputs, **OPTIONS)
    error = caught.value
    assert (error.subset, error.repeat, error.seed) == (1, 1, model_seed(11, 1, 1))
    assert f"subset 1, model 1 (seed {error.seed})" in str(error)
    assert isinstance(error.__cause__, ValueError)


def test_an_error_in_outputs_is_named_too():
    def broken(model):
        raise KeyError("logits")

    with pytest.raises(RetrainError, match=r"subset 0, model 0 .*KeyError"):
        retrain(train, broken, **OPTIONS)


def test_interrupted_from_the_keyboard(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        retrain(Failing(4, error=KeyboardInterrupt), outputs, folder=tmp_path, **OPTIONS)
    assert len(list(tmp_path.glob("subset-*"))) == 3


def test_models_without_finite_outputs_are_not_kept(tmp_path):
    def diverges(rows, seed):
        return train(rows, seed) * (float("nan") if seed == model_seed(11, 2, 0) else 1)

    with pytest.raises(NonFiniteError, match="subset 2, model 0"):
        retrain(diverges, outputs, folder=tmp_path, **OPTIONS)
    bank = retrain(train, outputs, folder=tmp_path, **OPTIONS)
    assert torch.equal(bank.outputs, retrain(train, outputs, **OPTIONS).outputs)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"seed": 12}, "seed: stored 11, asked for 12"),
        ({"num_subsets": 4}, "num_subsets: stored 5, asked for 4"),
        ({"fraction": 0.25}, r"rows_per_subset: stored \[15, 15\], asked for \[7, 7\]"),
        ({"models_per_subset": 1}, "models_per_subset: stored 2, asked for 1"),
        ({"version": "2"}, "version: stored None, asked for '2'"),
        ({"target_rows": [1, 2, 3]}, "num_targets"),
        ({"keep_models": True}, "keep_models"),
        ({"num_subsets": None, "masks": torch.eye(5, 30)}, "masks"),
    ],
)
def test_other_settings_are_refused_with_the_difference(tmp_path, changes, field):
    with pytest.raises(RetrainError):
        retrain(Failing(3), outputs, folder=tmp_path, **OPTIONS)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    never = Failing()
    with pytest.raises(FingerprintError, match=field):
        retrain(never, outputs, folder=tmp_path, **(OPTIONS | changes))
    assert never.calls == 0
    assert files == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_model_files_of_another_bank_are_refused(tmp_path):
    retrain(train, outputs, folder=tmp_path / "a", **OPTIONS)
    with pytest.raises(RetrainError):
        retrain(Failing(2), outputs, folder=tmp_path / "b", **(OPTIONS | {"version": "b"}))
    name = "subset-00003-model-1.safetensors"
    (tmp_path / "b" / name).write_bytes((tmp_path / "a" / name).read_bytes())
    with pytest.raises(FingerprintError, match=name):
        retrain(train, outputs, folder=tmp_path / "b", **(OPTIONS | {"version": "b"}))


def test_damaged_files_are_named(tmp_path):
    retrain(train, outputs, folder=tmp_path, **OPTIONS)
    file = tmp_path / "subset-00001-model-0.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(CorruptShardError, match=file.name):
        retrain(train, outputs, folder=tmp_path, **OPTIONS)
    (tmp_path / "retrain.json").write_text("{")
    with pytest.raises(CorruptShardError, match=r"retrain\.json"):
        retrain(train, outputs, folder=tmp_path, **OPTIONS)


def test_a_saved_bank_is_not_trained_into(tmp_path):
    retrain(train, outputs, **OPTIONS).save(tmp_path)
    with pytest.raises(StoreError, match=r"Bank\.load"):
        retrain(train, outputs, folder=tmp_path, **OPTIONS)


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "taken").write_text("")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(StoreError, match="no folder"):
            retrain(train, outputs, folder=folder, **OPTIONS)


def test_a_model_whose_parameters_are_gone_is_trained_again(tmp_path):
    options = OPTIONS | {"folder": tmp_path, "keep_models": True}
    bank = retrain(keeping, lambda state: state["weight"], **options)
    bank.models[3].unlink()
    calls = []

    def noted(rows, seed):
        calls.append(seed)
        return keeping(rows, seed)

    retrain(noted, lambda state: state["weight"], **options)
    assert calls == [model_seed(11, 1, 1)]
    assert bank.models[3].is_file()


def test_models_that_cannot_be_kept(tmp_path):
    with pytest.raises(RetrainError, match="Tensor"):
        retrain(train, outputs, folder=tmp_path, keep_models=True, **OPTIONS)
    assert not list(tmp_path.glob("subset-*"))


def test_temporary_files_of_a_killed_run_go_after_an_hour(tmp_path):
    old, new = tmp_path / ".tmp-1-a-x", tmp_path / ".tmp-2-b-y"
    old.write_text("")
    new.write_text("")
    os.utime(old, (time.time() - 7200,) * 2)
    retrain(train, outputs, folder=tmp_path, **OPTIONS)
    assert not old.exists()
    assert new.exists()


RUN = """
import sys, time
sys.path.insert(0, {here!r})
from test_retrain_interrupted import OPTIONS, outputs, retrain, train
def slow(rows, seed):
    time.sleep(0.1)
    return train(rows, seed)
print("ready", flush=True)
retrain(slow, outputs, folder={folder!r}, workers=2, **OPTIONS)
"""


def test_killed_and_resumed(tmp_path):
    code = RUN.format(here=os.path.dirname(__file__), folder=str(tmp_path / "bank"))
    generator = random.Random(0)
    for _ in range(2):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert child.stdout.readline() == "ready\n"
        time.sleep(generator.uniform(0.05, 0.2))
        child.send_signal(signal.SIGKILL)
        child.stdout.close()
        child.wait()
    assert not (tmp_path / "bank" / "bank.safetensors").exists(), "no run was interrupted: make it longer"
    bank = retrain(train, outputs, folder=tmp_path / "bank", **OPTIONS)
    assert torch.equal(bank.outputs, retrain(train, outputs, **OPTIONS).outputs)
