"""What the callbacks write, without a trainer."""

import os
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import trak
from trak.errors import CheckpointError, InputError
from trak.integrations import trajectory
from trak.integrations.trajectory import TrajectoryWriter, read_trajectory


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def written(folder, steps, **options):
    writer = TrajectoryWriter(folder, **options)
    model = network()
    writer.begin(model, 0)
    for step in steps:
        with torch.no_grad():
            model[0].weight.fill_(step)
        writer.write(model, step=step, epoch=step / 10, learning_rates=[0.1 / step])
    return writer, model


def test_what_is_read_is_what_was_written(tmp_path):
    _, model = written(tmp_path / "new" / "run", [30, 5, 10])
    run = read_trajectory(tmp_path / "new" / "run")
    assert run.steps == [5, 10, 30] and run.epochs == [0.5, 1.0, 3.0]
    assert run.learning_rates == [0.1 / 5, 0.1 / 10, 0.1 / 30]
    for step, source in zip(run.steps, run.checkpoints):
        state = trak.load_checkpoint(source)
        assert state.keys() == model.state_dict().keys()
        assert (state["0.weight"] == step).all()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(1e-300, 1e3), min_size=1, max_size=3), st.floats(0, 1e6))
def test_numbers_come_back_to_the_last_bit(tmp_path_factory, rates, epoch):
    folder = tmp_path_factory.mktemp("run")
    writer = TrajectoryWriter(folder)
    writer.write(nn.Linear(1, 1), step=1, epoch=epoch, learning_rates=rates)
    run = read_trajectory(folder)
    assert run.group_learning_rates == [tuple(rates)] and run.epochs == [epoch]


def test_groups_with_different_learning_rates_have_no_single_one(tmp_path):
    writer = TrajectoryWriter(tmp_path)
    writer.write(nn.Linear(1, 1), step=3, epoch=1, learning_rates=[0.1, 0.2])
    run = read_trajectory(tmp_path)
    with pytest.raises(
        InputError, match=r"at step 3 parameter groups had different learning rates, \[0\.1, 0\.2\]"
    ):
        _ = run.learning_rates
    assert run.group_learning_rates == [(0.1, 0.2)]


