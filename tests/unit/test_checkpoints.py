"""Reading checkpoints from every kind of source, and what is said when one cannot be read."""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from trak.checkpoints import checkpoint_hash, describe, load_checkpoint
from trak.errors import CheckpointError


class Evil:
    """A pickle that would do something: here, nothing worse than count."""

    loaded = 0

    def __getstate__(self):
        return {"anything": 1}

    def __setstate__(self, state):
        Evil.loaded += 1


@pytest.fixture
def state():
    generator = torch.Generator().manual_seed(0)
    return {
        "layer.weight": torch.randn(3, 4, generator=generator),
        "layer.bias": torch.randn(3, generator=generator).half(),
        "steps": torch.tensor(7),
        "empty": torch.zeros(0, 2),
        "flag": torch.tensor([True, False]),
        "brain": torch.randn(5, generator=generator).bfloat16(),
    }


def assert_same(loaded, state):
    assert list(loaded) == list(state) or sorted(loaded) == sorted(state)
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
        assert not loaded[name].requires_grad


def as_index(folder, state, save, suffix, index):
    names = sorted(state)
    parts = {f"part-1{suffix}": names[:2], f"part-2{suffix}": names[2:]}
    for file, part in parts.items():
        save({name: state[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder / index


SOURCES = {
    "mapping": lambda folder, state: state,
    "ordered": lambda folder, state: OrderedDict(state),
    "safetensors": lambda folder, state: (
        save_file(state, folder / "a.safetensors") or folder / "a.safetensors"
    ),
    "pt": lambda folder, state: torch.save(state, folder / "a.pt") or str(folder / "a.pt"),
    "pth": lambda folder, state: torch.save(OrderedDict(state), folder / "a.pth") or folder / "a.pth",
    "pth.tar": lambda folder, state: (
        torch.save({"state_dict": state, "epoch": 3}, folder / "a.pth.tar") or folder / "a.pth.tar"
    ),
    "bin": lambda folder, state: torch.save(state, folder / "a.bin") or folder / "a.bin",
    "lightning": lambda folder, state: (
        torch.save(
            {"epoch": 1, "state_dict": state, "optimizer_states": [{"lr": 0.1}], "loops": {}},
            folder / "a.ckpt",
        )
        or folder / "a.ckpt"
    ),
    "model key": lambda folder, state: (
        torch.save({"model": state, "optimizer": {"lr": 0.1}}, folder / "a.pt") or folder / "a.pt"
    ),
    "model_state_dict key": lambda folder, state: {"model_state_dict": state, "loss": 0.5},
    "old torch format": lambda folder, state: (
        torch.save(state, folder / "a.pt", _use_new_zipfile_serialization=False) or folder / "a.pt"
    ),
    "safetensors index": lambda folder, state: as_index(
        folder, state, save_file, ".safetensors", "model.safetensors.index.json"
    ),
    "pickle index": lambda folder, state: as_index(
        folder, state, torch.save, ".bin", "pytorch_model.bin.index.json"
    ),
    "folder with an index": lambda folder, state: (
        as_index(folder, state, save_file, ".safetensors", "model.safetensors.index.json").parent
    ),
    "folder": lambda folder, state: (
        save_file(state, folder / "model.safetensors")
        or torch.save({}, folder / "pytorch_model.bin")
        or folder
    ),
    "folder with one file": lambda folder, state: (
        torch.save(state, folder / "epoch3.ckpt") or torch.save({}, folder / "optimizer.state") or folder
    ),
    "callable": lambda folder, state: lambda: state,
    "callable to a path": lambda folder, state: (
        torch.save(state, folder / "a.pt") or (lambda: folder / "a.pt")
    ),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_tensors_and_hash(tmp_path, state, source):
    loaded = load_checkpoint(SOURCES[source](tmp_path, state))
    assert_same(loaded, state)
    assert checkpoint_hash(loaded) == checkpoint_hash(state)


def test_module():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    loaded = load_checkpoint(model)
    assert_same(loaded, {name: tensor.detach() for name, tensor in model.state_dict().items()})
    assert loaded["0.weight"].data_ptr() == model[0].weight.data_ptr()
    assert model[0].weight.requires_grad
    assert_same(load_checkpoint(lambda: model), loaded)


def test_extra_state_is_no_tensor(state):
    assert_same(load_checkpoint({**state, "layer._extra_state": {"anything": 1}}), state)


def test_prefixes_are_left_alone():
    assert list(load_checkpoint({"state_dict": {"model.weight": torch.zeros(1)}, "epoch": 1})) == [
        "model.weight"
    ]


def test_all_tensors_are_never_unwrapped():
    """A parameter may be called "model"."""
    assert list(load_checkpoint({"model": torch.zeros(1), "weight": torch.ones(1)})) == ["model", "weight"]


def test_a_callable_is_called_once_for_each_load(state):
    calls = []
    load_checkpoint(lambda: calls.append(1) or state)
    assert calls == [1]


class TestRefusals:
    """Each message says what was wrong and what to do."""

    def test_pickles_that_need_more(self, tmp_path, state):
        path = tmp_path / "a.ckpt"
        torch.save({"state_dict": state, "hyper_parameters": Evil()}, path)
        Evil.loaded = 0
        with pytest.raises(
            CheckpointError, match=r"wants to load \S*Evil, which can run any code.*trust_pickle=True"
        ):
            load_checkpoint(path)
        assert Evil.loaded == 0
        assert_same(load_checkpoint(path, trust_pickle=True), state)
        assert Evil.loaded == 1

    def test_whole_pickled_modules(self, tmp_path):
        path = tmp_path / "a.pt"
        model = nn.Linear(2, 3)
        torch.save(model, path)
        with pytest.raises(CheckpointError, match="Linear"):
            load_checkpoint(path)
        assert_same(
            load_checkpoint(path, trust_pickle=True), {"weight": model.weight.data, "bias": model.bias.data}
        )

    def test_modules_inside_a_pickle(self, tmp_path):
        path = tmp_path / "a.pt"
        torch.save({"model": nn.Linear(2, 3), "epoch": 1}, path)
        assert sorted(load_checkpoint(path, trust_pickle=True)) == ["bias", "weight"]

    def test_missing_files_name_their_neighbours(self, tmp_path, state):
        torch.save(state, tmp_path / "epoch_10.pt")
        with pytest.raises(
            CheckpointError, match=r"There is no file epoch_01.pt in .*Did you mean epoch_10.pt\?"
        ):
            load_checkpoint(tmp_path / "epoch_01.pt")
        with pytest.raises(CheckpointError, match=r"Checkpoints there: epoch_10.pt\."):
            load_checkpoint(tmp_path / "z.safetensors")
        with pytest.raises(CheckpointError, match=r"its folder .*runs/a does not exist \(there is .*\)"):
            load_checkpoint(tmp_path / "runs" / "a" / "epoch_10.pt")

    @pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.safetensors.index.json"])
    def test_empty_files(self, tmp_path, name):
        (tmp_path / name).touch()
        with pytest.raises(CheckpointError, match=r"is empty \(0 bytes\)"):
            load_checkpoint(tmp_path / name)

    @pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.safetensors.index.json"])
    def test_damaged_files(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"\x80no checkpoint at all" * 10)
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(tmp_path / name)

    @pytest.mark.parametrize("save", [torch.save, lambda state, path: save_file(state, path)])
    def test_truncated_files(self, tmp_path, state, save):
        path = tmp_path / ("a.pt" if save is torch.save else "a.safetensors")
        save(state, path)
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(CheckpointError, match=path.name):
            load_checkpoint(path)

    def test_plain_pickles(self, tmp_path):
        (tmp_path / "a.pt").write_bytes(pickle.dumps(Evil))
        with pytest.raises(CheckpointError, match=r"a\.pt"):
            load_checkpoint(tmp_path / "a.pt")

    def test_unknown_suffix(self, tmp_path):
        (tmp_path / "a.onnx").write_bytes(b"x")
        with pytest.raises(CheckpointError, match=r"ends with \.safetensors, .*\.ckpt.*callable"):
            load_checkpoint(tmp_path / "a.onnx")

    @pytest.mark.parametrize(
        ("loaded", "message"),
        [
            ({}, "holds no tensors"),
            ({"state_dict": {}}, "holds no tensors"),
            (
                {"epoch": 3, "lr": 0.1},
                r"no mapping of names to tensors.* it holds 'epoch' \(int\), 'lr' \(float\)",
            ),
            ({0: torch.zeros(1)}, r"it holds 0 \(a int as name\)"),
            (
                {"model": {"a": torch.zeros(1)}, "state_dict": {"b": torch.zeros(1)}},
                "under state_dict, model: which one is meant",
            ),
            ([torch.zeros(1)], "holds a list; expected a mapping"),
        ],
    )
    def test_what_is_no_state_dict(self, tmp_path, loaded, message):
        torch.save(loaded, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path / "a.pt")

    @pytest.mark.parametrize("source", [3, None, [1, 2], torch.zeros(1)])
    def test_what_is_no_source(self, source):
        with pytest.raises(CheckpointError, match=f"got {type(source).__name__}"):
            load_checkpoint(source)

    def test_callables_without_end(self):
        def forever():
            return forever

        with pytest.raises(CheckpointError, match="returned a callable"):
            load_checkpoint(forever)

    def test_errors_inside_a_callable_pass(self):
        with pytest.raises(ZeroDivisionError):
            load_checkpoint(lambda: 1 / 0)

    def test_folders(self, tmp_path, state):
        with pytest.raises(CheckpointError, match="holds no checkpoint: it is empty"):
            load_checkpoint(tmp_path)
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(CheckpointError, match=r"holds no checkpoint: found config.json"):
            load_checkpoint(tmp_path)
        torch.save(state, tmp_path / "a.pt")
        torch.save(state, tmp_path / "b.pt")
        with pytest.raises(CheckpointError, match=r"several checkpoints: found a.pt, b.pt"):
            load_checkpoint(tmp_path)

    def test_indexes(self, tmp_path, state):
        index = as_index(tmp_path, state, save_file, ".safetensors", "model.safetensors.index.json")
        whole = json.loads(index.read_text())
        for weight_map, message in [
            ({"a": "../secret.safetensors"}, r"outside its folder: \.\./secret"),
            ({"a": "/etc/passwd.safetensors"}, "outside its folder"),
            ({"a": "part-3.safetensors"}, "not there: part-3.safetensors"),
            (
                {**whole["weight_map"], "nothing": "part-1.safetensors"},
                "part-1.safetensors holds nothing, and it does not",
            ),
            ([1], "no index of a sharded checkpoint"),
            ({}, "holds no tensors"),
        ]:
            index.write_text(json.dumps({"weight_map": weight_map}))
            with pytest.raises(CheckpointError, match=message):
                load_checkpoint(index)


class TestHash:
    """Equal exactly where names, dtypes, shapes and bytes are."""

    def test_order_of_names_memory_and_views_do_not_matter(self, state):
        weight = state["layer.weight"]
        views = {**dict(reversed(state.items())), "layer.weight": weight.T.contiguous().T}
        assert not views["layer.weight"].is_contiguous()
        assert checkpoint_hash(views) == checkpoint_hash(state)
        assert checkpoint_hash(
            {n: nn.Parameter(t) if t.is_floating_point() else t for n, t in state.items()}
        ) == checkpoint_hash(state)

    def test_tied_weights_count_under_each_name(self, state):
        weight = torch.ones(2, 2)
        tied, copied = {"a": weight, "b": weight}, {"a": weight, "b": weight.clone()}
        assert checkpoint_hash(tied) == checkpoint_hash(copied)
        assert checkpoint_hash(tied) != checkpoint_hash({"a": weight})

    @pytest.mark.parametrize(
        "change",
        [
            lambda s: {**s, "layer.weight": s["layer.weight"] + 1e-6},
            lambda s: {**s, "layer.weight": s["layer.weight"].reshape(4, 3)},
            lambda s: {**s, "layer.weight": s["layer.weight"].T},
            lambda s: {**s, "layer.bias": s["layer.bias"].float()},
            lambda s: {**s, "empty": torch.zeros(2, 0)},
            lambda s: {**s, "more": torch.zeros(1)},
            lambda s: {n: t for n, t in s.items() if n != "empty"},
            lambda s: {n.replace("layer", "other"): t for n, t in s.items()},
        ],
    )
    def test_any_change_changes_it(self, state, change):
        assert checkpoint_hash(change(state)) != checkpoint_hash(state)

    def test_lazy_conjugates_are_resolved(self):
        z = torch.randn(3, dtype=torch.complex64)
        assert checkpoint_hash({"z": z.conj()}) == checkpoint_hash({"z": z.conj().resolve_conj()})
        assert checkpoint_hash({"z": z.conj()}) != checkpoint_hash({"z": z})

    def test_pinned_value(self):
        """Stored fingerprints must stay valid: this value may only change with the store's format."""
        state = {"b": torch.arange(3, dtype=torch.float32), "a": torch.tensor([[1, 2]])}
        assert checkpoint_hash(state) == "cc030f9e89f58474ac21d7a42ab162ab37a714f78e5a6e88722416c41dfa828d"

    def test_tensors_without_values(self):
        for tensor in (torch.zeros(2, device="meta"), torch.eye(2).to_sparse()):
            with pytest.raises(CheckpointError, match="'a' is no dense tensor"):
                checkpoint_hash({"a": tensor})


def test_describe(tmp_path, state):
    assert describe(nn.Linear(1, 1)) == "module Linear"
    assert describe(state) == "state dict with 6 entries"
    assert describe({"a": torch.zeros(1)}) == "state dict with 1 entry"
    assert describe(tmp_path) == str(tmp_path)
    assert describe(load_checkpoint) == "callable load_checkpoint"
