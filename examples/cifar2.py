"""TRAK on CIFAR-2 with a bank of retrained models: from checkpoints to the linear datamodeling score.

    python examples/cifar2.py --data ../shared --checkpoints 1 5 10

Needs `cifar10_*_jpeg.npz` and the bank of checkpoints and retrained models that its README describes. Uses the default settings of
`trak.attribute` unless told otherwise, and prints the LDS with its 95% bootstrap interval.
"""

from __future__ import annotations

import argparse
import io
import json
import time
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=Path("../shared"), help="folder with data/ and banks/cifar2/"
    )
    parser.add_argument("--checkpoints", type=int, nargs="+", default=[1, 5, 10], help="ensemble sizes")
    parser.add_argument(
        "--average",
        type=int,
        default=1,
        help="for an ensemble of one: mean over that many single checkpoints",
    )
    parser.add_argument("--save-dir", type=Path, default=None, help="keep features there")
    parser.add_argument(
        "--projection", default=None, help="e.g. Sparse:4096; the default of the library if left out"
    )
    parser.add_argument("--damping", default="auto", help='"auto", a number, or relative:R')
    parser.add_argument("--preconditioner", default="whole")
    parser.add_argument("--targets", type=int, default=None, help="only the first so many targets")
    parser.add_argument("--json", type=Path, default=None, help="write the results there")
    options = parser.parse_args()

    bank = np.load(options.data / "banks" / "cifar2" / "bank.npz")
    columns = slice(options.targets)
    target_rows = torch.from_numpy(bank["target_rows"][columns].astype(np.int64))
    train_set = load_cifar2(options.data / "data", "train")
    test_images, test_labels = load_cifar2(options.data / "data", "test")
    targets = (test_images[target_rows], test_labels[target_rows])
    masks = np.unpackbits(bank["masks"], axis=1)[:, : len(train_set[0])].astype(bool)
    margins = bank["margins"][:, columns].astype(np.float64)

    folder = options.data / "banks" / "cifar2" / "checkpoints"
    paths = [folder / f"seed{seed:02d}_epoch24.safetensors" for seed in range(10)]
    settings = {
        "task": "image_classification",
        "damping": parse_damping(options.damping),
        "projection": parse_projection(options.projection),
        "preconditioner": options.preconditioner,
        "save_dir": options.save_dir,
        "batch_size": 100,
    }
    results = []
    for size in options.checkpoints:
        singles = options.average if size == 1 else 1
        for first in range(singles):
            start = time.perf_counter()
            attribution = trak.attribute(
                ResNet9(), train_set, targets, checkpoints=paths[first : first + size], **settings
            )
            result = trak.evaluation.lds(attribution.scores, masks, margins)
            seconds = time.perf_counter() - start
            results.append(
                {
                    "checkpoints": size,
                    "first": first,
                    "lds": result.mean,
                    "low": result.low,
                    "high": result.high,
                    "seconds": seconds,
                }
            )
            print(
                f"M = {size:2d}: LDS {result.mean:.4f} [{result.low:.4f}, {result.high:.4f}]  ({seconds:.0f} s)",
                flush=True,
            )
        if singles > 1:
            print(
                f"M = {size:2d}: mean over {singles} single checkpoints {np.mean([r['lds'] for r in results[-singles:]]):.4f}"
            )
    if options.json:
        options.json.write_text(
            json.dumps({"settings": {k: str(v) for k, v in settings.items()}, "results": results}, indent=2)
        )


def parse_projection(text: str | None) -> trak.Projection | None:
    if text is None:
        return None
    kind, _, dim = text.partition(":")
    return getattr(trak, kind)(dim=int(dim)) if dim else getattr(trak, kind)()


def parse_damping(text: str) -> float | str | trak.Damping:
    if text.startswith("relative:"):
        return trak.RelativeDamping(float(text.removeprefix("relative:")))
    return text if text == "auto" else float(text)


if __name__ == "__main__":
    main()
