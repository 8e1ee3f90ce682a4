"""The first-batch check lets right gradients through, and nothing else."""

import logging
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trak.blocks import DenseBlock, OuterBlock
from trak.errors import GradientError, InputError, MixedExamplesError, NonFiniteError, UnsupportedLayerError
from trak.gradients import Auto, Functional, Hooked, Reference, check_first_batch, model_state
from trak.gradients.layers import RULES, LayerRule
from trak.gradients.layers.linear import LinearRule
from trak.testing.cases import CASES
from trak.testing.gradients import snapshot
from trak.testing.models import AlwaysDropout, Readout, WeightUsedTwice


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small take longer in two
    yield
    torch.set_num_threads(threads)


def check(gradients, model, batch, *, task=None, names=None):
    names = names or [name for name, _ in model.named_parameters()]
    return check_first_batch(
        gradients, model, model_state(model, None, "cpu"), task or Readout(), batch, names
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_right_gradients_pass(case, dtype):
    model, batch = case.build(batch_size=3, dtype=dtype)
    passed = check(Auto(), model, batch)
    if case.hooked:
        assert passed == Hooked()
    else:
        assert isinstance(passed, Functional if case.name == "weight used outside its layer" else Hooked)


def test_only_a_few_examples_are_looked_at():
    seen = []

    class Spy(Readout):
        def output(self, model, batch):
            seen.append(batch[0].shape[0])
            return super().output(model, batch)

    check(Hooked(), nn.Linear(3, 2), (torch.randn(50, 3),), task=Spy())
    assert max(seen) == 8


@dataclass(frozen=True)
class WrongLinear(LayerRule):
    """A Linear rule with a mistake, of one kind or another."""

    mistake: str
    right = LinearRule()

    def covers(self, module):
        return self.right.covers(module)

    def event_ndim(self, module):
        return self.right.event_ndim(module)

    def blocks(self, call):
        for block in self.right.blocks(call):
            if not isinstance(block, OuterBlock):
                yield block
            elif self.mistake == "scaled":
                yield DenseBlock(block.name, block.shape, 1.05 * block.dense())
            elif self.mistake == "shuffled":
                yield DenseBlock(block.name, block.shape, block.dense().flip(0))
            elif self.mistake == "averaged":
                yield DenseBlock(
                    block.name, block.shape, block.dense().mean(0, keepdim=True).expand(3, *block.shape)
                )
            elif self.mistake == "unknown name":
                yield DenseBlock("elsewhere", block.shape, block.dense())
            elif self.mistake == "not finite":
                yield DenseBlock(block.name, block.shape, block.dense() * torch.nan)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("scaled", r"sum over examples .*'weight', relative error 0\.0"),
        ("missing", r"sum over examples .*'weight', relative error 1"),
        ("shuffled", r"gradient of example 0 .*'weight'"),
        ("averaged", r"gradient of example 0 .*'weight'"),
        ("unknown name", r"block 'elsewhere'"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_wrong_rule_is_caught(mistake, message, dtype):
    model, batch = nn.Linear(4, 3).to(dtype), (torch.randn(3, 4, dtype=dtype),)
    with pytest.raises(GradientError, match=message):
        check(Hooked(rules=(WrongLinear(mistake), *RULES)), model, batch)


def test_gradients_that_are_not_finite_are_caught():
    with pytest.raises(NonFiniteError, match="'weight'"):
        check(Hooked(rules=(WrongLinear("not finite"),)), nn.Linear(4, 3), (torch.randn(3, 4),))


def test_auto_falls_back_with_a_warning_in_the_log(caplog):
    model, batch = WeightUsedTwice(), (torch.randn(3, 4),)
    with caplog.at_level(logging.WARNING, logger="trak"):
        assert check(Auto(), model, batch) == Functional()
    assert "'layer.weight'" in caplog.text
    with pytest.raises(GradientError, match=r"'layer\.weight'"):
        check(Hooked(), model, batch)


class Squared(torch.autograd.Function):
    """No rule for vmap: it must have `setup_context` for that."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class OwnFunction(nn.Module):
    """A weight of its own, and a function that only plain autograd knows."""

    def __init__(self):
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.rand(3)), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(Squared.apply(x * self.scale))


def test_auto_takes_one_example_at_a_time_as_a_last_resort(caplog):
    with caplog.at_level(logging.WARNING, logger="trak"):
        assert check(Auto(), OwnFunction(), (torch.randn(5, 3),)) == Reference()
    assert "Functional cannot be used" in caplog.text and "setup_context" in caplog.text
    with pytest.raises(GradientError, match="setup_context"):
        check(Functional(), OwnFunction(), (torch.randn(5, 3),))


class ByFrequency(nn.Module):
    """Gradients of rows that occur often in the batch are made smaller."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(4, 3, scale_grad_by_freq=True), nn.Linear(3, 2)

    def forward(self, tokens):
        return self.head(self.table(tokens).mean(1))


@pytest.mark.parametrize("gradients", [Auto(), Reference()], ids=repr)
def test_gradients_that_depend_on_the_batch_are_refused(gradients):
    with pytest.raises(MixedExamplesError, match=r"'table\.weight'.*scale_grad_by_freq"):
        check(gradients, ByFrequency(), (torch.arange(20).reshape(4, 5) % 4,))


class Recomputed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(checkpoint(self.body, self.body(x), use_reentrant=True))


def test_reentrant_checkpointing_is_refused():
    with pytest.raises(GradientError, match="use_reentrant=False"):
        check(Auto(), Recomputed(), (torch.randn(4, 3),))


def test_what_is_not_covered_is_an_error_if_asked_for():
    model = nn.Sequential(nn.Linear(4, 4), nn.ConvTranspose1d(3, 3, 1))
    with pytest.raises(UnsupportedLayerError, match="ConvTranspose1d"):
        check(Hooked(), model, (torch.randn(2, 3, 4),))


def test_mixed_examples_are_caught_and_the_suspect_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False))
    for gradients in (Auto(), Functional(), Reference()):
        with pytest.raises(MixedExamplesError, match=r"'1' is a batch norm without running statistics"):
            check(gradients, model, (torch.randn(3, 4),))


