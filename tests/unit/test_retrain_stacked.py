"""Stacked training is training one model after another, for every model in the stack."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from trak import FingerprintError, InputError, NonFiniteError
from trak.evaluation import Bank, RetrainError, model_seed, random_subsets, retrain_stacked, seeded

N, T, CLASSES = 60, 4, 3
GENERATOR = torch.Generator().manual_seed(3)
IMAGES = torch.randn(N, 1, 8, 8, generator=GENERATOR, dtype=torch.float64)
LABELS = torch.randint(CLASSES, (N,), generator=GENERATOR)
TARGETS = torch.randn(T, 1, 8, 8, generator=GENERATOR, dtype=torch.float64)
OPTIONS = {"epochs": 2, "batch_size": 7, "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}


def mlp():
    layers = nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, CLASSES)
    return nn.Sequential(*layers).double()


def convnet():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    ).double()


class Tied(nn.Module):
    """Two layers with one weight, a buffer, and a parameter that is not trained."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 64, bias=False, dtype=torch.float64)
        self.second = nn.Linear(64, 64, bias=False, dtype=torch.float64)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.full((64,), 0.5, dtype=torch.float64), requires_grad=False)
        self.register_buffer("mean", torch.rand((), dtype=torch.float64))

    def forward(self, x):
        hidden = torch.tanh(self.first(x.flatten(1) - self.mean)) * self.frozen
        return torch.tanh(self.second(hidden))[:, :CLASSES]


def batch_statistics():
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 8),
        nn.BatchNorm1d(8, track_running_stats=False),
        nn.ReLU(),
        nn.Linear(8, CLASSES),
    ).double()


def outputs(model):
    logits = model(TARGETS)
    return logits[:, 0] - logits[:, 1]


