"""Diffusion against one noised copy at a time by autograd, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import trak
from trak.gradients import Functional, Hooked, Reference
from trak.tasks.noise import example_keys, normals, uniforms
from trak.testing.gradients import collect

ALPHAS = torch.cumprod(1 - torch.linspace(1e-3, 0.2, 50, dtype=torch.float64), 0)
FUNCTIONS = ["loss", "square", "average", "1-norm", "2-norm", "max-norm"]


class Denoiser(nn.Module):
    """Conditioned on the timestep, and on a class if there is one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.time, self.kind = nn.Linear(2, 4), nn.Embedding(3, 4)
        self.last = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x, timesteps, labels=None):
        angles = timesteps.to(x.dtype) / 10
        hidden = self.first(x) + self.time(torch.stack([angles.sin(), angles.cos()], 1))[:, :, None, None]
        if labels is not None:
            hidden = hidden + self.kind(labels)[:, :, None, None]
        return self.last(hidden.tanh())


def build():
    torch.manual_seed(0)
    return Denoiser().double(), torch.randn(4, 1, 4, 4, dtype=torch.float64)


def definition(task, model, image, *conditioning):
    """The mean over samples of one function of one prediction each."""
    timesteps, noise = task.draw(image[None])
    values = []
    for t, epsilon in zip(timesteps[0], noise[0]):
        a = ALPHAS[t]
        noisy = a.sqrt() * image + (1 - a).sqrt() * epsilon
        out = model(noisy[None], t[None], *(c[None] for c in conditioning))[0]
        wanted = {
            "epsilon": epsilon,
            "sample": image,
            "v_prediction": a.sqrt() * epsilon - (1 - a).sqrt() * image,
        }[task.prediction]
        values.append(
            {
                "loss": lambda out=out, wanted=wanted: -nn.functional.mse_loss(out, wanted),
                "square": lambda out=out: (out**2).sum() / out.numel(),
                "average": lambda out=out: out.sum() / out.numel(),
                "1-norm": lambda out=out: torch.linalg.vector_norm(out, 1),
                "2-norm": lambda out=out: torch.linalg.vector_norm(out),
                "max-norm": lambda out=out: torch.linalg.vector_norm(out, math.inf),
            }[task.output_function]()
        )
    return sum(values) / len(values)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_output_is_the_definition(function, prediction):
    model, images = build()
    task = trak.Diffusion(ALPHAS, output_function=function, prediction=prediction, num_samples=3)
    f, q = task.output_and_weight(model, images)
    assert q.tolist() == [1] * 4 and not task.is_log_loss
    for row in range(4):
        torch.testing.assert_close(f[row], definition(task, model, images[row]))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("conditioned", [False, True])
def test_gradients_from_every_source(function, conditioned):
    model, images = build()
    labels = torch.tensor([0, 2, 1, 1])
    batch = (images, labels) if conditioned else images
    task = trak.Diffusion(ALPHAS, output_function=function, num_samples=2)
    names = [n for n, _ in model.named_parameters() if conditioned or "kind" not in n]
    _, wanted = collect(Reference(), model, batch, names, task=task)
    for row in range(4):
        f = definition(task, model, images[row], *([labels[row]] if conditioned else []))
        parameters = dict(model.named_parameters())
        for name, gradient in zip(names, torch.autograd.grad(f, [parameters[name] for name in names])):
            torch.testing.assert_close(wanted[name][row], gradient, msg=lambda m, name=name: f"{name}: {m}")
    _, got = collect(Functional(), model, batch, names, task=task)
    torch.testing.assert_close(got, wanted)
    # A table looked up by copies of the batch's classes could be one of positions, for all that hooks see.
    ruled = [name for name in names if "kind" not in name]
    _, got = collect(Hooked(), model, batch, ruled, task=task)
    torch.testing.assert_close(got, {name: wanted[name] for name in ruled})


@pytest.mark.parametrize("samples", [1, 3])
def test_class_conditional_models_are_attributed_through_all_parameters(samples):
    model, images = build()
    batch = (images, torch.tensor([0, 2, 1, 1]))
    task = trak.Diffusion(ALPHAS, num_samples=samples)
    options = {"task": task, "projection": trak.Identity(), "damping": 0.1, "progress": False}
    got = trak.attribute(model, batch, batch, **options).scores.tensor()
    wanted = trak.attribute(model, batch, batch, gradients="reference", **options).scores.tensor()
    torch.testing.assert_close(got, wanted)


