"""Images in a folder for each class, as ImageNet is laid out, read with Pillow; and small folders to try things on.

FOLDER/CLASS/anything.jpg        classes are numbered in the order of their names, rows by class and then by file name
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@dataclass(frozen=True, eq=False)
class ImageFolder(Dataset):
    """(row, image [3, size, size] float32, label) of each file.

    An image is scaled to a shorter side of 8/7 of `size`, cut to its centre, and normalised by ImageNet's mean and deviation: what published
    weights were evaluated on, for size = 224. Where `size` is below 64 the whole image is used.

    Attributes:
        folder: with a folder for each class.
        size: of the square that the model gets, in pixels.
        every: only every so many-th row.
        classes: their names.
        files: (path, label) by row.
    """

    folder: Path
    size: int = 224
    every: int = 1
    classes: tuple[str, ...] = field(init=False)
    files: tuple[tuple[Path, int], ...] = field(init=False)

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise SystemExit(
                f"there is no folder {self.folder}: expected one with a folder of images for each class"
            )
        names = sorted(path.name for path in self.folder.iterdir() if path.is_dir())
        files = [
            (path, label)
            for label, name in enumerate(names)
            for path in sorted((self.folder / name).iterdir())
            if path.suffix.lower() in SUFFIXES
        ]
        if not files:
            raise SystemExit(
                f"{self.folder} has no images in folders ({', '.join(sorted(SUFFIXES))}), one folder for each class"
            )
        object.__setattr__(self, "classes", tuple(names))
        object.__setattr__(self, "files", tuple(files[:: self.every]))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> tuple[int, Tensor, int]:
        if not -len(self.files) <= row < len(self.files):
            raise IndexError(f"row {row} of {len(self.files)}")
        pixels = torch.from_numpy(np.asarray(self.picture(row)).copy()).permute(2, 0, 1).float() / 255
        return row, (pixels - MEAN) / STD, self.files[row][1]

    def picture(self, row: int) -> Image.Image:
        """The image as it is cut, without normalisation."""
        with Image.open(self.files[row][0]) as image:
            image = image.convert("RGB")
            side = self.size if self.size < 64 else self.size * 8 // 7
            scale = side / min(image.size)
            image = image.resize([max(side, round(scale * length)) for length in image.size], Image.BILINEAR)
        left, top = ((length - self.size) // 2 for length in image.size)
        return image.crop((left, top, left + self.size, top + self.size))


def make_sample(kind: str, folder: Path, *, data: Path, num_train: int, num_val: int) -> None:
    """Write `folder`/train and `folder`/val, a class per folder, in equal numbers of the ten classes.

    Args:
        kind: "fashion" for the Fashion-MNIST that comes with trak, "cifar10" for cifar10_*_jpeg.npz in `data`.
        folder: where to.
        data: see there.
        num_train: images for training, rounded down to a multiple of ten.
        num_val: images to explain.
    """
    for split, count in (("train", num_train), ("val", num_val)):
        taken: dict[str, int] = {}
        for name, image in _fashion(split) if kind == "fashion" else _cifar10(split, data):
            if taken.get(name, 0) >= count // 10:
                continue
            taken[name] = taken.get(name, 0) + 1
            path = folder / split / name / f"{taken[name]:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)


def _fashion(split: str):
    from trak.demo.data import CLASS_NAMES, load_data

    data = load_data(corrupted_share=0.0, seed=0)
    pixels, labels = (data.pixels, data.labels) if split == "train" else (data.test_pixels, data.test_labels)
    for image, label in zip(pixels.numpy(), labels.tolist()):
        yield CLASS_NAMES[label].replace(" ", "-"), Image.fromarray(image)


def _cifar10(split: str, data: Path):
    file = data / f"cifar10_{'train' if split == 'train' else 'test'}_jpeg.npz"
    if not file.is_file():
        raise SystemExit(f"there is no {file}: pass --data with its folder, or --make-sample fashion")
    arrays = np.load(file)
    content, offsets, names = arrays["jpeg"].tobytes(), arrays["offsets"], arrays["classes"]
    for row, label in enumerate(arrays["labels"]):
        yield str(names[label]), Image.open(io.BytesIO(content[offsets[row] : offsets[row + 1]]))
