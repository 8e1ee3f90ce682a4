"""How few training images carry a prediction? The smallest removal that flips it, found by several methods and checked by retraining.

    python examples/brittleness.py --data ../shared --out brittleness-report
    python examples/brittleness.py --data ../shared --out brittleness-quick --quick     # about two minutes

For each of some test images, every method ranks the training images that support its prediction. The first k of them are removed for
k = 10, 20, …, 320, by bisection, and networks are trained from scratch on the rest; the k found is tried again with fresh seeds. Cats and
dogs of CIFAR-10 at 16 × 16 pixels, 1,000 training images. Every trained network's outputs are kept in the output folder: the same command
goes on where it was stopped. Ends with result.json, a table and brittleness.png.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from brittleness_models import Images, Network, Recipe, load_images, logit_gap, train, weights
from experiment_page import ASSETS, number, record, table
from safetensors.torch import load_file, save_file
from torch import Tensor

import trak
from trak.evaluation import BrittlenessResult, brittleness, percentile_interval
from trak.frontier.clock import machine_facts
from trak.progress import bar

LABELS = {
    "trak": "TRAK",
    "tracin": "TracIn",
    "gradient-cosine": "Gradient cosine",
    "representation": "Representation cosine, same class",
    "random": "Random, same class",
}
COLOURS = {
    "trak": "#c8102e",
    "tracin": "#2a83c9",
    "gradient-cosine": "#3d9970",
    "representation": "#b8860b",
    "random": "#888888",
}
POOL = 64
"""Test images whose predictions every retrained network gives: `--targets` of them are examined."""
CHECKPOINT_SEED = 1000
"""First seed of the networks that are attributed: far from those of retraining."""


@dataclass(frozen=True)
class Settings:
    """What the experiment depends on, besides the data.

    Attributes:
        num_train: training images.
        num_checkpoints: networks, trained on all of them, that methods attribute through.
        num_targets: test images.
        num_seeds: networks for each removal, whose mean logit gap decides; and as many with fresh seeds to verify.
        k: numbers of removed images.
        seed: of the choice of images.
        recipe: of training.
    """

    num_train: int = 1000
    num_checkpoints: int = 10
    num_targets: int = 16
    num_seeds: int = 1
    k: tuple[int, ...] = (10, 20, 40, 80, 160, 320)
    seed: int = 0
    recipe: Recipe = field(default_factory=Recipe)

    @property
    def trajectory(self) -> tuple[int, ...]:
        """Epochs whose weights are kept, for TracIn: evenly spaced, the rate above 0 at all of them."""
        epochs = self.recipe.epochs
        return tuple(sorted({min(max(1, round(epochs * share)), epochs - 1) for share in (0.3, 0.5, 0.8)}))


QUICK = Settings(num_train=500, num_checkpoints=2, num_targets=4, k=(10, 40, 160), recipe=Recipe(epochs=4))


@dataclass(frozen=True, eq=False)
class Problem:
    """Training images, the predictions to explain, and the networks that made them.

    Attributes:
        train_set: images [N, 3, H, W] and labels [N].
        targets: images [POOL, 3, H, W] and the classes that the networks on average predict, [POOL].
        correct: whether these are right, [POOL].
        checkpoints: weights of each network at the end.
        trajectories: for each network its weights along training.
        accuracy: mean accuracy of the networks on all test images.
    """

    train_set: tuple[Tensor, Tensor]
    targets: tuple[Tensor, Tensor]
    correct: Tensor
    checkpoints: list[Path]
    trajectories: list[list[Path]]
    accuracy: float


def make_problem(images: Images, settings: Settings, folder: Path) -> Problem:
    """Train the networks that are not in the folder yet, and draw the targets."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"seed{CHECKPOINT_SEED + index}" for index in range(settings.num_checkpoints)]
    with bar(len(paths), "Training", unit="networks") as shown:
        for index, path in enumerate(paths):
            # Weights from along training are written first: final ones that are there are not the last that are missing.
            if not (path / "final.safetensors").exists():
                network, kept = train(
                    *images.train, settings.recipe, CHECKPOINT_SEED + index, settings.trajectory
                )
                path.mkdir(exist_ok=True)
                for epoch, state in kept.items():
                    save_file(state, path / f"epoch{epoch:02d}.safetensors")
                save_file(weights(network), path / "final.safetensors")
            shown.update(1)
    test_images, test_labels = images.test
    gaps = torch.stack([logit_gap(_network(path / "final.safetensors"), test_images) for path in paths])
    predicted = (gaps.mean(0) >= 0).long()
    pool = torch.randperm(len(test_labels), generator=torch.Generator().manual_seed(settings.seed))[:POOL]
    return Problem(
        images.train,
        (test_images[pool], predicted[pool]),
        predicted[pool] == test_labels[pool],
        [path / "final.safetensors" for path in paths],
        [[path / f"epoch{epoch:02d}.safetensors" for epoch in settings.trajectory] for path in paths],
        float(((gaps >= 0).long() == test_labels).double().mean()),
    )