def test_conditioning_by_name_own_calls_and_schedulers():
    model, images = build()
    labels = torch.tensor([0, 2, 1, 1])
    wanted = trak.Diffusion(ALPHAS).output(model, (images, labels))
    assert torch.equal(trak.Diffusion(ALPHAS).output(model, (images, {"labels": labels})), wanted)
    scheduler = type("Scheduler", (), {"alphas_cumprod": ALPHAS})()
    assert torch.equal(trak.Diffusion(scheduler).output(model, (images, labels)), wanted)
    own = trak.Diffusion(
        ALPHAS.tolist(), call=lambda model, x, t, c: type("Output", (), {"sample": model(x, t, labels=c)})()
    )
    assert torch.equal(own.output(model, (images, labels)), wanted)
    assert torch.equal(
        trak.Diffusion(ALPHAS).output(model, (images,)), trak.Diffusion(ALPHAS).output(model, images)
    )


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(-(2**40), 2**40), samples=st.integers(1, 12), rows=st.permutations(range(4)))
def test_draws_belong_to_the_image(seed, samples, rows):
    """The same alone, in any batch, in any dtype, under vmap; one timestep of each part of the schedule."""
    _, images = build()
    images = images.float()
    task = trak.Diffusion(ALPHAS, num_samples=samples, seed=seed)
    state = torch.get_rng_state()
    timesteps, noise = task.draw(images)
    assert torch.equal(torch.get_rng_state(), state)
    for got in (
        task.draw(images[rows]),
        [values[:, 0] for values in torch.func.vmap(task.draw)(images[rows][:, None])],
    ):
        assert torch.equal(got[0], timesteps[rows]) and torch.equal(got[1], noise[rows])
    wide = task.draw(images.double())
    assert torch.equal(wide[0], timesteps) and torch.equal(wide[1], noise.double())
    parts = timesteps.double() / 50 * samples
    tolerance = samples / 50
    for part in range(samples):
        assert (parts[:, part] > part - tolerance).all() and (parts[:, part] < part + 1 + tolerance).all()


def test_noise_is_standard_normal_and_independent():
    generator = torch.Generator().manual_seed(0)
    keys = example_keys(torch.randn(200, 5, generator=generator), seed=3)
    values = normals(keys, 500).double()
    count = values.numel()
    assert values.isfinite().all()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((values**power).mean()) - moment) < 5 * math.sqrt(variance / count)
    # Between examples, between neighbouring numbers, and between both streams.
    for one, other in (
        (values[1:], values[:-1]),
        (values[:, 1:], values[:, :-1]),
        (values.abs() - math.sqrt(2 / math.pi), uniforms(keys, 500) - 0.5),
    ):
        correlation = float((one * other).mean() / (one.std() * other.std()))
        assert abs(correlation) < 5 / math.sqrt(one.numel())
    spread = uniforms(keys, 500).double()
    assert (
        abs(float(spread.mean()) - 0.5) < 5 / math.sqrt(12 * count) and spread.min() > 0 and spread.max() <= 1
    )
    histogram = torch.histc(spread, 20, 0, 1)
    assert ((histogram - count / 20) ** 2 / (count / 20)).sum() < 50  # chi-square with 19 degrees of freedom


def test_another_seed_and_another_image_draw_anew():
    _, images = build()
    nearly = images.clone()
    nearly[0, 0, 0, 0] += 1e-3
    draws = [
        trak.Diffusion(ALPHAS, seed=0).draw(images)[1],
        trak.Diffusion(ALPHAS, seed=1).draw(images)[1],
        trak.Diffusion(ALPHAS, seed=0).draw(nearly)[1],
    ]
    assert (
        abs(float((draws[0][0] * draws[1][0]).mean())) < 0.4
        and abs(float((draws[0][0] * draws[2][0]).mean())) < 0.4
    )
    assert torch.equal(draws[0][1:], draws[2][1:])


def test_attribution_and_its_store(tmp_path):
    model, images = build()
    options = {"parameters": ["first.*", "last.*"], "save_dir": tmp_path, "damping": 0.1, "progress": False}
    whole = trak.attribute(
        model, images, images[:2], task=trak.Diffusion(ALPHAS, num_samples=2), batch_size=3, **options
    )
    again = trak.attribute(model, images, images[:2], task=trak.Diffusion(ALPHAS, num_samples=2), **options)
    torch.testing.assert_close(whole.scores.tensor(), again.scores.tensor())
    # A training image is the same example as a target.
    torch.testing.assert_close(whole.scores.tensor().diag().double(), whole.self_influence()[:2].double())
    for other in ({"seed": 1}, {"output_function": "square"}, {"prediction": "sample"}):
        with pytest.raises(trak.FingerprintError, match=next(iter(other))):
            trak.attribute(
                model, images, images, task=trak.Diffusion(ALPHAS, num_samples=2, **other), **options
            )
    with pytest.raises(trak.FingerprintError, match="schedule"):
        trak.attribute(model, images, images, task=trak.Diffusion(ALPHAS[:40], num_samples=2), **options)


def test_mistakes_are_explained():
    model, images = build()
    with pytest.raises(trak.InputError, match="output_function must be one of loss, square"):
        trak.Diffusion(ALPHAS, output_function="l2")
    with pytest.raises(trak.InputError, match="prediction must be one of epsilon"):
        trak.Diffusion(ALPHAS, prediction="noise")
    with pytest.raises(trak.InputError, match="num_samples"):
        trak.Diffusion(ALPHAS, num_samples=0)
    with pytest.raises(trak.InputError, match="between 0 and 1"):
        trak.Diffusion(torch.tensor([0.5, 1.5]))
    with pytest.raises(trak.InputError, match="alphas_cumprod must be numbers"):
        trak.Diffusion("ddpm")
    with pytest.raises(trak.InputError, match="batches images"):
        trak.Diffusion(ALPHAS).output(model, {"images": images})
    with pytest.raises(trak.InputError, match=r"like its noisy input, \[40, 1, 4, 4\]"):
        trak.Diffusion(ALPHAS, call=lambda model, x, t, c: model(x, t).flatten(1)).output(model, images)
