"""Making a bank larger: only the new models are trained, and the bank is as if it had been asked for at once."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from trak import FingerprintError
from trak.evaluation import Bank, RetrainError, model_seed, random_subsets, retrain, retrain_stacked

N, T = 24, 3
WEIGHTS = torch.linspace(-1, 1, N, dtype=torch.float64)


class Training:
    """A model is the sum of its rows' weights, and noise by its seed; remembers what was trained."""

    def __init__(self, fail_after=None):
        self.seeds, self.fail_after = [], fail_after

    def __call__(self, rows, seed):
        if self.fail_after is not None and len(self.seeds) == self.fail_after:
            raise RuntimeError("killed")
        self.seeds.append(seed)
        noise = torch.randn(T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return {"value": WEIGHTS[rows].sum() + noise}


def read(model):
    return model["value"]


def grow(folder, training, **options):
    return retrain(training, read, **{"num_train": N, "folder": folder, **options})


def seeds(subsets, repeats, seed=0):
    return {model_seed(seed, s, r) for s in range(subsets) for r in range(repeats)}


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"num_subsets": 3}, {"num_subsets": 5}),
        ({"num_subsets": 3, "models_per_subset": 2}, {"num_subsets": 3, "models_per_subset": 3}),
        ({"num_subsets": 2}, {"num_subsets": 4, "models_per_subset": 2}),
    ],
)
@pytest.mark.parametrize("keep", [False, True])
def test_only_what_is_new_is_trained(tmp_path, first, then, keep):
    small, large = Training(), Training()
    before = grow(tmp_path / "bank", small, keep_models=keep, **first)
    bank = grow(tmp_path / "bank", large, keep_models=keep, **then)
    at_once = grow(tmp_path / "other", Training(), keep_models=keep, **then)
    subsets, repeats = then["num_subsets"], then.get("models_per_subset", 1)
    assert set(large.seeds) == seeds(subsets, repeats) - set(small.seeds)
    assert torch.equal(bank.outputs, at_once.outputs)
    assert torch.equal(bank.masks, at_once.masks)
    earlier = bank.outputs[: len(before.masks), : before.outputs.shape[1]]
    assert torch.equal(earlier, before.outputs)
    loaded = Bank.load(tmp_path / "bank")
    assert torch.equal(loaded.outputs, at_once.outputs)
    assert [path.name for path in loaded.models] == [path.name for path in at_once.models]
    for mine, theirs in zip(loaded.models, at_once.models):
        assert torch.equal(load_file(mine)["value"], load_file(theirs)["value"])
    again = Training()
    assert torch.equal(grow(tmp_path / "bank", again, keep_models=keep, **then).outputs, bank.outputs)
    assert again.seeds == []


@settings(max_examples=15)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3)), min_size=1, max_size=4),
    seed=st.integers(0, 3),
)
def test_any_way_of_growing_ends_in_the_same_bank(tmp_path_factory, sizes, seed):
    folder = tmp_path_factory.mktemp("bank")
    steps = [
        (max(s for s, _ in sizes[: i + 1]), max(r for _, r in sizes[: i + 1])) for i in range(len(sizes))
    ]
    training = Training()
    for subsets, repeats in steps:
        bank = grow(folder, training, num_subsets=subsets, models_per_subset=repeats, seed=seed)
    assert sorted(training.seeds) == sorted(seeds(*steps[-1], seed=seed))
    options = {"num_train": N, "num_subsets": steps[-1][0], "models_per_subset": steps[-1][1], "seed": seed}
    assert torch.equal(bank.outputs, retrain(Training(), read, **options).outputs)


def test_killed_while_growing(tmp_path):
    before = grow(tmp_path, Training(), num_subsets=3)
    stopped = Training(fail_after=2)
    with pytest.raises(RetrainError, match="killed"):
        grow(tmp_path, stopped, num_subsets=8)
    assert torch.equal(Bank.load(tmp_path).outputs, before.outputs)
    rest = Training()
    bank = grow(tmp_path, rest, num_subsets=8)
    assert len(rest.seeds) == 3
    assert not set(rest.seeds) & set(stopped.seeds)
    assert torch.equal(bank.outputs, grow(tmp_path / "other", Training(), num_subsets=8).outputs)
    assert torch.equal(Bank.load(tmp_path).outputs, bank.outputs)