def _network(path: Path) -> Network:
    network = Network().eval()
    network.load_state_dict(load_file(path))
    return network


def score(method: str, problem: Problem, settings: Settings) -> np.ndarray:
    """Scores [N, POOL] of one method: highest for the images that its prediction is said to rest on."""
    labels, classes = problem.train_set[1], problem.targets[1]
    same_class = labels[:, None] == classes[None, :]
    if method == "random":
        # One order for all targets: they share the networks that are trained.
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(settings.seed + 1))
        scores = order.double()[:, None] + same_class * float(len(labels))
        return scores.numpy()
    common: dict[str, Any] = {"model": Network(), "task": "image_classification"}
    sources: list[Any] = problem.checkpoints
    if method == "trak":
        attributor: Any = trak.TRAK(**common, projection=trak.Sparse(4096))  # random columns, as in the paper
    elif method == "tracin":
        # The mean over networks of a sum along training.
        sources = [path for trajectory in problem.trajectories for path in trajectory]
        rates = [settings.recipe.rate(epoch / settings.recipe.epochs) for epoch in settings.trajectory]
        attributor = trak.TracIn(**common, learning_rates=rates * len(problem.trajectories))
    elif method == "gradient-cosine":
        attributor = trak.GradientSimilarity(**common)
    else:
        attributor = trak.RepresentationSimilarity(**common, similarity="cosine")
    scores = np.asarray(attributor.fit(problem.train_set, sources).attribute(problem.targets).scores)
    if method == "representation":
        # Representations know nothing of labels: an image of the other class does not support a prediction however alike it is.
        scores = np.where(same_class.numpy(), scores, scores - 4.0)
    return scores


def scores_of(methods: Sequence[str], problem: Problem, settings: Settings, folder: Path) -> dict:
    """(scores, seconds) by method, from the folder where they are there."""
    found = {}
    with bar(len(methods), "Scoring", unit="methods") as shown:
        for method in methods:
            file = folder / f"scores-{method}.npz"
            if not file.exists():
                start = time.process_time()
                scores = score(method, problem, settings)
                np.savez(file.with_suffix(".part.npz"), scores=scores, seconds=time.process_time() - start)
                file.with_suffix(".part.npz").replace(file)
            kept = np.load(file)
            found[method] = kept["scores"], float(kept["seconds"])
            shown.update(1)
    return found


def retrainer(problem: Problem, recipe: Recipe) -> Callable[[Tensor, int], Tensor]:
    """(rows, seed) -> for each target of the pool the logit of the class that was predicted minus the other, [POOL]."""
    (images, labels), (targets, classes) = problem.train_set, problem.targets

    def margins(rows: Tensor, seed: int) -> Tensor:
        network, _ = train(images[rows], labels[rows], recipe, seed)
        return logit_gap(network, targets) * (2 * classes - 1)

    return margins


