"""One example by itself: batch norm's gradient in evaluation mode, which torch gets wrong for some layouts, and caches of modules."""

import pytest
import torch
from torch import nn

import trak
from trak.gradients import Functional, Hooked, Reference, check_first_batch, model_state, select_parameters
from trak.testing.gradients import collect


class Stem(nn.Module):
    """A convolutional stem whose output is turned into tokens at once, as in LeViT and XCiT."""

    def __init__(self, scaled=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.norm = Scaled(8) if scaled else nn.BatchNorm2d(8)
        self.mix = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, images):
        tokens = self.norm(self.conv(images)).flatten(2).transpose(1, 2)
        return self.head(torch.tanh(self.mix(tokens)).mean(1))


class Scaled(nn.Module):
    """A batch norm with a scale of its own, which no layer rule covers."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return nn.functional.batch_norm(
            images * self.scale,
            self.norm.running_mean,
            self.norm.running_var,
            self.norm.weight,
            self.norm.bias,
        )


def problem(*, scaled=False):
    torch.manual_seed(0)
    model = Stem(scaled).double().eval()
    norm = model.norm.norm if scaled else model.norm
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return model, (torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0]))


def difference_quotient(model, batch, name, task):
    """∂f/∂parameter for a batch of one, without autograd."""
    parameter = dict(model.named_parameters())[name]
    slopes, step = torch.zeros_like(parameter).flatten(), 1e-6
    with torch.no_grad():
        for i in range(len(slopes)):
            ends = []
            for sign in (1, -1):
                parameter.view(-1)[i] += sign * step
                ends.append(float(task.output(model, batch)))
                parameter.view(-1)[i] -= sign * step
            slopes[i] = (ends[0] - ends[1]) / (2 * step)
    return slopes.view_as(parameter)


@pytest.mark.parametrize(
    "source", [Reference(), Hooked(), Functional()], ids=lambda source: type(source).__name__
)
def test_one_example_by_itself_through_batch_norm(source):
    model, (images, labels) = problem()
    task = trak.ImageClassification()
    _, together = collect(source, model, (images, labels), task=task)
    _, alone = collect(source, model, (images[:1], labels[:1]), task=task)
    for name in together:
        torch.testing.assert_close(alone[name][0], together[name][0], rtol=1e-9, atol=1e-12)
    wanted = difference_quotient(model, (images[:1], labels[:1]), "norm.weight", task)
    torch.testing.assert_close(alone["norm.weight"][0], wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("scaled", [False, True], ids=["by rules", "by a pass of its own"])
def test_the_first_batch_agrees_with_autograd(scaled):
    model, batch = problem(scaled=scaled)
    task, names = trak.ImageClassification(), list(select_parameters(model))
    source = check_first_batch(trak.Auto(), model, model_state(model, None, "cpu"), task, batch, names)
    assert isinstance(source, Hooked)
    assert bool(source.local) == scaled
    _, got = collect(source, model, tuple(part[:1] for part in batch), task=task)
    wanted = difference_quotient(model, tuple(part[:1] for part in batch), "conv.bias", task)
    torch.testing.assert_close(got["conv.bias"][0], wanted, rtol=1e-6, atol=1e-8)


class Remembering(nn.Module):
    """Keeps what it computed from its parameters for the next pass, as LeViT does with its attention biases."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.cache, self.passes, self.seen = {}, [], set()

    def forward(self, x):
        if "weight" not in self.cache:
            self.cache["weight"] = 2 * self.layer.weight
        self.passes.append(len(x))
        self.seen.add(len(x))
        return x @ self.cache["weight"].T + self.layer(x)


def test_what_a_forward_pass_keeps_is_forgotten():
    torch.manual_seed(0)
    model = Remembering().double()
    data = (torch.randn(12, 4, dtype=torch.float64), torch.arange(12) % 3)
    checkpoints = [{name: torch.randn_like(v) for name, v in model.state_dict().items()} for _ in range(2)]
    settings = {"task": "image_classification", "device": "cpu", "damping": 1.0}
    both = trak.attribute(model, data, data, checkpoints=checkpoints, **settings).scores.tensor()
    assert model.cache == {}
    assert model.passes == []
    assert model.seen == set()

    fresh = Remembering().double()
    fresh.load_state_dict(checkpoints[1])
    last = trak.attribute(fresh, data, data, checkpoints=checkpoints[1:], **settings).scores.tensor()
    swapped = trak.attribute(model, data, data, checkpoints=checkpoints[1:], **settings).scores.tensor()
    torch.testing.assert_close(swapped, last)
    assert not torch.allclose(both, last)
