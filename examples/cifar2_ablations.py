"""What TRAK's quality depends on, on CIFAR-2: ensemble size, projection dimension, epoch of the checkpoint, checkpoints of one run.

    python examples/cifar2_ablations.py --data ../shared --out cifar2-ablations
    python examples/cifar2_ablations.py --data ../shared --out cifar2-quick --quick     # last layers, few points

Linear datamodeling scores of a ResNet-9 on a bank of 50 retrained models and 1,000 targets (see examples/cifar2.py), for this library's
default weights, Gram matrix and damping, and for the paper's formula without damping. Features and finished points are kept in the
output folder: the same command goes on where it was stopped. Ends with result.json, tables and ablations.png.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar2 import Bank, ResNet9, load_bank
from experiment_page import ASSETS, record, table

import trak
from trak.frontier.clock import machine_facts
from trak.progress import bar

FORMULAS: dict[str, dict[str, Any]] = {
    "default": {},
    # "No damping" is 1e-6 of the mean eigenvalue: it keeps the solution out of rounding errors and changes nothing else.
    "paper": {"gram": "uniform", "weight_exponent": 1.0, "damping": trak.RelativeDamping(1e-6)},
}
COLOURS = {"default": "#c8102e", "paper": "#2a83c9"}
LABELS = {"default": "default weights and damping", "paper": "as in the paper, no damping"}
LAST = 24


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        dim: K of all but the curves over K.
        dims: K of these curves.
        sizes: ensemble sizes M: seeds 0 to M − 1; of size 1, the mean over seeds 0, 1 and 2.
        dim_sizes: ensemble sizes of the curves over K, of seeds 0, 1, ….
        seeds: runs whose epochs are compared.
        epochs: of these; the last 1, 2 and 4 of them are ensembles of one run, too.
        num_targets: the first so many of the bank's 1,000; None for all.
        parameters: patterns; None for all.
    """

    dim: int = 4096
    dims: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    sizes: tuple[int, ...] = (1, 3, 5, 10)
    dim_sizes: tuple[int, ...] = (1, 3)
    seeds: tuple[int, ...] = (0, 1)
    epochs: tuple[int, ...] = (4, 8, 16, LAST)
    num_targets: int | None = None
    parameters: tuple[str, ...] | None = None


QUICK = Plan(
    dim=256,
    dims=(64, 256),
    sizes=(1, 2),
    dim_sizes=(1,),
    seeds=(0,),
    epochs=(8, LAST),
    num_targets=100,
    parameters=("narrow.*", "head.*"),
)


@dataclass(frozen=True)
class Point:
    """A mark of a curve.

    Attributes:
        curve: "ensemble", "dimension M = …", "epoch M = …" or "same run, R runs".
        x: its place there.
        dim: K.
        formula: of FORMULAS.
        ensembles: each a list of (seed, epoch); the LDS is the mean over them.
    """

    curve: str
    x: int
    dim: int
    formula: str
    ensembles: tuple[tuple[tuple[int, int], ...], ...]


def points(plan: Plan) -> Iterator[Point]:
    """All points, those that need the fewest features first."""
    for formula in FORMULAS:
        for size in plan.sizes:
            groups = [range(seed, seed + 1) for seed in range(3)] if size == 1 else [range(size)]
            yield Point("ensemble", size, plan.dim, formula, tuple(_finals(group) for group in groups))
    for formula in FORMULAS:
        for epoch in plan.epochs:
            alone = tuple(((seed, epoch),) for seed in plan.seeds)
            yield Point("epoch M = 1", epoch, plan.dim, formula, alone)
            if len(plan.seeds) > 1:
                together = tuple((seed, epoch) for seed in plan.seeds)
                yield Point(f"epoch M = {len(plan.seeds)}", epoch, plan.dim, formula, (together,))
        for count in (size for size in (1, 2, 4) if size <= len(plan.epochs)):
            runs = [tuple((seed, epoch) for epoch in plan.epochs[-count:]) for seed in plan.seeds]
            yield Point("same run, 1 run", count, plan.dim, formula, tuple(runs))
            if len(runs) > 1:
                yield Point(f"same run, {len(runs)} runs", count, plan.dim, formula, (sum(runs, ()),))
    for dim in plan.dims:
        for size in plan.dim_sizes:
            for formula in FORMULAS:
                yield Point(f"dimension M = {size}", dim, dim, formula, (_finals(range(size)),))


