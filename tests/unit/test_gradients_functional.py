"""vmap of grad: what it says where it cannot, and how much it takes at a time."""

import copy
import gc
import pickle
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from trak.errors import GradientError, InputError
from trak.gradients import Functional, model_state
from trak.gradients.functional import _saved_bytes
from trak.testing.gradients import collect
from trak.testing.models import AlwaysDropout, Readout, TiedLanguageModel


def test_functional_says_what_vmap_could_not_do():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            out = self.layer(x)
            return out if out.sum().item() > 0 else -out

    with pytest.raises(GradientError, match=r"vmap.*\.item\(\).*Reference"):
        collect(Functional(), Branching(), (torch.randn(2, 3),))
    with pytest.raises(GradientError, match="random"):
        collect(Functional(), AlwaysDropout(), (torch.randn(2, 4),))


class Counting(Readout):
    """Counts forward passes."""

    def __init__(self):
        object.__setattr__(self, "passes", [])

    def output(self, model, batch):
        self.passes.append(1)
        return super().output(model, batch)


def forward_passes(gradients, model, batch):
    task = Counting()
    outputs, found = collect(gradients, model, batch, task=task)
    return len(task.passes), outputs, found


@pytest.mark.parametrize(("chunks_of", "expected"), [(10, 1), (5, 2), (4, 3), (1, 10)])
def test_chunks_are_as_large_as_the_budget_allows(chunks_of, expected):
    torch.manual_seed(0)
    model = TiedLanguageModel().double()
    batch = (torch.randint(11, (10, 6)),)
    names = [name for name, _ in model.named_parameters()]
    state = model_state(model, None, "cpu")
    activations = _saved_bytes(model, state, Readout(), (batch[0][:1],), names)
    parameters = 8 * sum(state[name].numel() for name in names)
    each = 2 * activations + (0 if chunks_of == 10 else parameters)
    budget = chunks_of * each + each // 2
    passes, _, got = forward_passes(Functional(memory_budget=budget), model, batch)
    # One more, of a single example, to measure.
    assert passes == expected + 1
    torch.testing.assert_close(
        got, collect(Functional(chunk_size=10), model, batch)[1], rtol=1e-9, atol=1e-12
    )


def test_no_more_than_one_example_is_the_least():
    model, batch = nn.Linear(3, 2).double(), (torch.randn(4, 3, dtype=torch.float64),)
    assert forward_passes(Functional(memory_budget=1), model, batch)[0] == 4 + 1


def test_measured_activations():
    """Of y = W2 tanh(W1 x): the tanh is kept; x and the weights are there anyway."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2, bias=False)).float()
    state = model_state(model, None, "cpu")

    class Sum(Readout):
        def output(self, model, batch):
            return model(batch[0]).sum(1)

    assert _saved_bytes(model, state, Sum(), (torch.randn(1, 3),), list(state)) == 5 * 4


@pytest.mark.parametrize("options", [{"chunk_size": 0}, {"memory_budget": 0}])
def test_nothing_at_a_time_is_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        Functional(**options)


def test_examples_are_measured_once_for_every_shape():
    model, source, task = TiedLanguageModel().double(), Functional(), Counting()
    state = model_state(model, None, "cpu")
    names = [name for name, _ in model.named_parameters()]

    def passes(task, length, examples=4):
        before = len(task.passes)
        batch = (torch.randint(11, (examples, length)),)
        source.compute(model, state, task, batch, names, lambda block: None)
        return len(task.passes) - before

    # The first of a shape measures one example, and takes all of them then.
    assert [passes(task, length) for length in (6, 6, 5, 6, 5)] == [2, 1, 2, 1, 1]
    assert passes(task, 6, examples=7) == 1
    assert passes(Counting(), 6) == 2  # another task may keep more
    assert passes(task, 6) == 2  # only the last one is kept


def test_what_was_measured_keeps_nothing_alive():
    model, source = nn.Linear(3, 2).double(), Functional()
    collect(source, model, (torch.randn(4, 3, dtype=torch.float64),))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    for copied in (pickle.loads(pickle.dumps(source)), copy.deepcopy(source), replace(source)):
        assert copied == source and hash(copied) == hash(source)
        assert repr(copied) == "Functional(chunk_size=None, memory_budget=1073741824)"
        collect(copied, nn.Linear(3, 2), (torch.randn(4, 3),))
