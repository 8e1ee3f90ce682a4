"""What `clip_flickr.py` found, as numbers, tables, figures and a page: all from the values in result.json.

Legend: C control models, R models without rows, t chosen targets, S bootstrap resamples.
"""

from __future__ import annotations

import csv
import io
import json
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks" / "results" / "experiments-clip.json"
PAGE = ROOT / "docs" / "experiments" / "clip.md"
ASSETS = ROOT / "docs" / "assets"
COLOURS = {"TRAK": "#2a83c9", "TracIn": "#d9691f", "CLIP similarity": "#1a9a78", "random": "#8a8a8a"}

Floats = NDArray[np.float64]
Result = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Fall:
    """How far the targets' alignment fell without some pairs.

    Attributes:
        method: who chose the pairs.
        k: how many.
        value: mean alignment (or excess) of the targets without them.
        fall: 1 − value / that of the controls; with `low` and `high`, its 95% bootstrap interval.
        less_than_trak: fall of TRAK minus this one, with its interval; None for TRAK itself.
    """

    method: str
    k: int
    value: float
    fall: float
    low: float
    high: float
    less_than_trak: tuple[float, float, float] | None


def falls(measured: Result, num_bootstrap: int = 2000, seed: int = 0) -> list[Fall]:
    """Every method's fall at every k, of result["alignment"] or result["excess"].

    Percentile bootstrap of the ratio of means. Targets are resampled for all methods together, so that differences are
    of the same targets; the models of each set of pairs, and the controls, apart.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    base_Ct = np.array(measured["controls"])
    counts_St = _counts(generator, base_Ct.shape[1], num_bootstrap)
    base_S = _resample(generator, base_Ct, counts_St)
    found = []
    for k, methods in measured["without"].items():
        without = {name: np.array(values) for name, values in methods.items()}
        samples = {name: 1 - _resample(generator, rows, counts_St) / base_S for name, rows in without.items()}
        values = {name: float(1 - rows.mean() / base_Ct.mean()) for name, rows in without.items()}
        for name, rows_Rt in without.items():
            low, high = np.quantile(samples[name], (0.025, 0.975))
            less = None
            if name != "TRAK":
                ends = np.quantile(samples["TRAK"] - samples[name], (0.025, 0.975))
                less = (values["TRAK"] - values[name], float(ends[0]), float(ends[1]))
            mean = float(rows_Rt.mean())
            found.append(Fall(method=name, k=int(k), value=mean, fall=values[name], low=float(low),
                              high=float(high), less_than_trak=less))  # fmt: skip
    return found


def _counts(generator: np.random.Generator, size: int, num_bootstrap: int) -> Floats:
    """How often each of `size` items is in each resample, [S, size]."""
    return generator.multinomial(size, np.full(size, 1 / size), size=num_bootstrap).astype(np.float64)


def _resample(generator: np.random.Generator, rows_Rt: Floats, counts_St: Floats) -> Floats:
    """Means [S] over resampled models and the given resamples of targets."""
    models_SR = _counts(generator, len(rows_Rt), len(counts_St))
    return ((models_SR @ rows_Rt) * counts_St).sum(1) / rows_Rt.size


def percent(value: float) -> str:
    """A share in whole per cent, with a proper minus."""
    return f"{100 * value:.0f}%".replace("-0%", "0%").replace("-", "−")


def interval(low: float, high: float) -> str:
    return f"{percent(low)} to {percent(high)}"


def markdown_table(result: Result) -> str:
    """A row for each k and method."""
    base = float(np.mean(result["alignment"]["controls"]))
    lines = [
        "| Removed | Chosen by | Alignment | Fall | 95% interval | TRAK's fall is larger by | Fall of the excess |",
        "|---|---|---|---|---|---|---|",
        f"| none | (controls) | {base:.3f} | | | | |",
    ]
    for row, other in zip(falls(result["alignment"]), falls(result["excess"])):
        less = ""
        if row.less_than_trak is not None:
            less = f"{percent(row.less_than_trak[0])} ({interval(*row.less_than_trak[1:])})"
        lines.append(
            f"| {row.k} | {row.method} | {row.value:.3f} | {percent(row.fall)} | {interval(row.low, row.high)} | {less} | "
            f"{percent(other.fall)} ({interval(other.low, other.high)}) |"
        )
    return "\n".join(lines)


def csv_table(result: Result) -> str:
    """The same numbers for other programs."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["measure", "k", "method", "value", "fall", "low", "high"])
    for measure in ("alignment", "excess"):
        for row in falls(result[measure]):
            numbers = (row.value, row.fall, row.low, row.high)
            writer.writerow([measure, row.k, row.method, *(f"{number:.4f}" for number in numbers)])
    return out.getvalue()


