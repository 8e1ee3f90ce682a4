"""Training a bank with one's own function: seeds, workers, what is refused."""

import hashlib
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from trak import InputError, NonFiniteError
from trak.evaluation import Bank, RetrainError, model_seed, random_subsets, retrain, seeded

N, T = 40, 5
X = torch.randn(N, 6, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] + 0.5 * X[:, 1] > 0).long()
TARGETS = torch.randn(T, 6, generator=torch.Generator().manual_seed(2))


def build():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def train(rows, seed):
    with seeded(seed):
        model = build()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        for picked in rows[torch.randperm(len(rows), generator=generator)].split(8):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X[picked]), Y[picked]).backward()
            optimizer.step()
    return model


@torch.no_grad()
def outputs(model):
    logits = model(TARGETS)
    return logits[:, 1] - logits[:, 0]


def test_a_bank_is_what_training_one_by_one_gives():
    bank = retrain(train, outputs, num_train=N, num_subsets=3, models_per_subset=2, seed=7)
    masks = random_subsets(N, 3, seed=7)
    assert torch.equal(bank.masks, masks)
    assert bank.outputs.dtype == torch.float64
    for s in range(3):
        for r in range(2):
            expected = outputs(train(masks[s].nonzero()[:, 0], model_seed(7, s, r)))
            torch.testing.assert_close(bank.outputs[s, r], expected.double())
    assert not torch.equal(bank.outputs[0, 0], bank.outputs[0, 1])


def test_any_number_of_workers_gives_the_same_bits(tmp_path):
    options = {"num_train": N, "num_subsets": 5, "models_per_subset": 2}
    one = retrain(train, outputs, **options)
    for workers in (2, 3):
        assert torch.equal(retrain(train, outputs, workers=workers, **options).outputs, one.outputs)
    two = retrain(train, outputs, workers=2, folder=tmp_path, **options)
    assert torch.equal(two.outputs, one.outputs)


@given(
    seed=st.integers(0, 2**40),
    subset=st.integers(0, 10**6),
    repeat=st.integers(0, 99),
    other=st.integers(0, 10**6),
)
def test_seeds_are_the_documented_hash(seed, subset, repeat, other):
    text = f"trak retrain model {seed} {subset} {repeat}".encode()
    got = model_seed(seed, subset, repeat)
    assert got == int.from_bytes(hashlib.sha256(text).digest()[:4], "little") < 2**32
    assert got != model_seed(seed, subset, repeat, purpose="order")
    assert (got == model_seed(seed, other, repeat)) == (other == subset)


def test_given_masks_and_rows():
    masks = random_subsets(N, 4, 0.3, seed=5).numpy()
    seen = []

    def note(rows, seed):
        assert rows.dtype == torch.int64
        seen.append(rows.tolist())
        return len(rows)

    bank = retrain(
        note, lambda size: [float(size)], num_train=N, masks=masks, target_rows=[17], models_per_subset=1
    )
    assert seen == [np.flatnonzero(mask).tolist() for mask in masks]
    assert bank.outputs.flatten().tolist() == [12.0] * 4
    assert bank.target_rows.tolist() == [17]


def test_random_state_is_put_back_and_seeded_for_one_worker():
    def draws(rows, seed):
        return torch.rand(()).item(), float(np.random.rand()), random.random()  # noqa: NPY002

    torch.manual_seed(5)
    first = retrain(draws, torch.tensor, num_train=N, num_subsets=3)
    after = torch.rand(())
    torch.manual_seed(5)
    assert after == torch.rand(())
    second = retrain(draws, torch.tensor, num_train=N, num_subsets=3)
    assert torch.equal(first.outputs, second.outputs)
    assert len(first.outputs.unique()) == 9


