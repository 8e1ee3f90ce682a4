"""How the demo's models are trained: a small ConvNet, plain SGD, a one-cycle learning rate.

Every model is trained by one thread, and several models at a time by as many threads as torch may use. For
nets this small that is faster than several threads for one model, and the result does not depend on the
number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trak.evaluation.retrain.run import one_thread_each

State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Model size and training options, all that decides a trained model besides its data and seed."""

    channels: tuple[int, int] = (16, 32)
    num_classes: int = 10
    epochs: int = 10
    batch_size: int = 50
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.2


def build_model(recipe: Recipe) -> nn.Module:
    """The ConvNet for [B, 1, 28, 28] images: two strided convolutions and a linear layer, uninitialised."""
    first, second = recipe.channels
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Conv2d(1, first, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(first, second, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(second * 7 * 7, recipe.num_classes),
        )
    return model.to_empty(device="cpu")


def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Kaiming-normal weights and zero biases; torch's own defaults draw from the global generator."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.kaiming_normal_(parameter, nonlinearity="relu", generator=generator)
            else:
                parameter.zero_()


def learning_rate(recipe: Recipe, progress: float) -> float:
    """One cycle, piecewise linear: from 0 to the peak over the warm-up, then down to 0 at `progress` = 1."""
    if progress < recipe.warmup:
        return recipe.learning_rate * progress / recipe.warmup
    return recipe.learning_rate * (1 - progress) / (1 - recipe.warmup)


def train(images: Tensor, labels: Tensor, rows: Tensor, *, recipe: Recipe, seed: int) -> State:
    """Train one model from scratch on some rows, with a generator of its own.

    Args:
        images: [N, 1, 28, 28] float32.
        labels: [N] int64.
        rows: [n] int64, the rows to train on.
        recipe: model and options.
        seed: of initialisation and batch order.

    Returns:
        The trained parameters, detached, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    model = build_model(recipe)
    initialise(model, generator)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )
    inputs = images[rows].contiguous(memory_format=torch.channels_last)
    classes = labels[rows]
    num_batches = -(-len(rows) // recipe.batch_size)
    for epoch in range(recipe.epochs):
        order = torch.randperm(len(rows), generator=generator)
        for batch, picked in enumerate(order.split(recipe.batch_size)):
            rate = learning_rate(recipe, (epoch + (batch + 0.5) / num_batches) / recipe.epochs)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[picked]), classes[picked]).backward()
            optimizer.step()
    return {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def margins(state: State, images: Tensor, labels: Tensor, *, recipe: Recipe) -> Tensor:
    """The model output f = logit_y − logsumexp(other logits) of each image: [n] float32."""
    logits = logits_of(state, images, recipe=recipe)
    correct = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], float("-inf"))
    return correct[:, 0] - others.logsumexp(dim=1)


@torch.no_grad()
def logits_of(state: State, images: Tensor, *, recipe: Recipe) -> Tensor:
    """Logits [n, C] of the model with these parameters."""
    model = build_model(recipe)
    model.load_state_dict(state)
    return torch.cat([model(part) for part in images.split(500)])


def train_many(
    images: Tensor, labels: Tensor, masks: Tensor, seeds: Sequence[int], *, recipe: Recipe
) -> Iterator[State]:
    """Train one model per mask.

    Args:
        images: [N, 1, 28, 28] float32.
        labels: [N] int64.
        masks: [M, N] bool, the rows each model sees.
        seeds: M seeds.
        recipe: model and options.

    Yields:
        The trained parameters of each model, in the order of the masks, as soon as they are there.
    """

    def train_one(index: int) -> State:
        rows = masks[index].nonzero()[:, 0]
        return train(images, labels, rows, recipe=recipe, seed=seeds[index])

    with one_thread_each(max(1, min(torch.get_num_threads(), len(seeds)))) as pool:
        yield from pool.map(train_one, range(len(seeds)))