def facts(result: Result) -> str:
    """Sizes, seeds and time, in a paragraph."""
    sizes, models, held_out, machine = (result[name] for name in ("sizes", "models", "held_out", "machine"))
    seconds = result["training_cpu_seconds"]
    return (
        f"{sizes['train']:,} training pairs, {sizes['held_out']} held-out pairs, {len(result['targets'])} targets; "
        f"{models['checkpoints']} checkpoints for attribution, {models['controls']} control models, {models['seeds']} models for each set of "
        f"removed pairs, {models['trainings']} trainings in all; {sizes['parameters']:,} attributed parameters. Held-out pairs have a mean "
        f"cosine of {held_out['matched']:.3f} at the checkpoints, other combinations of the same images and texts {held_out['unmatched']:.3f}; the "
        f"own text is among the first ten of {sizes['held_out']} for {percent(held_out['recall_10'])} of the images. A training takes "
        f"{seconds / models['trainings']:.1f} s of processor time on {machine['threads']} thread, all of them {seconds / 60:.0f} minutes. "
        f"torch {machine['torch']}, trak {machine['trak']}, {machine['date']}."
    )


def draw(result: Result, file: Path) -> None:
    """Left: the fall for each method and k. Right: alignment of each target with and without its top pairs, at the largest k."""
    from matplotlib.figure import Figure

    rows = falls(result["alignment"])
    sizes = sorted({row.k for row in rows})
    methods = list(dict.fromkeys(row.method for row in rows))
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    width = 0.8 / len(methods)
    for row in rows:
        place = sizes.index(row.k) + (methods.index(row.method) - (len(methods) - 1) / 2) * width
        label = row.method if row.k == sizes[0] else None
        left.bar(place, 100 * row.fall, 0.92 * width, color=COLOURS[row.method], label=label)
        left.plot([place, place], [100 * row.low, 100 * row.high], color="#333333", linewidth=1.5)
    left.axhline(0, color="#333333", linewidth=0.8)
    left.set_xticks(range(len(sizes)), [f"{k} of {result['sizes']['train']:,} removed" for k in sizes])
    left.set_ylabel("fall of the targets' alignment, %")
    left.legend(frameon=False)
    left.set_title("mean over targets, 95% bootstrap intervals", fontsize=10)

    base_t = np.mean(result["alignment"]["controls"], axis=0)
    for method in methods:
        without_t = np.mean(result["alignment"]["without"][str(sizes[-1])][method], axis=0)
        right.scatter(base_t, without_t, s=18, color=COLOURS[method], alpha=0.85)
    ends = [min(0.0, base_t.min()), base_t.max()]
    right.plot(ends, ends, color="#333333", linewidth=0.8)
    right.set_xlabel("alignment with all pairs")
    right.set_ylabel(f"without {sizes[-1]} pairs")
    right.set_title("one dot per target and method", fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)


def draw_gallery(blocks: list[dict[str, Any]], file: Path) -> None:
    """Each target beside its CLIP neighbours, TRAK's proponents and its opponents.

    Args:
        blocks: for each target {"image": [H, W, 3] uint8, "text": str, "rows": {title: [(image, text), …]}}.
        file: where the picture goes.
    """
    from matplotlib.figure import Figure

    width = 1 + max(len(found) for block in blocks for found in block["rows"].values())
    height = sum(len(block["rows"]) for block in blocks)
    figure = Figure(figsize=(1.55 * width, 1.75 * height))
    grid = figure.subplots(height, width, squeeze=False)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.985, bottom=0.03, hspace=0.6, wspace=0.08)
    for axes in grid.flat:
        axes.axis("off")
    line = 0
    for block in blocks:
        _show(grid[line][0], block["image"], "TARGET: " + block["text"])
        for title, found in block["rows"].items():
            for place, (image, text) in enumerate(found, start=1):
                _show(grid[line][place], image, text)
            grid[line][1].set_title(title, fontsize=8, loc="left", color="#2a83c9", fontweight="bold", pad=3)
            line += 1
    figure.savefig(file, dpi=110)


def _show(axes: Any, image: Any, text: str) -> None:
    axes.imshow(image)
    shown = "\n".join(textwrap.wrap(text, 27)[:3])
    axes.text(
        0.5, -0.05, shown, transform=axes.transAxes, ha="center", va="top", fontsize=5.5, parse_math=False
    )


def section(result: Result) -> str:
    """What stands between the page's markers."""
    picture = "![Fall of the targets' alignment, by method](../assets/experiments-clip-removal.png)"
    return f"{facts(result)}\n\n{markdown_table(result)}\n\n{picture}"


def with_section(page: str, result: Result) -> str:
    """The page with the recorded result between its markers.

    Raises:
        SystemExit: the markers are not there once.
    """
    inside = f"<!-- begin clip -->\n\n{section(result)}\n\n<!-- end clip -->"
    page, count = re.subn(r"<!-- begin clip -->.*?<!-- end clip -->", lambda _: inside, page, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{PAGE} needs the comments <!-- begin clip --> and <!-- end clip --> once each")
    return page


def write_page() -> None:
    """The recorded result on its page, and its figure."""
    result = json.loads(RECORD.read_text(encoding="utf-8"))
    draw(result, ASSETS / "experiments-clip-removal.png")
    PAGE.write_text(with_section(PAGE.read_text(encoding="utf-8"), result), encoding="utf-8")
