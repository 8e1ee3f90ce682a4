"""The checkpoints of a run in a folder, and names fitted to a model."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import trak
from trak.checkpoints import describe, list_checkpoints, load_checkpoint
from trak.checkpoints.read import CONTENTS, TRAINABLE
from trak.errors import CheckpointError, InputError


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def assert_same(loaded, state):
    assert loaded.keys() == state.keys()
    assert trak.checkpoint_hash(loaded) == trak.checkpoint_hash(state)


class TestRuns:
    def test_a_trainers_folders_in_the_order_of_their_steps(self, tmp_path):
        for step in (1000, 500, 20):
            (tmp_path / f"checkpoint-{step}").mkdir()
            save_file(
                {"weight": torch.tensor([float(step)])}, tmp_path / f"checkpoint-{step}" / "model.safetensors"
            )
        (tmp_path / "tmp-checkpoint-3").mkdir()
        (tmp_path / "runs").mkdir()
        (tmp_path / "checkpoint-7").write_text("no folder")
        found = list_checkpoints(tmp_path)
        assert [float(load_checkpoint(path)["weight"]) for path in found] == [20.0, 500.0, 1000.0]

    @pytest.mark.parametrize(
        "names",
        [
            ["epoch=0-step=3.ckpt", "epoch=1-step=12.ckpt"],
            ["step-00000003.safetensors", "step-00000012.safetensors"],
            ["net_step_3.pt", "net_step_12.pt"],
            ["epoch=0-step=3-loss=0.5.ckpt", "epoch=1-step=12-loss=0.25.ckpt"],
        ],
    )
    def test_files_in_the_order_of_their_steps(self, tmp_path, names):
        for name in [
            *reversed(names),
            "last.ckpt",
            ".tmp-1-step-00000020.safetensors",
            "steps.json",
            "stepwise-3.txt",
        ]:
            (tmp_path / name).write_bytes(b"")
        assert [path.name for path in list_checkpoints(str(tmp_path))] == names

    def test_the_folder_itself_is_not_one(self, tmp_path):
        for step in (1, 2):
            save_file({"weight": torch.zeros(1)}, tmp_path / f"step-{step}.safetensors")
        with pytest.raises(
            CheckpointError,
            match=r"checkpoints of a run, not one: step-1\.\S+, step-2.*trak\.list_checkpoints\(",
        ):
            load_checkpoint(tmp_path)

    def test_what_is_wrong_with_a_folder(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"There is no folder .*run"):
            list_checkpoints(tmp_path / "run")
        with pytest.raises(
            CheckpointError, match=r"expected folders checkpoint-STEP or files .* found nothing"
        ):
            list_checkpoints(tmp_path)
        (tmp_path / "epoch=0-step=3.ckpt").write_bytes(b"")
        (tmp_path / "epoch=0-step=3-v1.ckpt").write_bytes(b"")
        with pytest.raises(CheckpointError, match="two checkpoints of step 3"):
            list_checkpoints(tmp_path)

    def test_fitted_ones_are_read_when_they_are_called_and_keep_their_names(self, tmp_path):
        model = network()
        torch.save(
            {"state_dict": {f"net.{key}": value for key, value in model.state_dict().items()}},
            tmp_path / "step=1.ckpt",
        )
        (found,) = list_checkpoints(tmp_path, model=model)
        assert_same(found(), dict(model.state_dict()))
        assert describe(found) == str(tmp_path / "step=1.ckpt")
        with pytest.raises(InputError, match=r"must be a torch\.nn\.Module; got str"):
            load_checkpoint(tmp_path / "step=1.ckpt", model="model")


class TestNames:
    """`load_checkpoint(source, model=model)`."""

    @pytest.mark.parametrize(
        "prefix",
        ["", "model.", "net.backbone.", "module.", "_orig_mod.", "model._orig_mod.", "_orig_mod.model."],
    )
    def test_prefixes(self, prefix):
        model = network()
        own = dict(model.state_dict())
        given = {prefix + name: value for name, value in own.items()}
        loaded = load_checkpoint(given, model=model)
        if prefix in ("module.", "_orig_mod."):
            # Wrappers of the whole: those are looked through wherever a checkpoint is taken up.
            loaded = trak.gradients.model_state(model, loaded, "cpu")
        assert_same(dict(loaded), own)

    def test_what_lies_beside_the_model_is_left_out(self):
        model = network()
        own = dict(model.state_dict())
        given = {"criterion.weight": torch.ones(2), "0.other": torch.ones(1)} | {
            f"net.{name}": v for name, v in own.items()
        }
        assert_same(load_checkpoint(given, model=model), own)

    def test_the_module_that_holds_the_model(self):
        class Holder(nn.Module):
            def __init__(self):
                super().__init__()
                self.net, self.criterion = network(), nn.CrossEntropyLoss(weight=torch.ones(2))

        holder = Holder()
        assert_same(load_checkpoint(holder, model=holder.net), dict(holder.net.state_dict()))
        assert_same(load_checkpoint(lambda: holder, model=holder), dict(holder.state_dict()))

    def test_two_copies_are_not_chosen_from(self):
        model = network()
        given = {
            f"{side}.{name}": value for side in ("net", "ema") for name, value in model.state_dict().items()
        }
        with pytest.raises(CheckpointError, match=r"holds the model 2 times, under 'net\.', 'ema\.'"):
            load_checkpoint(given, model=model)

    def test_a_part_of_the_model_is_no_prefix(self):
        model = network()
        given = {f"net.{name}": value for name, value in model.state_dict().items() if "bias" not in name}
        assert list(load_checkpoint(given, model=model)) == list(given)

    def test_a_compiled_model(self):
        inner = network()
        model = torch.compile(inner, backend="eager")
        loaded = load_checkpoint(
            {f"net.{name}": value for name, value in inner.state_dict().items()}, model=model
        )
        assert_same(loaded, dict(model.state_dict()))

    def test_tied_tensors_may_be_there_once(self):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
                self.second.weight = self.first.weight

        model = Tied()
        own = dict(model.state_dict())
        for dropped in ("first.weight", "second.weight"):
            given = {f"net.{name}": value for name, value in own.items() if name != dropped}
            loaded = load_checkpoint(given, model=model)
            assert set(loaded) == set(own) - {dropped}

    def test_trainable_parameters_only(self, tmp_path):
        model = network()
        part = {"2.weight": torch.ones(2, 4), "2.bias": torch.zeros(2)}
        save_file(part, tmp_path / "part.safetensors", {CONTENTS: TRAINABLE})
        loaded = load_checkpoint(tmp_path / "part.safetensors", model=model)
        assert_same(loaded, dict(model.state_dict()) | part)
        assert loaded["0.weight"].data_ptr() == model[0].weight.data_ptr()
        assert_same(load_checkpoint(tmp_path / "part.safetensors"), part)
        # Of a file that does not say so, the rest is missing and not made up.
        save_file(part, tmp_path / "part.safetensors")
        assert_same(load_checkpoint(tmp_path / "part.safetensors", model=model), part)


def test_state_that_quantised_parameters_save_beside_themselves_is_left_out():
    class Quantised(nn.Linear):
        def _save_to_state_dict(self, destination, prefix, keep_vars):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[f"{prefix}weight.absmax"] = torch.ones(3)
            destination[f"{prefix}weight.quant_state.kind"] = torch.zeros(1, dtype=torch.uint8)

    model = nn.Sequential(Quantised(3, 3))
    assert sorted(load_checkpoint(model)) == ["0.bias", "0.weight"]
    trak.gradients.model_state(model, load_checkpoint(model), "cpu")
