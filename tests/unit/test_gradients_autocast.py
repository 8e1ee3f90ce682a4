"""A task that runs the model under autocast: gradients by hooks, by vmap and one by one agree."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import trak
from trak.gradients import check_first_batch, model_state, select_parameters
from trak.gradients.auto import select_gradients
from trak.gradients.layers.base import LayerCall
from trak.gradients.layers.linear import LinearRule


@dataclass(frozen=True)
class Half(trak.ImageClassification):
    dtype: torch.dtype = torch.bfloat16

    def logits_and_labels(self, model, batch):
        with torch.autocast("cpu", dtype=self.dtype):
            logits, labels = super().logits_and_labels(model, batch)
        return logits.float(), labels


def network(*, norms=True):
    torch.manual_seed(0)
    batch_norm, layer_norm = (nn.BatchNorm2d(6), nn.LayerNorm(5)) if norms else (nn.Identity(), nn.Identity())
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), batch_norm, nn.ReLU(), nn.Flatten(), nn.Linear(216, 5), layer_norm
    ).eval()


def gradients_of(source, task, model, batch):
    names = list(select_parameters(model, None))
    found = {}

    def consume(block):
        found[block.name] = found.get(block.name, 0) + block.dense()

    outputs = source.compute(model, model_state(model, None, "cpu"), task, batch, names, consume)
    return outputs, torch.cat([found[name].flatten(1) for name in names], 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("source", [trak.Hooked(), trak.Functional()], ids=["hooked", "functional"])
def test_gradients_under_autocast(source, dtype):
    # Under vmap torch's norms refuse inputs in half precision.
    model = network(norms=isinstance(source, trak.Hooked))
    batch = torch.randn(6, 3, 8, 8), torch.arange(6) % 5
    outputs, found = gradients_of(source, Half(dtype=dtype), model, batch)
    one_by_one, expected = gradients_of(trak.Reference(), Half(dtype=dtype), model, batch)
    _, exact = gradients_of(trak.Reference(), trak.ImageClassification(), model, batch)
    assert found.dtype == outputs.f.dtype == torch.float32
    rounding = 3e-2 if dtype == torch.bfloat16 else 4e-3
    assert float((found - expected).norm() / expected.norm()) < rounding
    # It did run in half precision, and that is no more than rounding.
    assert 1e-5 < float((found - exact).norm() / exact.norm()) < 5 * rounding
    torch.testing.assert_close(outputs.f, one_by_one.f, rtol=rounding, atol=rounding)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (torch.inference_mode, "no gradients under torch.inference_mode"),
        (lambda: torch.autocast("cpu", torch.bfloat16), r"let the task's output\(\) enter autocast"),
    ],
)
@pytest.mark.parametrize("check", [True, False])
def test_modes_around_the_call_are_refused(mode, message, check):
    data = torch.randn(6, 3, 8, 8), torch.arange(6) % 5
    settings = {
        "task": "image_classification",
        "projection": trak.Rademacher(16),
        "check": check,
        "device": "cpu",
    }
    with mode(), pytest.raises(trak.InputError, match=message):
        trak.attribute(network(), data, data, **settings)
    with torch.no_grad():
        trak.attribute(network(), data, data, **settings)


@pytest.mark.parametrize("dtype", ["float32", torch.int32])
def test_what_is_no_dtype_is_refused(dtype):
    data = torch.randn(6, 3, 8, 8), torch.arange(6) % 5
    with pytest.raises(trak.InputError, match=r"a floating-point torch\.dtype"):
        trak.attribute(network(), data, data, task="image_classification", dtype=dtype)


def test_the_first_batch_passes_its_check():
    model, batch = network(), (torch.randn(6, 3, 8, 8), torch.arange(6) % 5)
    names = list(select_parameters(model, None))
    checked = check_first_batch(trak.Auto(), model, model_state(model, None, "cpu"), Half(), batch, names)
    assert checked == select_gradients(trak.Auto(), model, names)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_biases_of_many_positions(dtype):
    """Sums of thousands of gradients of one sign: rounded once in bfloat16, not at all in float16, whose range they leave."""
    size = 4096 if dtype == torch.bfloat16 else 1 << 18
    module = nn.Linear(1, 1)
    gradient = torch.full((1, size, 1), 1.0 + 2**-7).to(dtype)
    call = LayerCall(module, torch.zeros(1, size, 1, dtype=dtype), gradient, {"bias": "bias"}, 1)
    (block,) = LinearRule().blocks(call)
    assert block.values.dtype == torch.float32
    assert float(block.values) == pytest.approx(
        size * (1 + 2**-7), rel=2**-8 if dtype == torch.bfloat16 else 1e-6
    )
