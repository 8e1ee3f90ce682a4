"""Which training images made a ResNet-18 predict this? TRAK on a folder of images per class, in one process or in many.

    python examples/imagenet.py --quick --out imagenet-quick                 # a sample that it makes itself, on any machine
    torchrun --nproc-per-node 8 examples/imagenet.py --train train --val val --checkpoints runs/*.pt --out imagenet-report

`--train` and `--val` are folders with a folder of images for each class; checkpoints are state dicts with torchvision's or timm's names for
ResNet-18. Without `--checkpoints` it trains `--models` networks, each on a random half of the training images. Every process featurizes its
own rows into one folder, and one of them scores; run it again after an interruption, with any number of processes, and it goes on. Ends with
result.json, a table of the strongest training images of each target, and proponents.png.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from image_folder import ImageFolder, make_sample
from resnet18 import ResNet18
from safetensors.torch import save_file
from torch import distributed
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

import trak
from trak.progress import bar
from trak.store import load_store

SHARD_ROWS = 1024


@dataclass(frozen=True)
class Process:
    """One of `world` processes.

    Attributes:
        rank: its number.
        world: how many there are.
        device: where it computes.
    """

    rank: int
    world: int
    device: str

    def share(self, num_rows: int) -> list[tuple[int, int]]:
        """The ranges [start, stop) of rows that are this process's: whole shards of the store, dealt in turn."""
        block = min(SHARD_ROWS, -(-num_rows // self.world))
        starts = range(self.rank * block, num_rows, self.world * block)
        return [(start, min(start + block, num_rows)) for start in starts]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            distributed.barrier()


@dataclass(frozen=True, eq=False)
class Targets(torch.utils.data.Dataset):
    """Some images of a folder, numbered from 0."""

    images: ImageFolder
    rows: tuple[int, ...]

    @property
    def name(self) -> str:
        """Other images have another name: features of one set never pass for those of another."""
        return f"targets-{digest([str(self.images.files[row][0]) for row in self.rows])}"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[int, torch.Tensor, int]:
        _, pixels, label = self.images[self.rows[number]]
        return number, pixels, label


@contextmanager
def processes(device: str | None) -> Iterator[Process]:
    """This process among those that torchrun has started, or alone."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device is None:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if world > 1:
        # Nothing but barriers passes between processes, for which gloo does on every machine; a slow one is waited for.
        distributed.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield Process(rank, world, device)
    finally:
        if world > 1:
            distributed.destroy_process_group()


def train_models(images: ImageFolder, options: argparse.Namespace, process: Process) -> list[Path]:
    """`--models` networks, each on its own random half; every process trains some, those that are there stay."""
    folder = options.out / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"model-{index}.safetensors" for index in range(options.models)]
    for index in range(process.rank, options.models, process.world):
        if not paths[index].exists():
            network = train_model(images, options, process, seed=index)
            save_file(network.cpu().state_dict(), paths[index].with_suffix(".part"))
            paths[index].with_suffix(".part").replace(paths[index])
    process.wait()
    return paths


def train_model(images: ImageFolder, options: argparse.Namespace, process: Process, *, seed: int) -> ResNet18:
    generator = torch.Generator().manual_seed(seed)
    half = torch.randperm(len(images), generator=generator)[: len(images) // 2].tolist()
    torch.manual_seed(seed)
    network = ResNet18(len(images.classes), options.width).to(process.device).train()
    optimizer = torch.optim.SGD(
        network.parameters(), lr=options.rate, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    loader = DataLoader(
        Subset(images, half),
        options.batch_size,
        shuffle=True,
        drop_last=len(half) > options.batch_size,
        num_workers=options.workers,
        generator=generator,
    )
    steps = options.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, total_steps=max(steps, 2))
    with bar(steps, f"Training model {seed}", unit="steps", enabled=_shown(process)) as shown:
        for _ in range(options.epochs):
            for _, inputs, labels in loader:
                inputs = inputs.to(process.device)
                if torch.rand((), generator=generator) < 0.5:
                    inputs = inputs.flip(3)
                optimizer.zero_grad()
                F.cross_entropy(network(inputs), labels.to(process.device)).backward()
                optimizer.step()
                schedule.step()
                shown.update(1)
    return network


def make_traker(images: ImageFolder, options: argparse.Namespace, process: Process) -> trak.TRAKer:
    """The same in every process: they meet in `save_dir`."""
    return trak.TRAKer(
        model=ResNet18(len(images.classes), options.width),
        task="image_classification",
        train_set_size=len(images),
        save_dir=options.out / "features",
        device=process.device,
        proj_dim=options.dim,
    )


def batches(
    images: Any, ranges: list[tuple[int, int]], options: argparse.Namespace
) -> Iterator[tuple[Any, list[int]]]:
    """((inputs, labels), rows) of some ranges of rows, in order."""
    rows = [row for start, stop in ranges for row in range(start, stop)]
    for numbers, inputs, labels in DataLoader(
        Subset(images, rows), options.batch_size, num_workers=options.workers
    ):
        yield (inputs, labels), numbers.tolist()


def missing(stored: list[tuple[int, int]], own: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """What of a process's own ranges is not stored yet."""
    parts = ((max(a, c), min(b, d)) for a, b in own for c, d in stored)
    return sorted((start, stop) for start, stop in parts if start < stop)


def featurize(
    images: ImageFolder, checkpoints: Sequence[Path], options: argparse.Namespace, process: Process
) -> None:
    """This process's rows of the training set, at every checkpoint."""
    traker = make_traker(images, options, process)
    for model_id, checkpoint in enumerate(checkpoints):
        traker.load_checkpoint(checkpoint, model_id=model_id)
        todo = missing(
            load_store(options.out / "features").rows(model_id).missing(), process.share(len(images))
        )
        with _rows_bar(f"Featurizing, checkpoint {model_id}", todo, process) as shown:
            for batch, rows in batches(images, todo, options):
                traker.featurize(batch, inds=rows)
                shown.update(len(rows))
    # Here the last rows are written: a TRAKer writes what it holds when it ends.
    del traker
    process.wait()
    traker = make_traker(images, options, process)
    own = list(range(process.rank, len(checkpoints), process.world))
    if own:
        traker.finalize_features(model_ids=own)
    process.wait()


def score(
    images: ImageFolder,
    targets: Targets,
    checkpoints: Sequence[Path],
    options: argparse.Namespace,
    process: Process,
) -> None:
    """This process's targets, at every checkpoint."""
    traker = make_traker(images, options, process)
    for model_id, checkpoint in enumerate(checkpoints):
        traker.start_scoring_checkpoint(targets.name, checkpoint, model_id=model_id, num_targets=len(targets))
        rows = load_store(options.out / "features").rows(model_id, targets.name)
        todo = missing(rows.missing(), process.share(len(targets)))
        with _rows_bar(f"Targets, checkpoint {model_id}", todo, process) as shown:
            for batch, numbers in batches(targets, todo, options):
                traker.score(batch, inds=numbers)
                shown.update(len(numbers))
    del traker  # writes the last rows, as above
    process.wait()


def _rows_bar(label: str, ranges: list[tuple[int, int]], process: Process):
    total = sum(stop - start for start, stop in ranges)
    return bar(total, label, enabled=_shown(process))


def _shown(process: Process) -> bool | None:
    """One process's progress stands for all."""
    return None if process.rank == 0 else False


def draw_targets(images: ImageFolder, count: int, seed: int) -> Targets:
    """Random images, in the folder's order."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(images), generator=generator)[:count]
    return Targets(images, tuple(rows.sort().values.tolist()))


def refuse_other_images(images: ImageFolder, folder: Path) -> None:
    """That features in the output folder are of these images: file names and sizes tell.

    Raises:
        SystemExit: they are of others.
    """
    file = folder / "images.json"
    names = [str(path.relative_to(images.folder)) for path, _ in images.files]
    asked = {"rows": len(images), "size": images.size, "files": digest(names)}
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asked))
    stored = json.loads(file.read_text())
    if stored != asked:
        raise SystemExit(f"{folder} has features of other images ({stored}; now {asked}): pass another --out")


def digest(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def report(
    attribution: trak.Attribution, images: ImageFolder, targets: Targets, options: argparse.Namespace
) -> dict[str, Any]:
    """The strongest training images of each target, and how many are of its class."""
    top, bottom = attribution.top(options.top), attribution.bottom(options.top)

    def named(ranking: trak.Ranking, target: int) -> list[dict[str, Any]]:
        return [
            {
                "row": row,
                "class": images.classes[images.files[row][1]],
                "file": str(images.files[row][0].relative_to(images.folder)),
                "score": value,
            }
            for row, value in zip(ranking.rows[target].tolist(), ranking.scores[target].tolist())
        ]

    found = []
    for number, row in enumerate(targets.rows):
        path, label = targets.images.files[row]
        found.append(
            {
                "target": str(path.relative_to(targets.images.folder)),
                "class": targets.images.classes[label],
                "f": float(attribution.outputs[number]),
                "raise": named(top, number),
                "lower": named(bottom, number),
            }
        )
    agreement = trak.evaluation.class_agreement(
        attribution.scores,
        torch.tensor([label for _, label in images.files]),
        torch.tensor([targets.images.files[row][1] for row in targets.rows]),
        k=options.top,
    )
    return {
        "num_train": len(images),
        "num_targets": len(targets),
        "num_checkpoints": attribution.info["num_checkpoints"],
        "size": images.size,
        "projection": attribution.info["projection"],
        "class_agreement": str(agreement),
        "targets": found,
    }


def draw(result: dict[str, Any], images: ImageFolder, targets: Targets, file: Path, rows: int = 8) -> None:
    """Some targets, each beside the training images that raise its output most and lower it most."""
    from matplotlib.figure import Figure

    shown = result["targets"][: min(rows, len(targets))]
    columns = 1 + len(shown[0]["raise"]) + min(2, len(shown[0]["lower"]))
    figure = Figure(figsize=(1.15 * columns, 1.35 * len(shown)), layout="constrained")
    grid = figure.subplots(len(shown), columns, squeeze=False)
    for number, (found, line) in enumerate(zip(shown, grid)):
        pictures = [(targets.images.picture(targets.rows[number]), found["class"], "black")]
        pictures += [(images.picture(one["row"]), one["class"], "#1a7f37") for one in found["raise"]]
        pictures += [(images.picture(one["row"]), one["class"], "#c8102e") for one in found["lower"][:2]]
        for axes, (picture, name, colour) in zip(line, pictures):
            axes.imshow(picture)
            axes.set_title(name, fontsize=7, color=colour)
            axes.axis("off")
    grid[0][0].text(0, 1.35, "target", transform=grid[0][0].transAxes, fontsize=8)
    grid[0][1].text(0, 1.35, "raise its output", transform=grid[0][1].transAxes, fontsize=8)
    grid[0][-2].text(0, 1.35, "lower it", transform=grid[0][-2].transAxes, fontsize=8)
    figure.savefig(file, dpi=110)


def print_table(result: dict[str, Any], most: int = 8) -> None:
    for found in result["targets"][:most]:
        print(f"\n{found['target']} ({found['class']}), f = {found['f']:.2f}")
        for name in ("raise", "lower"):
            line = ", ".join(f"{one['file']} {one['score']:+.3g}" for one in found[name][:4])
            print(f"  {name:5} {line}")
    print(f"\n{result['class_agreement']}")


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("imagenet-report"), help="folder of everything that is written")
    add("--train", type=Path, help="training images, a folder for each class [OUT/sample/train]")
    add("--val", type=Path, help="images to explain, likewise [OUT/sample/val]")
    add("--make-sample", choices=("fashion", "cifar10"), help="first write OUT/sample, of small images")
    add("--data", type=Path, default=Path("../shared/data"), help="folder with cifar10_*_jpeg.npz")
    add("--sample-size", type=int, default=400, help="training images of the sample [%(default)s]")
    add("--size", type=int, default=224, help="pixels of a side that the model gets [%(default)s]")
    add("--every", type=int, default=1, help="only every so many-th training image")
    add("--checkpoints", type=Path, nargs="+", help="state dicts: .pt, .pth, .safetensors")
    add("--models", type=int, default=2, help="without --checkpoints: how many to train [%(default)s]")
    add("--epochs", type=int, default=16, help="of training [%(default)s]")
    add("--rate", type=float, default=0.1, help="largest learning rate of training [%(default)s]")
    add("--width", type=int, default=64, help="channels of the first stage [%(default)s]")
    add("--dim", type=int, help="features, K [the library's default]")
    add("--targets", type=int, default=50, help="random images of --val [%(default)s]")
    add("--seed", type=int, default=0, help="of their choice")
    add("--top", type=int, default=5, help="training images to name for each target [%(default)s]")
    add("--batch-size", type=int, default=64)
    add("--workers", type=int, default=0, help="processes that read images, for each process [%(default)s]")
    add("--device", help="cuda, cpu, … [a GPU for each process where there are some]")
    add("--quick", action="store_true", help="a Fashion-MNIST sample, 32 pixels, a quarter of the width")
    options = parser.parse_args(arguments)
    if options.quick:
        options.make_sample = options.make_sample or "fashion"
        options.size, options.width, options.batch_size = 32, 16, 32
        options.epochs, options.targets, options.dim = 12, 20, 1024
    if options.train is None and options.make_sample is None:
        parser.error("say which images: --train and --val, or --make-sample, or --quick")
    if (options.train is None) != (options.val is None):
        parser.error("--train and --val go together")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_options(arguments)
    start = time.perf_counter()
    with processes(options.device) as process:
        sample = options.out / "sample"
        if options.train is None:
            if process.rank == 0 and not (sample / "train").is_dir():
                part = options.out / "sample.part"
                make_sample(
                    options.make_sample, part, data=options.data, num_train=options.sample_size, num_val=100
                )
                part.replace(sample)
            process.wait()
        images = ImageFolder(options.train or sample / "train", options.size, options.every)
        candidates = ImageFolder(options.val or sample / "val", options.size)
        if candidates.classes != images.classes:
            raise SystemExit("--train and --val have other classes: their folders must have the same names")
        if process.rank == 0:
            refuse_other_images(images, options.out)
        process.wait()
        targets = draw_targets(candidates, options.targets, options.seed)
        checkpoints = options.checkpoints or train_models(images, options, process)
        featurize(images, checkpoints, options, process)
        score(images, targets, checkpoints, options, process)
        if process.rank == 0:
            traker = make_traker(images, options, process)
            attribution = traker.attribution(targets.name, model_ids=range(len(checkpoints)))
            result = report(attribution, images, targets, options)
            result |= {"processes": process.world, "seconds": time.perf_counter() - start}
            (options.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
            draw(result, images, targets, options.out / "proponents.png")
            print_table(result)
            print(f"\nWrote {options.out / 'result.json'} and {options.out / 'proponents.png'}")
        process.wait()


if __name__ == "__main__":
    main()