def _finals(seeds: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple((seed, LAST) for seed in seeds)


@dataclass(frozen=True, eq=False)
class Measurements:
    """LDS of ensembles, each measured once.

    Attributes:
        bank: the ground truth.
        plan: what is measured.
        folder: where results and features are kept.
        features: a save_dir that has features of final checkpoints at the plan's K; None for one in `folder`.
    """

    bank: Bank
    plan: Plan
    folder: Path
    features: Path | None = None

    def lds(self, point: Point, ensemble: tuple[tuple[int, int], ...]) -> dict[str, float]:
        """One ensemble's LDS with its interval, from the folder where it is there."""
        place = self._features(point)
        asked = [point.dim, point.formula, ensemble, place.name, self.plan.num_targets, self.plan.parameters]
        digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
        file = self.folder / "ensembles" / f"{digest}.json"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.with_suffix(".part").write_text(json.dumps(self._measure(point, ensemble, place)))
            file.with_suffix(".part").replace(file)
        return json.loads(file.read_text())

    def _features(self, point: Point) -> Path:
        # The projection is drawn by a checkpoint's number in its folder: runs have their own, whatever else was featurized before.
        if point.curve.startswith(("epoch", "same run")):
            return self.folder / f"features-{point.dim}-runs"
        if self.features is not None and point.dim == self.plan.dim:
            return self.features
        return self.folder / f"features-{point.dim}"

    def _measure(
        self, point: Point, ensemble: tuple[tuple[int, int], ...], save_dir: Path
    ) -> dict[str, float]:
        checkpoints, parameters = self.bank.checkpoints[0].parent, self.plan.parameters
        attribution = trak.attribute(
            ResNet9(),
            self.bank.train_set,
            self.bank.targets,
            task="image_classification",
            checkpoints=[
                checkpoints / f"seed{seed:02d}_epoch{epoch:02d}.safetensors" for seed, epoch in ensemble
            ],
            projection=trak.Sparse(dim=point.dim),
            parameters=None if parameters is None else list(parameters),
            save_dir=save_dir,
            batch_size=100,
            **FORMULAS[point.formula],
        )
        found = trak.evaluation.lds(attribution.scores, self.bank.masks, self.bank.margins)
        return {"lds": found.mean, "low": found.low, "high": found.high}


def measure_all(measurements: Measurements) -> list[dict[str, Any]]:
    """Every point: mean LDS over its ensembles, and mean of their intervals, which share the bank's noise."""
    todo, results = list(points(measurements.plan)), []
    with bar(len(todo), "Measuring", unit="points") as shown:
        for point in todo:
            found = [measurements.lds(point, ensemble) for ensemble in point.ensembles]
            means = {name: float(np.mean([one[name] for one in found])) for name in ("lds", "low", "high")}
            results.append(asdict(point) | means | {"each": [one["lds"] for one in found]})
            shown.update(1)
    return results


def curve(result: dict[str, Any], name: str, formula: str) -> list[dict[str, Any]]:
    """The points of one curve, in order."""
    found = [one for one in result["points"] if one["curve"] == name and one["formula"] == formula]
    return sorted(found, key=lambda one: one["x"])


def curves(result: dict[str, Any], start: str) -> list[str]:
    """Names of the curves that begin so, in order."""
    return sorted({one["curve"] for one in result["points"] if one["curve"].startswith(start)})


PANELS = (
    ("ensemble", "checkpoints of independent runs, M", "ensemble size"),
    ("dimension", "features, K", "projection dimension"),
    ("epoch", "epoch of the checkpoint", "epoch, of 24"),
    ("same run", "last checkpoints of a run", "checkpoints of the same run"),
)


def draw(result: dict[str, Any], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    for axes, (start, label, title) in zip(figure.subplots(2, 2, sharey=True).flat, PANELS):
        for name, style in zip(curves(result, start), ("-", "--")):
            for formula, colour in COLOURS.items():
                marks = curve(result, name, formula)
                x = [one["x"] for one in marks]
                words = "; ".join(filter(None, (LABELS[formula], name.removeprefix(start).strip(" ,"))))
                axes.plot(x, [one["lds"] for one in marks], style, marker="o", color=colour, label=words)
                axes.fill_between(
                    x,
                    [one["low"] for one in marks],
                    [one["high"] for one in marks],
                    color=colour,
                    alpha=0.08,
                    linewidth=0,
                )
                if start in ("ensemble", "dimension"):
                    axes.set_xscale("log")
                axes.set_xticks(x, [str(one) for one in x])
                axes.minorticks_off()
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(label, fontsize=9)
        axes.set_ylabel("LDS", fontsize=9)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7)
    figure.savefig(file, dpi=120)


def section(result: dict[str, Any]) -> str:
    """Figure, facts and tables of a result, for the page."""
    machine = result["machine"]
    parts = [
        "![LDS of TRAK against ensemble size, projection dimension, epoch and checkpoints of a run](../assets/experiments-cifar-ablations.png)",
        f"{result['num_subsets']} subsets with a model each, {result['num_targets']:,} targets; K = {result['plan']['dim']:,} unless said. "
        "Where a row has several ensembles, LDS and interval are means over them; intervals are 95% bootstraps over subsets and targets. 1 thread of "
        f"{machine['processor']}, torch {machine['torch']}, trak {machine['trak']}, {machine['date']}.",
    ]
    for start, label, title in PANELS:
        rows = []
        for name in curves(result, start):
            marks = {formula: curve(result, name, formula) for formula in FORMULAS}
            for default, paper in zip(*marks.values()):
                words = name.removeprefix(start).strip(" ,")
                cells = [
                    f"{one['lds']:.3f} [{one['low']:.3f}, {one['high']:.3f}]" for one in (default, paper)
                ]
                rows.append(
                    [*([words] if words else []), str(default["x"]), str(len(default["ensembles"])), *cells]
                )
        header = [label, "ensembles", *LABELS.values()]
        if rows and len(rows[0]) > len(header):
            header = ["", *header]
        parts.append(f"**{title[0].upper()}{title[1:]}**\n\n{table(header, rows)}")
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=Path("../shared"), help="folder with data/ and banks/cifar2/")
    add("--out", type=Path, default=Path("cifar2-ablations"), help="folder of everything that is written")
    add("--features", type=Path, help="save_dir that has features of the final checkpoints at K = 4,096")
    for name, words in (
        ("dims", "K of the curves over K"),
        ("sizes", "ensemble sizes"),
        ("dim-sizes", "ensemble sizes of the curves over K"),
        ("seeds", "runs whose epochs are compared"),
    ):
        add(f"--{name}", type=int, nargs="+", help=words)
    add("--targets", dest="num_targets", type=int, help="only the first so many")
    add("--quick", action="store_true", help="last layers, few points and targets; proves nothing")
    add("--page", action="store_true", help="record the result in benchmarks/results and docs/experiments")
    options = parser.parse_args(arguments)
    if not (options.data / "banks" / "cifar2").is_dir():
        raise SystemExit(f"{options.data} has no folder banks/cifar2: pass --data FOLDER")

    names = ("dims", "sizes", "dim_sizes", "seeds", "num_targets")
    changes = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    changes = {name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()}
    plan = replace(QUICK if options.quick else Plan(), **changes)
    torch.set_num_threads(1)
    bank = load_bank(options.data, plan.num_targets)
    result = {
        "plan": asdict(plan),
        "machine": machine_facts(),
        "num_subsets": len(bank.masks),
        "num_targets": bank.margins.shape[1],
        "points": measure_all(Measurements(bank, plan, options.out, options.features)),
    }
    (options.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, options.out / "ablations.png")
    print(section(result))
    if options.page:
        draw(result, ASSETS / "experiments-cifar-ablations.png")
        record("cifar", "cifar", result, section(result))


if __name__ == "__main__":
    main()