def test_examples_mixed_by_the_task():
    class Contrastive(Readout):
        def output(self, model, batch):
            return super().output(model, batch).log_softmax(0)

    with pytest.raises(MixedExamplesError, match="Look for statistics over dimension 0"):
        check(Auto(), nn.Linear(4, 4), (torch.randn(3, 4),), task=Contrastive())


def test_random_models_are_caught():
    with pytest.raises(GradientError, match=r"random.*dropout"):
        check(Auto(), AlwaysDropout(), (torch.randn(3, 4),))


def test_outputs_that_ignore_the_parameters_are_caught():
    class Detached(Readout):
        def output(self, model, batch):
            return super().output(model, batch).detach()

    with pytest.raises(GradientError, match="does not depend on any"):
        check(Auto(), nn.Linear(4, 4), (torch.randn(3, 4),), task=Detached())


def test_parameters_that_some_examples_ignore_are_fine():
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "idle": nn.Linear(3, 3)})
    model.forward = lambda x: model["used"](x)
    assert check(Auto(), model, (torch.randn(2, 3),)) == Hooked()


@pytest.mark.parametrize(
    "output", [lambda y: y, lambda y: y.sum(), lambda y: y.sum(1, keepdim=True), lambda y: y.argmax(1)]
)
def test_outputs_of_another_shape_are_refused(output):
    class Shapeless(Readout):
        def output(self, model, batch):
            return output(model(batch[0]))

    with pytest.raises(InputError, match=r"shape \[3\].*one number per example"):
        check(Auto(), nn.Linear(4, 4), (torch.randn(3, 4),), task=Shapeless())


def test_infinite_outputs_are_refused():
    model = nn.Linear(4, 4)
    nn.init.constant_(model.weight, torch.nan)
    with pytest.raises(NonFiniteError, match="model outputs on the first batch"):
        check(Auto(), model, (torch.randn(3, 4),))


def test_empty_batches_are_refused():
    with pytest.raises(InputError, match="no examples"):
        check(Auto(), nn.Linear(4, 4), (torch.randn(0, 4),))


def test_gradients_that_are_zero_but_for_rounding_pass():
    """A bias before a norm: its gradient is noise, and noise is no disagreement."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.Flatten(), nn.Linear(64, 2)
    )
    assert check(Auto(), model, (torch.randn(4, 3, 6, 6),)) == Hooked()


def test_the_check_leaves_model_and_generator_alone():
    model, batch = CASES[-1].build()
    model.train()
    before, random_before = snapshot(model), torch.get_rng_state()
    check(Auto(), model, batch)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), random_before)
