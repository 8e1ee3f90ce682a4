"""Lending a checkpoint to a module, and getting the module back."""

import threading
import time

import pytest
import torch
from torch import nn

from trak.errors import CheckpointError, GradientError
from trak.gradients import lend, model_state
from trak.testing.gradients import snapshot
from trak.testing.models import ResNet, TiedLanguageModel


def shifted(model):
    return {
        name: tensor + 1 if tensor.is_floating_point() else tensor
        for name, tensor in model_state(model, None, "cpu").items()
    }


def test_tensors_are_lent_and_returned():
    model = ResNet().train()
    model.body[1].eval()
    before, state = snapshot(model), shifted(model)
    with lend(model, state):
        assert not any(module.training for module in model.modules())
        for name, parameter in model.named_parameters():
            assert parameter is state[name]
        for name, buffer in model.named_buffers():
            assert buffer is state[name]
    assert snapshot(model) == before
    assert model.training
    assert not model.body[1].training


def test_tied_tensors_are_lent_under_all_their_names():
    model = TiedLanguageModel()
    state = shifted(model)
    assert "head.weight" not in state
    with lend(model, state):
        assert model.head.weight is state["tokens.weight"]
        assert model.tokens.weight is state["tokens.weight"]
    assert model.head.weight is model.tokens.weight
    assert isinstance(model.head.weight, nn.Parameter)


def test_returned_after_an_error():
    model = ResNet().train()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="in between"), lend(model, shifted(model)):
        raise RuntimeError("in between")
    assert snapshot(model) == before


class Restless(nn.Module):
    """Assigns to itself in the forward pass, as models with caches do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("calls", torch.zeros(()))
        self.cache = None

    def forward(self, x):
        self.cache = self.layer(x)
        self.calls = self.calls + 1
        self.register_buffer("late", torch.ones(1))
        return self.cache


def test_what_the_forward_pass_assigns_is_undone():
    model = Restless()
    before = snapshot(model)
    with lend(model, shifted(model)):
        model(torch.randn(1, 2))
        assert model.cache is not None
    assert snapshot(model) == before
    assert model.cache is None


def test_buffers_written_in_place_are_not_the_models():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.register_buffer("calls", torch.zeros(()), persistent=False)

        def forward(self, x):
            self.calls += 1
            return self.layer(x)

    model = Counting()
    with lend(model, model_state(model, None, "cpu")):
        model(torch.randn(1, 2))
    assert model.calls == 0


def test_overridden_eval_is_not_called():
    class Merging(nn.Linear):
        def train(self, mode=True):
            raise AssertionError("train() was called")

    model = Merging(2, 2)
    with lend(model, shifted(model)):
        assert not model.training
    assert model.training


def test_lending_inside_transforms():
    model = nn.Linear(3, 1).double()
    state = model_state(model, None, "cpu")

    def output(weight, x):
        with lend(model, {**state, "weight": weight}):
            return model(x).squeeze()

    inputs = torch.randn(4, 3, dtype=torch.float64)
    gradients = torch.func.vmap(torch.func.grad(output), (None, 0))(state["weight"], inputs)
    torch.testing.assert_close(gradients.squeeze(1), inputs)


def test_missing_parameters_are_an_error():
    model = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"'bias'.*model_state"), lend(model, {"weight": model.weight}):
        pass


def test_scripted_modules_are_refused():
    class Scripted(torch.jit.ScriptModule):
        pass

    with pytest.raises(GradientError, match="TorchScript"), lend(Scripted(), {}):
        pass


def test_threads_take_turns():
    model = nn.Linear(2, 1)
    own, seen = model.weight, []

    def work(value):
        for _ in range(20):
            with lend(model, {"weight": torch.full((1, 2), value), "bias": torch.zeros(1)}):
                seen.append((model(torch.ones(1, 2)).item(), 2 * value))
                time.sleep(1e-4)
                seen.append((model(torch.ones(1, 2)).item(), 2 * value))

    threads = [threading.Thread(target=work, args=(float(value),)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 160 and all(got == wanted for got, wanted in seen)
    assert model.weight is own
