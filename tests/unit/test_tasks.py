import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import trak
from trak.tasks import resolve_task
from trak.tasks.margins import multiclass_margin


class Echo(nn.Module):
    """Returns its input as logits."""

    def forward(self, x):
        return x


class Named(nn.Module):
    """Takes Hugging Face's names and returns an object with logits."""

    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        logits = torch.stack([input_ids.sum(1), -input_ids.sum(1)], 1).double()
        if attention_mask is not None:
            logits = logits + attention_mask.sum(1, keepdim=True) * torch.tensor([1.0, 0.0])
        if token_type_ids is not None:
            logits = logits + token_type_ids.sum(1, keepdim=True) * torch.tensor([0.0, 1.0])
        return type("Output", (), {"logits": logits})()


def definition(logits, labels):
    p = torch.softmax(logits, 1).gather(1, labels[:, None])[:, 0]
    return torch.log(p / (1 - p)), 1 - p


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_margin_and_weight_are_the_definition(classes):
    logits, labels = torch.randn(20, classes, dtype=torch.float64) * 3, torch.randint(classes, (20,))
    f, q = trak.ImageClassification().output_and_weight(Echo(), (logits, labels))
    expected_f, expected_q = definition(logits, labels)
    torch.testing.assert_close(f, expected_f, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(q, expected_q, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        -nn.functional.cross_entropy(logits, labels, reduction="none"), -torch.log1p(torch.exp(-f))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [50.0, 1e4, 1e30])
def test_finite_where_the_probability_is_zero_or_one(size, dtype):
    logits = torch.tensor([[size, 0.0, 0.0], [-size, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    f, q = trak.ImageClassification().output_and_weight(Echo(), (logits, torch.tensor([0, 0])))
    (gradient,) = torch.autograd.grad(f.sum(), logits)
    assert f.isfinite().all() and q.isfinite().all() and gradient.isfinite().all()
    torch.testing.assert_close(f, torch.tensor([size, -size], dtype=dtype) - math.log(2))
    assert q[1] == 1 and q[0] < 1e-20


def test_one_logit_is_the_binary_classifier():
    logits, labels = torch.randn(9, dtype=torch.float64), torch.randint(2, (9,))
    two = torch.stack([torch.zeros(9), logits], 1)
    for shape in (logits, logits[:, None]):
        f, q = trak.ImageClassification().output_and_weight(Echo(), (shape, labels))
        expected_f, expected_q = definition(two, labels)
        torch.testing.assert_close(f, expected_f)
        torch.testing.assert_close(q, expected_q)


@pytest.mark.parametrize("classes", [2, 5])
def test_temperature_acts_on_the_weight_only(classes):
    logits, labels = torch.randn(20, classes, dtype=torch.float64) * 3, torch.randint(classes, (20,))
    f, q = trak.ImageClassification(temperature=2.5).output_and_weight(Echo(), (logits, labels))
    torch.testing.assert_close(f, definition(logits, labels)[0])
    torch.testing.assert_close(q, definition(logits / 2.5, labels)[1])
    with pytest.raises(trak.InputError, match="temperature"):
        trak.ImageClassification(temperature=0)


@given(st.lists(st.floats(-80, 80), min_size=2, max_size=6), st.data())
def test_adding_a_constant_to_all_logits_changes_nothing(values, data):
    label = torch.tensor([data.draw(st.integers(0, len(values) - 1))])
    logits = torch.tensor([values], dtype=torch.float64)
    torch.testing.assert_close(multiclass_margin(logits, label), multiclass_margin(logits + 7.5, label))


def test_text_classification_takes_what_tokenizers_give():
    ids, mask, types, labels = (
        torch.arange(6).reshape(2, 3),
        torch.ones(2, 3).long(),
        torch.ones(2, 3).long() * 2,
        torch.tensor([0, 1]),
    )
    task = trak.TextClassification()
    full = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "labels": labels}
    expected = definition(Named()(ids, mask, types).logits, labels)[0]
    torch.testing.assert_close(task.output(Named(), full), expected)
    torch.testing.assert_close(task.output(Named(), (ids, types, mask, labels)), expected)
    without = {"input_ids": ids, "attention_mask": mask, "label": labels}
    torch.testing.assert_close(
        task.output(Named(), without), definition(Named()(ids, mask).logits, labels)[0]
    )
    torch.testing.assert_close(
        task.output(Named(), (ids, mask, labels)), definition(Named()(ids, mask).logits, labels)[0]
    )
    with pytest.raises(trak.InputError, match="labels"):
        task.output(Named(), {"input_ids": ids})


class ByName(nn.Module):
    """An image classifier as Hugging Face writes them."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 3)

    def forward(self, pixel_values, interpolate_pos_encoding=None):
        assert interpolate_pos_encoding is None
        return type("Output", (), {"logits": self.layer(pixel_values.flatten(1))})()


@pytest.mark.parametrize("key", ["labels", "label"])
def test_image_classifiers_of_mappings(key):
    model, images, labels = ByName(), torch.randn(5, 3, 2, 2), torch.tensor([0, 1, 2, 1, 0])
    task = trak.ImageClassification()
    wanted = task.output(nn.Sequential(nn.Flatten(), model.layer), (images, labels))
    assert torch.equal(task.output(model, {"pixel_values": images, key: labels}), wanted)
    with pytest.raises(trak.InputError, match=r"mappings with `labels` beside.*got.*pixel_values"):
        task.output(model, {"pixel_values": images})


def test_regression():
    task, predictions, values = trak.Regression(), torch.randn(5, 1), torch.randn(5)
    f, q = task.output_and_weight(Echo(), (predictions, values))
    torch.testing.assert_close(f, predictions[:, 0])
    torch.testing.assert_close(q, values - predictions[:, 0])
    with pytest.raises(trak.InputError, match="one prediction per example"):
        task.output(Echo(), (torch.randn(5, 2), values))
    with pytest.raises(trak.InputError, match="observed values"):
        task.loss_weight(f)


def test_custom_tasks():
    def first(model, batch):
        return model(batch)[:, 0]

    x = torch.randn(4, 3)
    f, q = resolve_task(first).output_and_weight(Echo(), x)
    torch.testing.assert_close(f, x[:, 0])
    torch.testing.assert_close(q, torch.sigmoid(-f))
    constant = trak.CustomTask(first, weight=torch.ones_like, name="first")
    assert torch.equal(constant.output_and_weight(Echo(), x)[1], torch.ones(4))
    assert constant.fingerprint()["task"] == "first"
    assert resolve_task(first).fingerprint()["task"].endswith("first")


class Relative(trak.Task):
    """The output relative to that of fixed inputs at the same checkpoint."""

    def __init__(self, origin, seen, at=None):
        self.origin, self.seen, self.at = origin, seen, at

    def bind(self, model, prepare):
        assert not model.training and not torch.is_grad_enabled()
        at = model(prepare(self.origin))[0, 0]
        torch.rand(1)
        self.seen.append(float(at))
        return Relative(self.origin, self.seen, at)

    def output(self, model, batch):
        return model(batch)[:, 0] - self.at


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bind_sees_each_checkpoint_and_a_prepared_batch(dtype):
    torch.manual_seed(0)
    x = torch.randn(6, 3)
    states = [nn.Linear(3, 2).to(dtype).state_dict() for _ in range(2)]
    model = nn.Linear(3, 2).to(dtype).train()
    before, random = (
        {name: value.clone() for name, value in model.state_dict().items()},
        torch.get_rng_state(),
    )
    origin, seen = torch.ones(1, 3), []
    attribution = trak.attribute(
        model, x, x[:2], task=Relative(origin, seen), checkpoints=states, device="cpu", progress=False
    )
    wanted = [
        x[:2].to(dtype) @ s["weight"][0] + s["bias"][0] - (s["weight"][0].sum() + s["bias"][0])
        for s in states
    ]
    torch.testing.assert_close(attribution.outputs.to(dtype), torch.stack(wanted).mean(0))
    assert set(seen) == {float(nn.functional.linear(origin.to(dtype), *s.values())[0, 0]) for s in states}
    assert torch.equal(torch.get_rng_state(), random) and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("task", "match"),
    [
        ("clip_art", "unknown task 'clip_art'"),
        (trak.Regression, "not a class"),
        (3, "must be a name"),
        (object(), "must be a name"),
    ],
)
def test_no_task(task, match):
    with pytest.raises(trak.InputError, match=match):
        resolve_task(task)


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        (torch.zeros(2, 3), "batches \\(inputs, labels\\)"),
        ((torch.zeros(2, 3), torch.zeros(2)), "integer class labels"),
        ((torch.zeros(2, 3, 4), torch.zeros(2).long()), "logits \\[batch, classes\\]"),
        ((torch.zeros(2, 3), torch.zeros(3).long()), "logits \\[batch, classes\\]"),
    ],
)
def test_wrong_batches_are_explained(batch, match):
    with pytest.raises(trak.InputError, match=match):
        trak.ImageClassification().output(Echo(), batch)


@pytest.mark.parametrize("logits", [torch.zeros(3, 4), torch.zeros(3), torch.zeros(3, 1)])
@pytest.mark.parametrize("label", [-100, -1, 4])
def test_labels_that_do_not_exist_are_refused(logits, label):
    labels = torch.tensor([0, label, 1])
    task, classes = trak.ImageClassification(), 4 if logits.shape[1:] == (4,) else 2
    with pytest.raises(trak.InputError, match=rf"labels 0 to {classes - 1} .*; got {label} at position 1"):
        task.output(Echo(), (logits, labels))
    one = torch.func.vmap(lambda z, y: task.output(Echo(), (z[None], y[None]))[0])(logits, labels)
    assert one.isnan().tolist() == [False, True, False]


def test_models_that_squeeze_the_dimension_of_a_batch_of_one():
    scalar = torch.tensor([0.7]).squeeze()
    f, q = trak.Regression().output_and_weight(Echo(), (scalar, torch.tensor([1.0])))
    torch.testing.assert_close((f, q), (torch.tensor([0.7]), torch.tensor([0.3])))
    f = trak.ImageClassification().output(Echo(), (scalar, torch.tensor([0])))
    torch.testing.assert_close(f, torch.tensor([-0.7]))
