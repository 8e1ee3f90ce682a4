"""The demo's data: images of Fashion-MNIST, some training labels corrupted on purpose."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trak import InputError

BUNDLED = Path(__file__).parent / "fashion_mnist" / "images.npz"
CLASS_NAMES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


@dataclass(frozen=True, eq=False)
class DemoData:
    """Images and labels.

    Attributes:
        images: training inputs, [N, 1, 28, 28] float32, standardised by the training pixels' mean and
            deviation.
        labels: [N] int64, as the models are given them.
        true_labels: [N] int64, before corruption.
        test_images: [T, 1, 28, 28] float32, standardised in the same way.
        test_labels: [T] int64; never corrupted.
        pixels: training images as they are shown, [N, 28, 28] uint8.
        test_pixels: [T, 28, 28] uint8.
        source_hash: SHA-256 of the bundled file.
    """

    images: Tensor
    labels: Tensor
    true_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    pixels: Tensor
    test_pixels: Tensor
    source_hash: str

    @property
    def corrupted(self) -> Tensor:
        """Which training labels were changed, [N] bool."""
        return self.labels != self.true_labels


def load_data(*, corrupted_share: float, seed: int, path: Path = BUNDLED) -> DemoData:
    """Read the bundled images and corrupt a share of the training labels.

    Args:
        corrupted_share: share of the training rows whose label is replaced by one of the other classes, in
            [0, 1).
        seed: which rows, and which labels they get.
        path: the file.

    Returns:
        The data.

    Raises:
        InputError: the file is missing, or the share is out of range.
    """
    if not path.is_file():
        raise InputError(
            f"the demo's images are missing: there is no file {path}. They are part of the package; "
            "install it again, or draw them from Fashion-MNIST with `python -m trak.demo.make_data`."
        )
    content = path.read_bytes()
    with np.load(path) as arrays:
        pixels = torch.from_numpy(arrays["train_images"])
        true_labels = torch.from_numpy(arrays["train_labels"]).long()
        test_pixels = torch.from_numpy(arrays["test_images"])
        test_labels = torch.from_numpy(arrays["test_labels"]).long()
    # Sums of integers are exact in any order, so the inputs are the same bits for any number of threads.
    total, squares = int(pixels.long().sum()), int(pixels.long().square().sum())
    mean = total / pixels.numel()
    deviation = (squares / pixels.numel() - mean**2) ** 0.5

    def standardise(images: Tensor) -> Tensor:
        return ((images.float() - mean) / deviation).unsqueeze(1)

    return DemoData(
        images=standardise(pixels),
        labels=corrupt(true_labels, share=corrupted_share, num_classes=len(CLASS_NAMES), seed=seed),
        true_labels=true_labels,
        test_images=standardise(test_pixels),
        test_labels=test_labels,
        pixels=pixels,
        test_pixels=test_pixels,
        source_hash=hashlib.sha256(content).hexdigest(),
    )


def corrupt(labels: Tensor, *, share: float, num_classes: int, seed: int) -> Tensor:
    """Replace the labels of floor(share · N) random rows, each by one of the other classes with equal chance.

    Args:
        labels: [N] int64.
        share: in [0, 1).
        num_classes: number of classes.
        seed: of the draw.

    Returns:
        Labels [N] int64.

    Raises:
        InputError: the share is out of range.
    """
    if not 0 <= share < 1:
        raise InputError(f"share must be in [0, 1), got {share}. For a tenth of the rows pass 0.1.")
    generator = np.random.Generator(np.random.PCG64(seed))
    rows = generator.permutation(len(labels))[: int(share * len(labels))]
    shifts = generator.integers(1, num_classes, size=len(rows))
    corrupted = labels.clone()
    corrupted[rows] = (labels[rows] + torch.from_numpy(shifts)) % num_classes
    return corrupted