@pytest.mark.parametrize(
    ("draw", "whose"),
    [
        (lambda: torch.rand(()), "torch's"),
        (lambda: np.random.rand(), "NumPy's"),  # noqa: NPY002
        (random.random, "random's"),
        (lambda: torch.manual_seed(1), "torch's"),
    ],
)
def test_shared_generators_are_refused_where_threads_share_them(draw, whose):
    def draws(rows, seed):
        draw()
        return rows

    before = torch.get_rng_state()
    with pytest.raises(RetrainError, match=f"{whose}.*seeded"):
        retrain(draws, lambda rows: rows[:1], num_train=N, num_subsets=3, workers=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_torch_threads_are_put_back():
    threads = torch.get_num_threads()
    seen = []
    retrain(
        lambda rows, seed: seen.append(torch.get_num_threads()), lambda _: [1.0], num_train=N, num_subsets=3
    )
    assert seen == [1, 1, 1]
    assert torch.get_num_threads() == threads


def test_kept_models(tmp_path):
    options = {"num_train": N, "num_subsets": 2, "models_per_subset": 2, "keep_models": True}
    bank = retrain(train, outputs, folder=tmp_path, **options)
    assert len(bank.models) == len(bank.model_masks) == 4
    model = build()
    for path, values in zip(bank.models, bank.outputs.flatten(0, 1)):
        model.load_state_dict(load_file(path))
        assert torch.equal(outputs(model).double(), values)
    assert Bank.load(tmp_path).models == bank.models

    def tied(rows, seed):
        weight = torch.ones(2, 2)
        return {"a": weight, "b": weight.t()}

    bank = retrain(tied, lambda state: state["a"][0], folder=tmp_path / "tied", **options)
    assert load_file(bank.models[0]).keys() == {"a", "b"}


def test_progress_shows_models_per_minute(capsys):
    retrain(train, outputs, num_train=N, num_subsets=2, progress=True)
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "models/min" in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_subsets": None}, "neither"),
        ({"masks": torch.ones(2, N, dtype=torch.bool)}, "both"),
        ({"num_subsets": None, "masks": torch.ones(2, N + 1)}, "N \\(training rows\\)"),
        ({"num_subsets": None, "masks": torch.zeros(2, N)}, "no rows"),
        ({"num_train": 0}, "num_train"),
        ({"workers": 0}, "workers"),
        ({"models_per_subset": 0}, "models_per_subset"),
        ({"seed": -1}, "seed"),
        ({"fraction": 1.5}, "fraction"),
        ({"keep_models": True}, "folder"),
        ({"version": 2}, "version"),
        ({"target_rows": [0.1]}, "target_rows"),
    ],
)
def test_bad_arguments(changes, message):
    def never(rows, seed):
        raise AssertionError("trained although an argument is bad")

    with pytest.raises(InputError, match=message):
        retrain(never, outputs, **({"num_train": N, "num_subsets": 2} | changes))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (torch.tensor([1.0, float("nan")]), NonFiniteError, "subset 0, model 0 .*target 1"),
        (torch.tensor([float("inf")]), NonFiniteError, "target 0"),
        (torch.zeros(2, 2), RetrainError, r"\[T\]"),
        (torch.zeros(0), RetrainError, r"\[T\]"),
        (torch.tensor(1.0), RetrainError, r"\[T\]"),
        (torch.zeros(2, dtype=torch.complex64), RetrainError, "complex64"),
        ("text", RetrainError, r"\[T\]"),
        ([[1.0], [1.0, 2.0]], RetrainError, "no array"),
    ],
)
def test_outputs_that_cannot_be(values, error, message):
    with pytest.raises(error, match=message):
        retrain(lambda rows, seed: None, lambda _: values, num_train=N, num_subsets=2)


def test_outputs_of_another_length_are_refused():
    lengths = iter([2, 3])
    with pytest.raises(RetrainError, match="has 3 outputs where 2"):
        retrain(lambda rows, seed: None, lambda _: torch.zeros(next(lengths)), num_train=N, num_subsets=2)
    with pytest.raises(RetrainError, match="has 2 outputs where 1"):
        retrain(
            lambda rows, seed: None, lambda _: torch.zeros(2), num_train=N, num_subsets=2, target_rows=[4]
        )


def test_outputs_need_no_detaching():
    weight = torch.ones(3, requires_grad=True)
    bank = retrain(lambda rows, seed: None, lambda _: 2 * weight, num_train=N, num_subsets=2)
    assert bank.outputs[0, 0].tolist() == [2.0] * 3
