"""Dense classification against one position at a time by autograd, in float64."""

import pytest
import torch
from torch import nn

import trak
from trak.gradients import Functional, Hooked, Reference
from trak.tasks import resolve_task
from trak.testing.gradients import collect


def segmenter(classes=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, classes, 1)).double()


def data(classes=3, ignored=-100):
    torch.manual_seed(1)
    labels = torch.randint(max(classes, 2), (4, 3, 5))
    labels[1, :2] = ignored
    labels[3, 0, 0] = ignored
    return torch.randn(4, 2, 3, 5, dtype=torch.float64), labels


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("classes", [1, 2, 3])
def test_outputs_and_features_are_the_definition(reduction, classes):
    model, batch = segmenter(classes), data(classes, ignored=255)
    task = trak.DenseClassification(reduction=reduction, ignore_index=255)
    outputs, features = collect(Reference(), model, batch, task=task)
    _, losses = collect(Reference(), model, batch, task=task.for_training())
    for row in range(4):
        logits, labels = model(batch[0][row : row + 1])[0], batch[1][row]
        if classes == 1:
            logits = torch.cat([torch.zeros_like(logits), logits])
        chosen = [(i, j) for i in range(3) for j in range(5) if labels[i, j] != 255]
        p = [torch.softmax(logits[:, i, j], 0)[labels[i, j]] for i, j in chosen]
        count = len(p) if reduction == "mean" else 1
        margins = [torch.log(p_t / (1 - p_t)) for p_t in p]
        torch.testing.assert_close(outputs.f[row], sum(margins).detach() / count)
        parameters = list(model.parameters())
        each = [torch.autograd.grad(margin, parameters, retain_graph=True) for margin in margins]
        for index, (name, _) in enumerate(model.named_parameters()):
            torch.testing.assert_close(features[name][row], sum(g[index] for g in each) / count)
            weighted = sum((1 - p_t).detach() * g[index] for p_t, g in zip(p, each)) / count
            torch.testing.assert_close(losses[name][row], weighted)


def test_training_features_are_minus_the_gradients_of_cross_entropy():
    model, batch = segmenter(), data()
    _, features = collect(Hooked(), model, batch, task=trak.DenseClassification().for_training())
    for row in range(4):
        loss = nn.functional.cross_entropy(model(batch[0][row : row + 1]), batch[1][row : row + 1])
        for (name, parameter), gradient in zip(
            model.named_parameters(), torch.autograd.grad(loss, list(model.parameters()))
        ):
            torch.testing.assert_close(features[name][row], -gradient, msg=lambda m, n=name: f"{n}: {m}")
            assert gradient.shape == parameter.shape


@pytest.mark.parametrize("source", [Hooked(), Functional()], ids=["hooked", "functional"])
@pytest.mark.parametrize("weights", ["per_position", "mean"])
def test_sources_agree(source, weights):
    model, batch = segmenter(), data()
    task = trak.DenseClassification(weights=weights)
    for one in (task, task.for_training()):
        outputs, wanted = collect(Reference(), model, batch, task=one)
        got_outputs, got = collect(source, model, batch, task=one)
        torch.testing.assert_close((got_outputs.f, got_outputs.q), (outputs.f, outputs.q))
        torch.testing.assert_close(got, wanted)


def test_layouts_of_batches_and_outputs():
    model, (images, labels) = segmenter(), data()
    task = trak.DenseClassification()
    wanted = task.output(model, (images, labels))

    class Named(nn.Module):
        def forward(self, pixel_values):
            return type("Output", (), {"logits": model(pixel_values)})()

    class Torchvision(nn.Module):
        def forward(self, x):
            return {"out": model(x), "aux": None}

    assert torch.equal(task.output(Named(), {"pixel_values": images, "labels": labels}), wanted)
    assert torch.equal(task.output(Torchvision(), (images, labels)), wanted)


def test_regions_add_up():
    model, (images, labels) = segmenter(), data()
    task = trak.DenseClassification(reduction="sum")
    left, right = labels.clone(), labels.clone()
    left[:, :, 2:], right[:, :, :2] = -100, -100
    parts = task.output(model, (images, left)) + task.output(model, (images, right))
    torch.testing.assert_close(parts, task.output(model, (images, labels)))


def test_attribution_by_name():
    model, batch = segmenter(), data()
    attribution = trak.attribute(model, batch, batch, task="dense_classification", progress=False)
    assert attribution.scores.tensor().shape == (4, 4) and attribution.weights.tolist() == [1] * 4
    assert attribution.info["task"]["training"]["of"] == resolve_task("dense_classification").fingerprint()


def test_mistakes_are_explained():
    model, (images, labels) = segmenter(), data()
    task = trak.DenseClassification()
    with pytest.raises(trak.InputError, match=r"batches \(inputs, labels\)"):
        task.output(model, images)
    with pytest.raises(trak.InputError, match="resize its logits"):
        task.output(model, (images, labels[:, :, :2]))
    with pytest.raises(trak.InputError, match="integer labels"):
        task.output(model, (images, labels.double()))
    with pytest.raises(trak.InputError, match=r"labels 0 to 2.*got 7 at position 0 of example 0"):
        task.output(model, (images, torch.full_like(labels, 7)))
    with pytest.raises(trak.InputError, match="example 0 of the batch, 4 of 4"):
        task.output(model, (images, torch.full_like(labels, -100)))
