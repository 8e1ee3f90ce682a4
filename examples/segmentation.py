"""Which training images taught a segmenter to see this one so? LDS of TRAK for a classifier of every pixel.

    python examples/segmentation.py --out segmentation

The images of Fashion-MNIST that come with the package, with noise added; the label of a pixel is how bright it is without the noise:
background, dark or bright. A convolutional net is trained on 40 random halves of 500 images, and three times on all of them. Prints the LDS of
TRAK with its defaults, of inner products of gradients and of random scores, with 95% intervals; the gain is the difference to inner
products, paired. Minutes of one core; kill it whenever you like: the same command goes on where it stopped. Leaves result.json and
figure.png (needs matplotlib): a target, its labels, and its three strongest proponents by TRAK.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from alternatives import compared
from experiment_page import interval, number, table
from small_banks import Seconds
from torch import Tensor, nn

import trak
from trak.demo.data import load_data
from trak.evaluation import Bank, retrain, seeded
from trak.frontier.clock import machine_facts
from trak.progress import bar
from trak.tasks.dense import DenseClassification

BANK_SEED, CHECKPOINT_SEED, RANDOM_SEED = 0, 1, 2
TARGET_NOISE = 1_000_000  # seeds of the targets' noise begin here: no training image has the same
EDGES = (32, 160)  # brightness, of 255, where "dark" and "bright" begin


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Sizes and training, by SGD with momentum 0.9; `noise` is a standard deviation where black is 0 and white is 1."""

    channels: tuple[int, int] = (16, 24)
    num_train: int = 500
    num_targets: int = 60
    noise: float = 0.5
    epochs: int = 12
    batch_size: int = 25
    rate: float = 0.1  # at its peak, after a tenth of the steps
    subsets: int = 40
    checkpoints: int = 3


QUICK = Recipe(channels=(4, 6), num_train=24, num_targets=4, epochs=1, batch_size=6, subsets=8, checkpoints=2)


def noisy(pixels: Tensor, noise: float, first_seed: int) -> tuple[Tensor, Tensor]:
    """(inputs [n, 1, 28, 28], labels [n, 28, 28]) of images [n, 28, 28]; the noise of image i is drawn from the seed first_seed + i."""
    seeds = range(first_seed, first_seed + len(pixels))
    draws = [torch.randn(28, 28, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    labels = torch.bucketize(pixels.int(), torch.tensor(EDGES, dtype=torch.int32), right=True)
    return (pixels / 255 + noise * torch.stack(draws))[:, None], labels


def build(channels: tuple[int, int]) -> nn.Module:
    """4,291 parameters with 16 and 24 channels; each pixel's class is told from 7 × 7 pixels."""
    sizes = (1, *channels, len(EDGES) + 1)
    first, second, last = (nn.Conv2d(*pair, 3, padding=1) for pair in pairwise(sizes))
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)


def fit(train_set: tuple[Tensor, Tensor], rows: Tensor, seed: int, recipe: Recipe) -> nn.Module:
    """A model trained on some rows; the loss of an image is the mean of its pixels' log losses."""
    with seeded(seed):
        model = build(recipe.channels)
    order = torch.Generator().manual_seed(seed)
    epochs = [rows[torch.randperm(len(rows), generator=order)] for _ in range(recipe.epochs)]
    batches = [picked for epoch in epochs for picked in epoch.split(recipe.batch_size)]
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.rate, momentum=0.9)
    for step, picked in enumerate(batches):
        share = (step + 0.5) / len(batches)
        optimizer.param_groups[0]["lr"] = recipe.rate * min(share / 0.1, (1 - share) / 0.9)
        optimizer.zero_grad()
        F.cross_entropy(model(train_set[0][picked]), train_set[1][picked]).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def outputs(model: nn.Module, targets: tuple[Tensor, Tensor]) -> Tensor:
    """The task's f of each target and last the share of pixels that are labelled rightly, [T + 1]."""
    inputs, labels = targets
    right = (model(inputs).argmax(1) == labels).float().mean()
    return torch.cat([DenseClassification().output(model, targets), right[None]])


def bank(recipe: Recipe, train_set: Any, targets: Any, folder: Path, **plan: Any) -> Bank:
    """Models and their outputs; those that are in the folder are read."""
    # The last two, how many models there are, may grow.
    version = json.dumps([1, *list(asdict(recipe).values())[:-2]])
    return retrain(
        lambda rows, seed: fit(train_set, rows, seed, recipe),
        lambda model: outputs(model, targets),
        num_train=recipe.num_train,
        folder=folder,
        version=version,
        **plan,
    )