def search(problem: Problem, scores: dict, settings: Settings, folder: Path) -> dict[str, list[dict]]:
    """For every method and target the smallest removal that flips, target by target, so that a part of a run is of use."""
    retrain = retrainer(problem, settings.recipe)
    found: dict[str, list[dict]] = {method: [] for method in scores}
    with bar(settings.num_targets * len(scores), "Removing", unit="searches") as shown:
        for target in range(settings.num_targets):
            for method, (scores_NT, _) in scores.items():
                result: BrittlenessResult = brittleness(
                    retrain,
                    scores_NT,
                    targets=[target],
                    k=settings.k,
                    num_seeds=settings.num_seeds,
                    folder=folder / "retrainings",
                    version=json.dumps(asdict(settings.recipe)),
                    progress=False,
                )
                (flip,) = result.flips
                found[method].append(asdict(flip) | {"correct": bool(problem.correct[target])})
                shown.update(1)
    return found


def summarize(flips: list[dict], k: Sequence[int], seed: int) -> dict[str, Any]:
    """Shares of the predictions that flip by each k, with 95% bootstrap intervals over targets; the median k."""
    needed = np.array([np.inf if flip["num_removed"] is None else flip["num_removed"] for flip in flips])
    needed = needed[needed != 0]
    if not len(needed):
        raise SystemExit(
            "fresh networks predict every target otherwise before anything is removed: take more --targets, or more --seeds"
        )
    drawn = np.random.default_rng(seed).integers(len(needed), size=(2000, len(needed)))
    shares = {}
    for number_removed in k:
        samples = (needed[drawn] <= number_removed).mean(1)
        interval = percentile_interval(samples)
        shares[str(number_removed)] = [
            float((needed <= number_removed).mean()),
            interval.low,
            interval.high,
        ]
    median = float(np.median(needed))
    return {
        "targets": len(needed),
        "shares": shares,
        "median": None if np.isinf(median) else median,
        "verified": [
            sum(flip["verified"] is True for flip in flips),
            sum(flip["verified"] is not None for flip in flips),
        ],
    }


def draw(result: dict[str, Any], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.8, 4.0), layout="constrained")
    axes = figure.subplots()
    for method, found in result["methods"].items():
        shares = np.array([found["shares"][str(k)] for k in result["settings"]["k"]])
        axes.plot(
            result["settings"]["k"], shares[:, 0], marker="o", color=COLOURS[method], label=LABELS[method]
        )
        axes.fill_between(
            result["settings"]["k"],
            shares[:, 1],
            shares[:, 2],
            color=COLOURS[method],
            alpha=0.10,
            linewidth=0,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(result["settings"]["k"], [str(k) for k in result["settings"]["k"]])
    axes.set_ylim(0, 1)
    axes.set_xlabel(f"removed training images, of {result['settings']['num_train']:,}")
    axes.set_ylabel("share of predictions that flip")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(result["methods"]), frameon=False, fontsize=8)
    figure.savefig(file, dpi=130)


def against(first: list[dict], second: list[dict]) -> list[int]:
    """For how many targets `first` needs fewer removals than `second`, as many, more; "not at all" is more than any number."""

    def needed(flip: dict) -> float:
        return np.inf if flip["num_removed"] is None else flip["num_removed"]

    pairs = [(needed(one), needed(other)) for one, other in zip(first, second) if needed(one) != 0]
    return [
        sum(one < other for one, other in pairs),
        sum(one == other for one, other in pairs),
        sum(one > other for one, other in pairs),
    ]