def one_after_another(build, masks, repeats, seed, *, schedule=None, loss=F.cross_entropy):
    """The readable reference, with torch's own optimiser."""
    out = torch.empty(len(masks), repeats, T, dtype=torch.float64)
    for s, mask in enumerate(masks):
        rows = mask.nonzero()[:, 0]
        for r in range(repeats):
            with seeded(model_seed(seed, s, r)):
                model = build()
            generator = torch.Generator().manual_seed(model_seed(seed, s, r, purpose="order"))
            optimizer = torch.optim.SGD(
                [p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9, weight_decay=1e-3
            )
            num_steps, step = 2 * -(-len(rows) // 7), 0
            for _ in range(2):
                for picked in rows[torch.randperm(len(rows), generator=generator)].split(7):
                    if schedule is not None:
                        optimizer.param_groups[0]["lr"] = 0.1 * schedule((step + 0.5) / num_steps)
                    optimizer.zero_grad()
                    loss(model(IMAGES[picked]), LABELS[picked]).backward()
                    optimizer.step()
                    step += 1
            with torch.no_grad():
                out[s, r] = outputs(model.eval())
    return out


@pytest.mark.parametrize("build", [mlp, convnet, Tied, batch_statistics])
def test_stacked_is_one_after_another(build):
    bank = retrain_stacked(
        build, IMAGES, LABELS, outputs, num_subsets=3, models_per_subset=2, seed=5, **OPTIONS
    )
    expected = one_after_another(build, random_subsets(N, 3, seed=5), 2, 5)
    torch.testing.assert_close(bank.outputs, expected, rtol=1e-10, atol=1e-12)
    assert len(bank.outputs.flatten().unique()) == 3 * 2 * T


def test_schedule_loss_and_subsets_of_several_sizes():
    def loss(logits, labels):
        return F.mse_loss(logits, torch.eye(CLASSES, dtype=torch.float64)[labels])

    def triangle(share):
        return min(share / 0.3, (1 - share) / 0.7)

    masks = torch.cat([random_subsets(N, 2, 0.5, seed=0), random_subsets(N, 2, 0.2, seed=1)])[[0, 2, 1, 3]]
    bank = retrain_stacked(mlp, IMAGES, LABELS, outputs, masks=masks, schedule=triangle, loss=loss, **OPTIONS)
    expected = one_after_another(mlp, masks, 1, 0, schedule=triangle, loss=loss)
    torch.testing.assert_close(bank.outputs, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("stack_size", [1, 2, 5])
def test_the_stack_does_not_matter(stack_size):
    options = OPTIONS | {"num_subsets": 5}
    expected = retrain_stacked(mlp, IMAGES, LABELS, outputs, **options)
    bank = retrain_stacked(mlp, IMAGES, LABELS, outputs, stack_size=stack_size, **options)
    torch.testing.assert_close(bank.outputs, expected.outputs, rtol=1e-10, atol=1e-12)


def test_resumed_and_kept(tmp_path):
    options = OPTIONS | {"num_subsets": 5, "stack_size": 2, "keep_models": True, "folder": tmp_path}
    calls = []

    def failing(model):
        calls.append(1)
        if len(calls) == 4:
            raise OSError("disk on fire")
        return outputs(model)

    with pytest.raises(RetrainError, match=r"subset 3, model 0 .*disk on fire"):
        retrain_stacked(mlp, IMAGES, LABELS, failing, **options)
    bank = retrain_stacked(mlp, IMAGES, LABELS, failing, **options)
    assert len(calls) == 4 + 2
    expected = one_after_another(mlp, random_subsets(N, 5), 1, 0)
    torch.testing.assert_close(bank.outputs, expected, rtol=1e-10, atol=1e-12)
    model = mlp()
    for path, values in zip(Bank.load(tmp_path).models, bank.outputs[:, 0]):
        model.load_state_dict(load_file(path))
        torch.testing.assert_close(outputs(model), values)
    with pytest.raises(FingerprintError, match=r"lr: stored 0\.1, asked for 0\.2"):
        retrain_stacked(mlp, IMAGES, LABELS, outputs, **(options | {"lr": 0.2}))
    with pytest.raises(FingerprintError, match="labels"):
        retrain_stacked(mlp, IMAGES, LABELS.roll(1), outputs, **options)
    with pytest.raises(FingerprintError, match="learning_rates"):
        retrain_stacked(mlp, IMAGES, LABELS, outputs, schedule=lambda share: 1 - share, **options)


def test_random_state_and_threads_are_put_back():
    before, threads, seen = torch.get_rng_state(), torch.get_num_threads(), []

    def noted(model):
        seen.append(torch.get_num_threads())
        return outputs(model) + torch.rand(())

    torch.set_num_threads(2)
    try:
        retrain_stacked(mlp, IMAGES, LABELS, noted, num_subsets=2, **OPTIONS)
        assert (seen, torch.get_num_threads()) == ([1, 1], 2)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("layer", "advice"),
    [
        (nn.BatchNorm1d(8), "GroupNorm"),
        (nn.InstanceNorm1d(8, track_running_stats=True), "GroupNorm"),
        (nn.Dropout(0.1), "p=0"),
    ],
)
def test_layers_that_cannot_be_stacked(layer, advice):
    with pytest.raises(InputError, match=f"^2 is a {type(layer).__name__}.*{advice}"):
        retrain_stacked(
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), layer, nn.Linear(8, CLASSES)).double(),
            IMAGES,
            LABELS,
            outputs,
            num_subsets=2,
            **OPTIONS,
        )


def test_what_vmap_cannot_do_is_said():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(1)) + torch.randn(CLASSES)

    with pytest.raises(RetrainError, match=r"from that of subset 0, model 0 .*trak\.evaluation\.retrain"):
        retrain_stacked(
            lambda: Noisy(64, CLASSES, dtype=torch.float64), IMAGES, LABELS, outputs, num_subsets=2, **OPTIONS
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"lr": -1.0}, "lr"),
        ({"momentum": float("nan")}, "momentum"),
        ({"stack_size": 0}, "stack_size"),
        ({"labels": LABELS[:-1]}, "a row each"),
        ({"build": lambda: "model"}, "Module"),
        ({"keep_models": True}, "folder"),
    ],
)
def test_bad_arguments(changes, message):
    arguments = {"build": mlp, "inputs": IMAGES, "labels": LABELS, "outputs": outputs, "num_subsets": 2}
    with pytest.raises(InputError, match=message):
        retrain_stacked(**(arguments | OPTIONS | changes))


def test_diverged_models_are_refused():
    with pytest.raises(NonFiniteError, match="subset 0"):
        retrain_stacked(mlp, IMAGES, LABELS, outputs, num_subsets=2, **(OPTIONS | {"lr": 1e200}))