def test_an_unfinished_bank_grows_too(tmp_path):
    with pytest.raises(RetrainError):
        grow(tmp_path, Training(fail_after=2), num_subsets=4)
    rest = Training()
    bank = grow(tmp_path, rest, num_subsets=6)
    assert len(rest.seeds) == 4
    assert bank.outputs.shape == (6, 1, T)


def test_masks_that_begin_with_those_of_before(tmp_path):
    masks = random_subsets(N, 6, 0.3, seed=4)
    grow(tmp_path, Training(), masks=masks[:4])
    training = Training()
    bank = grow(tmp_path, training, masks=masks)
    assert len(training.seeds) == 2
    assert torch.equal(bank.masks, masks)
    changed = torch.cat([masks[1:], masks])
    with pytest.raises(FingerprintError, match="masks: stored"):
        grow(tmp_path, Training(), masks=changed)


@pytest.mark.parametrize(
    "options",
    [
        {"num_subsets": 6, "seed": 1},
        {"num_subsets": 6, "fraction": 0.3},
        {"num_subsets": 6, "version": "2"},
        {"num_subsets": 6, "keep_models": True},
        {"num_subsets": 6, "target_rows": [0, 1, 2]},
    ],
)
def test_other_settings_are_refused_as_before(tmp_path, options):
    grow(tmp_path, Training(), num_subsets=4)
    settings_before = (tmp_path / "retrain.json").read_bytes()
    with pytest.raises(FingerprintError, match="other settings than those asked for"):
        grow(tmp_path, Training(), **options)
    assert (tmp_path / "retrain.json").read_bytes() == settings_before


@pytest.mark.parametrize("options", [{"num_subsets": 3}, {"num_subsets": 4, "models_per_subset": 1}])
def test_smaller_is_refused_with_advice(tmp_path, options):
    grow(tmp_path, Training(), num_subsets=4, models_per_subset=2)
    with pytest.raises(FingerprintError, match=r"never smaller: read it by Bank\.load"):
        grow(tmp_path, Training(), **options)


def test_larger_in_one_size_and_smaller_in_the_other(tmp_path):
    grow(tmp_path, Training(), num_subsets=4, models_per_subset=2)
    with pytest.raises(FingerprintError, match="models_per_subset: stored 2, asked for 1"):
        grow(tmp_path, Training(), num_subsets=5, models_per_subset=1)


def test_a_model_of_neither_bank_is_refused(tmp_path):
    grow(tmp_path, Training(), num_subsets=3)
    grow(tmp_path / "other", Training(), num_subsets=3, seed=5)
    stray = tmp_path / "other" / "subset-00001-model-0.safetensors"
    (tmp_path / stray.name).write_bytes(stray.read_bytes())
    with pytest.raises(FingerprintError, match="another bank"):
        grow(tmp_path, Training(), num_subsets=4)
    assert len(json.loads((tmp_path / "retrain.json").read_text())["earlier"]) == 1


def test_a_stacked_bank_grows(tmp_path):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(N, 4, generator=generator)
    labels = (inputs[:, 0] > 0).long()

    def bank(folder, **options):
        return retrain_stacked(
            lambda: torch.nn.Linear(4, 2),
            inputs,
            labels,
            lambda model: model(inputs[:T])[:, 0],
            epochs=1,
            batch_size=6,
            lr=0.1,
            folder=folder,
            **options,
        )

    small = bank(tmp_path / "bank", num_subsets=3)
    large = bank(tmp_path / "bank", num_subsets=5)
    torch.testing.assert_close(large.outputs, bank(tmp_path / "other", num_subsets=5).outputs)
    assert torch.equal(large.outputs[:3], small.outputs)
