"""TRAK on CIFAR-2 with a bank of retrained models: from checkpoints to the linear datamodeling score.

    python examples/cifar2.py --data ../shared --checkpoints 1 5 10

Needs `cifar10_*_jpeg.npz` and the bank of checkpoints and retrained models that its README describes. Uses the default settings of
`trak.attribute` unless told otherwise, and prints the LDS with its 95% bootstrap interval.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import trak

CLASSES = (3, 5)  # cats, dogs
MEAN = torch.tensor([125.307, 122.961, 113.8575]).view(1, 3, 1, 1)
STD = torch.tensor([51.5865, 50.847, 51.255]).view(1, 3, 1, 1)


class Block(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, padding: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class ResNet9(nn.Module):
    """The paper's CIFAR network at a quarter of its width: 142,992 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Block(3, 16)
        self.down = Block(16, 32, 5, 2, 2)
        self.res1 = nn.Sequential(Block(32, 32), Block(32, 32))
        self.widen = Block(32, 64)
        self.res2 = nn.Sequential(Block(64, 64), Block(64, 64))
        self.narrow = Block(64, 32, padding=0)
        self.head = nn.Linear(32, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.stem(x))
        x = x + self.res1(x)
        x = F.max_pool2d(self.widen(x), 2)
        x = x + self.res2(x)
        x = F.adaptive_max_pool2d(self.narrow(x), 1).flatten(1)
        return self.head(x) * 0.2


def load_cifar2(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """(images [N, 3, 32, 32], labels [N]): all cats in file order, then all dogs."""
    file = np.load(folder / f"cifar10_{split}_jpeg.npz")
    data, offsets, labels = file["jpeg"].tobytes(), file["offsets"], file["labels"]
    rows = np.concatenate([np.flatnonzero(labels == label) for label in CLASSES])
    images = [
        np.asarray(Image.open(io.BytesIO(data[offsets[row] : offsets[row + 1]])).convert("RGB"))
        for row in rows
    ]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    return (pixels - MEAN) / STD, torch.from_numpy((labels[rows] == CLASSES[1]).astype(np.int64))


@dataclass(frozen=True)
class Bank:
    """Training set, targets, checkpoints and retrained models' outputs."""

    train_set: tuple[Tensor, Tensor]
    targets: tuple[Tensor, Tensor]
    checkpoints: list[Path]
    masks: np.ndarray
    margins: np.ndarray


def load_bank(folder: Path, num_targets: int | None) -> Bank:
    file = np.load(folder / "banks" / "cifar2" / "bank.npz")
    target_rows = torch.from_numpy(file["target_rows"][:num_targets].astype(np.int64))
    train_set = load_cifar2(folder / "data", "train")
    images, labels = load_cifar2(folder / "data", "test")
    checkpoints = folder / "banks" / "cifar2" / "checkpoints"
    return Bank(
        train_set,
        (images[target_rows], labels[target_rows]),
        [checkpoints / f"seed{seed:02d}_epoch24.safetensors" for seed in range(10)],
        np.unpackbits(file["masks"], axis=1)[:, : len(train_set[0])].astype(bool),
        file["margins"][:, :num_targets].astype(np.float64),
    )


def evaluate(bank: Bank, checkpoints: list[Path], settings: dict) -> dict:
    """The LDS of TRAK over some checkpoints."""
    start = time.perf_counter()
    attribution = trak.attribute(ResNet9(), bank.train_set, bank.targets, checkpoints=checkpoints, **settings)
    result = trak.evaluation.lds(attribution.scores, bank.masks, bank.margins)
    seconds = time.perf_counter() - start
    return {"lds": result.mean, "low": result.low, "high": result.high, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=Path("../shared"), help="folder with data/ and banks/cifar2/")
    add("--checkpoints", type=int, nargs="+", default=[1, 5, 10], help="ensemble sizes")
    add("--average", type=int, default=1, help="for an ensemble of one: mean over so many single checkpoints")
    add("--save-dir", type=Path, default=None, help="keep features there")
    add("--projection", default=None, help="e.g. Sparse:4096; the library's default if left out")
    add(
        "--damping",
        nargs="+",
        default=["auto"],
        help="auto, a number, relative:R, or share:S for trace / S",
    )
    add("--preconditioner", default="whole")
    add("--targets", type=int, default=None, help="only the first so many targets")
    add("--json", type=Path, default=None, help="write the results there")
    options = parser.parse_args()

    bank = load_bank(options.data, options.targets)
    results = []
    for size, damping in itertools.product(options.checkpoints, options.damping):
        settings = {
            "task": "image_classification",
            "damping": parse_damping(damping, size),
            "projection": parse_projection(options.projection),
            "preconditioner": options.preconditioner,
            "save_dir": options.save_dir,
            "batch_size": 100,
        }
        rows = []
        for first in range(options.average if size == 1 else 1):
            rows.append(evaluate(bank, bank.checkpoints[first : first + size], settings))
            row = {"checkpoints": size, "first": first, "damping": damping, **rows[-1]}
            results.append(row)
            print(
                f"M = {size:2d}, damping {damping}: LDS {row['lds']:.4f} [{row['low']:.4f}, {row['high']:.4f}]"
                f"  ({row['seconds']:.0f} s)",
                flush=True,
            )
        if len(rows) > 1:
            mean = np.mean([row["lds"] for row in rows])
            print(f"M = {size:2d}, damping {damping}: mean over {len(rows)} single checkpoints {mean:.4f}")
    if options.json:
        options.json.write_text(json.dumps({"projection": options.projection, "results": results}, indent=2))


def parse_projection(text: str | None) -> trak.Projection | None:
    if text is None:
        return None
    kind, _, dim = text.partition(":")
    return getattr(trak, kind)(dim=int(dim)) if dim else getattr(trak, kind)()


def parse_damping(text: str, num_checkpoints: int) -> float | str | trak.Damping:
    if text.startswith("relative:"):
        return trak.RelativeDamping(float(text.removeprefix("relative:")))
    if text.startswith("share:"):
        share = float(text.removeprefix("share:")) / num_checkpoints**0.5
        return trak.AutomaticDamping(share=share, directions=None)
    return text if text == "auto" else float(text)


if __name__ == "__main__":
    main()