def test_tied_and_overlapping_tensors_are_saved_once_and_whole(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight
            whole = torch.arange(6.0)
            self.register_buffer("left", whole[:3])
            self.register_buffer("right", whole[1:4])
            self.register_buffer("same", whole.view(2, 3))
            self.register_buffer("unsaved", torch.ones(2), persistent=False)

    model = Model()
    path = TrajectoryWriter(tmp_path).write(model, step=1, epoch=1, learning_rates=[0.1])
    state = trak.load_checkpoint(path)
    assert sorted(state) == ["first.bias", "first.weight", "left", "right", "same", "second.bias"]
    assert state["right"].tolist() == [1, 2, 3]
    fitted = trak.gradients.model_state(model, state, "cpu")
    assert trak.checkpoint_hash(fitted) == trak.checkpoint_hash(
        trak.gradients.model_state(model, None, "cpu")
    )


def test_trainable_parameters_and_statistics_only(tmp_path):
    model = network()
    model[0].requires_grad_(False)
    model.register_buffer("quantised", torch.zeros(5, dtype=torch.int8))
    writer = TrajectoryWriter(tmp_path, trainable_only=True)
    writer.write(model, step=1, epoch=1, learning_rates=[0.1])
    stored = trak.load_checkpoint(writer.path(1))
    assert sorted(stored) == ["1.bias", "1.running_mean", "1.running_var", "1.weight", "2.bias", "2.weight"]
    (source,) = read_trajectory(tmp_path, model=model).checkpoints
    assert trak.checkpoint_hash(source()) == trak.checkpoint_hash(dict(model.state_dict()))


class TestWhen:
    def test_steps(self, tmp_path):
        writer = TrajectoryWriter(tmp_path, every=3)
        assert [step for step in range(1, 10) if writer.is_due_after_step(step)] == [3, 6, 9]
        assert not writer.is_due_after_epoch(1.0)
        only = TrajectoryWriter(tmp_path, every=3, only=[6, 7])
        assert [step for step in range(1, 10) if only.is_due_after_step(step)] == [6]

    def test_epochs(self, tmp_path):
        writer = TrajectoryWriter(tmp_path)
        assert [epoch for epoch in (0.5, 1.0, 1.7, 2.9999999999) if writer.is_due_after_epoch(epoch)] == [
            1.0,
            2.9999999999,
        ]
        assert not writer.is_due_after_step(1)
        only = TrajectoryWriter(tmp_path, only={2})
        assert [epoch for epoch in (1, 2, 3) if only.is_due_after_epoch(epoch)] == [2]

    @pytest.mark.parametrize("every", [0, -1, "step", True, 1.5])
    def test_anything_else_is_refused(self, tmp_path, every):
        with pytest.raises(InputError, match='every must be "epoch" or a number of steps'):
            TrajectoryWriter(tmp_path, every=every)

    def test_only_takes_numbers(self, tmp_path):
        with pytest.raises(InputError, match="only must be numbers"):
            TrajectoryWriter(tmp_path, only=["last"])


class TestResuming:
    def test_what_comes_after_the_step_is_written_again(self, tmp_path):
        writer, model = written(tmp_path, [1, 2, 3])
        writer.begin(model, 2)
        assert read_trajectory(tmp_path).steps == [1, 2]

    def test_another_runs_checkpoints(self, tmp_path):
        writer, model = written(tmp_path, [1, 2, 3])
        with pytest.raises(
            CheckpointError, match=r"holds 3 checkpoints, step-00000001\.safetensors first.*overwrite=True"
        ):
            writer.begin(model, 0)
        assert read_trajectory(tmp_path).steps == [1, 2, 3]
        TrajectoryWriter(tmp_path, overwrite=True).begin(model, 0)
        with pytest.raises(CheckpointError, match="no checkpoints of a run"):
            read_trajectory(tmp_path)

    def test_a_write_that_fails_leaves_nothing_and_keeps_what_was_there(self, tmp_path, monkeypatch):
        writer, model = written(tmp_path, [1])

        def full(state, path, metadata):
            path.write_bytes(b"half")
            raise OSError("no space left on device")

        monkeypatch.setattr(trajectory, "save_file", full)
        with pytest.raises(OSError, match="no space"):
            writer.write(model, step=1, epoch=1, learning_rates=[0.1])
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.safetensors"]
        assert read_trajectory(tmp_path).steps == [1]

    def test_files_of_killed_writers_are_removed_when_they_are_old(self, tmp_path):
        writer, model = written(tmp_path, [1])
        old, young = (
            tmp_path / ".tmp-1-a-step-00000002.safetensors",
            tmp_path / ".tmp-2-b-step-00000002.safetensors",
        )
        for path in (old, young):
            path.write_bytes(b"half")
        os.utime(old, (time.time() - 1e4,) * 2)
        writer.begin(model, 1)
        assert young.exists() and not old.exists()
        assert read_trajectory(tmp_path).steps == [1]


def test_models_split_over_processes_are_refused(tmp_path):
    model = network()
    model[0].weight.ds_id = 3
    with pytest.raises(CheckpointError, match=r"'0\.weight' is split over processes"):
        TrajectoryWriter(tmp_path).begin(model, 0)

    class FullyShardedDataParallel(nn.Module):
        pass

    with pytest.raises(CheckpointError, match="wrapped by FSDP"):
        TrajectoryWriter(tmp_path).begin(nn.Sequential(nn.Linear(2, 2), FullyShardedDataParallel()), 0)


def test_other_checkpoints_are_not_taken_for_a_callbacks(tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "step-1.safetensors")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint that a CheckpointCallback.*KeyError.*trak\.list_checkpoints"
    ):
        read_trajectory(tmp_path)
    (tmp_path / "step-1.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="no checkpoint that a CheckpointCallback"):
        read_trajectory(tmp_path)