def attribute(net: nn.Module, train_set: Any, targets: Any, checkpoints: Any, folder: Path) -> list[Tensor]:
    """Scores [N, T] of TRAK with its defaults, and inner products of whole gradients; features in the folder are read."""
    both: dict[str, Any] = {"model": net, "task": "dense_classification"}
    whole = {"projection": trak.Identity(), "save_dir": folder / "features-whole"}
    methods = (
        trak.TRAK(**both, save_dir=folder / "features-trak"),
        trak.GradientSimilarity(**both, **whole, similarity="dot"),
    )
    found = []
    with bar(len(methods), "Attributing", unit="methods") as shown:
        for method in methods:
            found.append(method.fit(train_set, checkpoints).attribute(targets).scores.tensor())
            shown.update()
    return found


def evaluate(halves: Bank, trak_NT: Tensor, products_NT: Tensor) -> list[dict[str, Any]]:
    """LDS, intervals and gains over inner products; of random scores the mean over ten draws."""
    generator = torch.Generator().manual_seed(RANDOM_SEED)
    noise = [torch.randn(trak_NT.shape, generator=generator) for _ in range(10)]
    scores = {"inner products": [products_NT], "TRAK": [trak_NT], "random, mean of 10": noise}
    return [{"scores": name, **row} for name, row in compared(halves, scores).items()]


def draw(file: Path, images: Mapping[str, Tensor]) -> None:
    """Images [28, 28] side by side, with their titles."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 * len(images), 1.9), layout="constrained")
    for axes, (title, image) in zip(figure.subplots(1, len(images)), images.items()):
        axes.imshow(image.numpy(), cmap="gray")
        axes.set_title(title, fontsize=9)
        axes.axis("off")
    figure.savefig(file, dpi=150)


def run(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """All stages; the result as JSON values."""
    data, seconds = load_data(corrupted_share=0.0, seed=0), Seconds(folder / "seconds.jsonl")
    train_set = noisy(data.pixels[: recipe.num_train], recipe.noise, 0)
    targets = noisy(data.test_pixels[: recipe.num_targets], recipe.noise, TARGET_NOISE)
    same = (recipe, train_set, targets)
    with seconds.of("bank"):
        halves = bank(*same, folder / "bank", num_subsets=recipe.subsets, seed=BANK_SEED)
    with seconds.of("checkpoints"):
        plan = {"models_per_subset": recipe.checkpoints, "seed": CHECKPOINT_SEED, "keep_models": True}
        everything = torch.ones(1, recipe.num_train, dtype=torch.bool)
        whole = bank(*same, folder / "checkpoints", masks=everything, **plan)
    with seconds.of("attribution"):
        scores = attribute(build(recipe.channels), train_set, targets, whole.models, folder)
    top = scores[0][:, 0].topk(3).indices.tolist()
    proponents = {f"row {row}": train_set[0][row, 0] for row in top}
    draw(folder / "figure.png", {"target 0": targets[0][0, 0], "its labels": targets[1][0], **proponents})
    result = {
        "recipe": asdict(recipe),
        "seeds": {"bank": BANK_SEED, "checkpoints": CHECKPOINT_SEED, "random": RANDOM_SEED},
        "parameters": sum(values.numel() for values in build(recipe.channels).parameters()),
        "pixels labelled rightly": float(whole.outputs[..., -1].mean()),
        "share of the largest class": float(targets[1].flatten().bincount().max() / targets[1].numel()),
        "methods": evaluate(halves.subset(targets=slice(0, -1)), *scores),
        "proponents of target 0": top,
        "processor seconds": seconds.totals(),
        "machine": machine_facts(),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def summary(result: Mapping[str, Any]) -> str:
    """The table, and what else is worth a line."""

    rows = []
    for row in result["methods"]:
        lds = f"{number(row['lds'])} {interval((row['low'], row['high']))}"
        rows.append((row["scores"], lds, interval(row["gain"]) if "gain" in row else ""))
    return f"""{table(("scores", "LDS", "gain"), rows)}

Pixels labelled rightly: {result["pixels labelled rightly"]:.1%}; the largest class has {result["share of the largest class"]:.1%}.
Proponents of target 0: rows {result["proponents of target 0"]}. Processor seconds: {result["processor seconds"]}."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("segmentation"), help="folder of all files")
    parser.add_argument(
        "--quick", action="store_true", help="few rows and models, in seconds; proves nothing"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(summary(run(QUICK if options.quick else Recipe(), options.out)))


if __name__ == "__main__":
    main()
