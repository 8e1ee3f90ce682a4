"""Cats and dogs at 16 × 16 pixels, and a network that trains on them in seconds: for experiments that retrain hundreds of times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from cifar2 import load_cifar2
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        epochs: passes over the rows that it gets.
        batch_size: rows per step; an incomplete last batch is left out.
        peak_rate: of SGD, reached after a fifth of the steps, then falling to 0.
        momentum: Nesterov's.
        weight_decay: of all parameters.
    """

    epochs: int = 8
    batch_size: int = 50
    peak_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def rate(self, progress: float) -> float:
        """The learning rate after this share of training."""
        return self.peak_rate * float(np.interp(progress, [0, 0.2, 1], [0.1, 1, 0]))


@dataclass(frozen=True, eq=False)
class Images:
    """A training set and test images, normalised, at [3, 16, 16] (or any other size)."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load_images(data: Path, num_train: int, seed: int, *, kept: Path) -> Images:
    """`num_train` random training images, half of them cats, and all 2,000 test images, averaged over 2 × 2 pixels.

    Args:
        data: folder of cifar10_*_jpeg.npz.
        num_train: N.
        seed: of the choice.
        kept: a folder where the few that are used are kept, since decoding all takes longer than training a network.
    """
    file = kept / f"images-{num_train}-{seed}.safetensors"
    if not file.exists():
        images = _decode(data, num_train, seed)
        parts = zip(("train", "train_labels", "test", "test_labels"), (*images.train, *images.test))
        kept.mkdir(parents=True, exist_ok=True)
        save_file({name: part.contiguous() for name, part in parts}, file.with_suffix(".part"))
        file.with_suffix(".part").replace(file)
    found = load_file(file)
    return Images((found["train"], found["train_labels"]), (found["test"], found["test_labels"]))


def _decode(data: Path, num_train: int, seed: int) -> Images:
    images, labels = load_cifar2(data, "train")
    generator = torch.Generator().manual_seed(seed)
    rows = torch.cat(
        [
            of_class[torch.randperm(len(of_class), generator=generator)[: num_train // 2]]
            for of_class in ((labels == label).nonzero().squeeze(1) for label in (0, 1))
        ]
    )
    test_images, test_labels = load_cifar2(data, "test")
    return Images((F.avg_pool2d(images[rows], 2), labels[rows]), (F.avg_pool2d(test_images, 2), test_labels))


class Network(nn.Sequential):
    """Three convolutions with batch norm: 23,826 parameters."""

    def __init__(self) -> None:
        super().__init__(
            *self._block(3, 16),
            nn.MaxPool2d(2),
            *self._block(16, 32),
            nn.MaxPool2d(2),
            *self._block(32, 64),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 2),
        )

    @staticmethod
    def _block(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
        return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()


def train(
    images: Tensor, labels: Tensor, recipe: Recipe, seed: int, keep_epochs: Sequence[int] = ()
) -> tuple[Network, dict[int, dict[str, Tensor]]]:
    """A trained network, in evaluation mode, and its weights after some epochs. All that is random comes from the seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=recipe.peak_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=True,
    )
    per_epoch = len(labels) // recipe.batch_size
    kept = {}
    for step in range(recipe.epochs * per_epoch):
        if step % per_epoch == 0:
            order = torch.randperm(len(labels), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step / (recipe.epochs * per_epoch))
        first = step % per_epoch * recipe.batch_size
        rows = order[first : first + recipe.batch_size]
        batch = images[rows]
        if torch.rand((), generator=generator) < 0.5:
            batch = batch.flip(3)
        optimizer.zero_grad()
        F.cross_entropy(network(batch.contiguous(memory_format=torch.channels_last)), labels[rows]).backward()
        optimizer.step()
        epoch = (step + 1) // per_epoch
        if (step + 1) % per_epoch == 0 and epoch in keep_epochs:
            kept[epoch] = weights(network)
    return network.eval(), kept


def weights(network: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict in the usual memory format, as safetensors files want it."""
    return {
        name: value.clone(memory_format=torch.contiguous_format)
        for name, value in network.state_dict().items()
    }


@torch.no_grad()
def logit_gap(network: nn.Module, images: Tensor) -> Tensor:
    """The logit of "dog" minus that of "cat", [B]."""
    logits = network(images)
    return logits[:, 1] - logits[:, 0]