def section(result: dict[str, Any]) -> str:
    """Figure, facts and table of a result, for the page."""
    settings, machine = result["settings"], result["machine"]
    standing = next(iter(result["methods"].values()))["targets"]
    facts = (
        f"{settings['num_train']:,} training images, {settings['num_targets']} targets, of which {standing} stand; {settings['num_checkpoints']} "
        f"attributed networks "
        f"(mean accuracy {result['accuracy']:.2f}); networks for each removal: {settings['num_seeds']}, and as many to verify; seed "
        f"{settings['seed']}. {result['networks']:,} networks of {result['seconds_per_network']:.1f} s each, 1 thread of "
        f"{machine['processor']}, torch {machine['torch']}, trak {machine['trak']}, {machine['date']}; processor seconds. In brackets: 95% "
        "bootstrap intervals over targets. *Fewer, equal, more*: for how many targets TRAK needs fewer removals than the method, as many, more."
    )
    rows = []
    for method, found in result["methods"].items():
        median = f"over {settings['k'][-1]}" if found["median"] is None else f"{found['median']:g}"
        cells = [LABELS[method], median]
        for share, low, high in found["shares"].values():
            cells.append(f"{number(share)} [{number(low)}, {number(high)}]")
        cells.append(
            "–"
            if method == "trak" or "trak" not in result["methods"]
            else ", ".join(map(str, against(result["methods"]["trak"]["flips"], found["flips"])))
        )
        rows.append([*cells, f"{found['verified'][0]} of {found['verified'][1]}", f"{found['seconds']:.0f}"])
    header = [
        "method",
        "median k",
        *(f"k = {k}" for k in settings["k"]),
        "TRAK fewer, equal, more",
        "verified",
        "scoring, s",
    ]
    picture = "![Share of predictions that flip against the number of removed images](../assets/experiments-brittleness.png)"
    return f"{picture}\n\n{facts}\n\n{table(header, rows)}"


def run(images: Images, settings: Settings, methods: Sequence[str], folder: Path) -> dict[str, Any]:
    """The experiment: its result, which is also in result.json and brittleness.png in the folder."""
    problem = make_problem(images, settings, folder / "checkpoints")
    scores = scores_of(methods, problem, settings, folder)
    found = search(problem, scores, settings, folder)
    start = time.process_time()
    train(*problem.train_set, settings.recipe, seed=0)
    seconds = time.process_time() - start
    result = {
        "settings": asdict(settings),
        "machine": machine_facts(),
        "accuracy": problem.accuracy,
        "networks": len(list((folder / "retrainings").glob("rows-*"))) + settings.num_checkpoints,
        "seconds_per_network": seconds,
        "methods": {
            method: summarize(found[method], settings.k, settings.seed)
            | {"seconds": scores[method][1], "flips": found[method]}
            for method in methods
        },
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, folder / "brittleness.png")
    return result


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=Path("../shared"), help="folder with data/cifar10_*_jpeg.npz")
    add("--out", type=Path, default=Path("brittleness-report"), help="folder of everything that is written")
    add("--targets", type=int, help=f"test images to examine, at most {POOL}")
    add("--seeds", type=int, help="networks for each removal")
    add("--methods", nargs="+", choices=list(LABELS), default=list(LABELS))
    add("--quick", action="store_true", help="smaller, in about two minutes; proves nothing")
    add("--page", action="store_true", help="record the result in benchmarks/results and docs/experiments")
    options = parser.parse_args(arguments)
    if options.targets is not None and not 1 <= options.targets <= POOL:
        parser.error(f"--targets must be from 1 to {POOL}, got {options.targets}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_options(arguments)
    settings = QUICK if options.quick else Settings()
    changes = {"num_targets": options.targets, "num_seeds": options.seeds}
    settings = replace(settings, **{name: value for name, value in changes.items() if value is not None})
    if not (options.data / "data").is_dir():
        raise SystemExit(f"{options.data} has no folder data with cifar10_train_jpeg.npz: pass --data FOLDER")
    torch.set_num_threads(1)
    images = load_images(options.data / "data", settings.num_train, settings.seed, kept=options.out)
    result = run(images, settings, options.methods, options.out)
    print(section(result))
    if options.page:
        draw(result, ASSETS / "experiments-brittleness.png")
        record("brittleness", "brittleness", result, section(result))


if __name__ == "__main__":
    main()
