"""The figure of `qnli.py`, and its recorded results on their page.

    python examples/qnli.py --out qnli-report --page

writes benchmarks/results/experiments-qnli.json, docs/assets/experiments-qnli-lds.png, and the part of docs/experiments/qnli.md between
its two comments.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiment_page import ASSETS, PAGES, RESULTS, with_section

import trak
from trak.evaluation import Bank

RECORD, PAGE, FIGURE = (
    RESULTS / "experiments-qnli.json",
    PAGES / "qnli.md",
    ASSETS / "experiments-qnli-lds.png",
)
COLOURS = {
    "TRAK": "#d9691f",
    "TRAK, 10 × the damping": "#e8a33d",
    "TRAK, 100 × the damping": "#e6cf5c",
    "gradient cosine": "#2a83c9",
    "gradient dot (TracIn)": "#3b9c6d",
    "representation cosine": "#8a63b5",
}


def cost(result: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[float, float]:
    """Processor seconds of training and of attribution: M models, their features if the method reads gradients, and its scores."""
    each, count = result["processor seconds"], row["checkpoints"]
    features = 0.0 if row["method"].startswith("representation") else each["features of a checkpoint"]
    return count * each["model"], count * features + row["seconds"]


def draw(result: Mapping[str, Any], attribution: trak.Attribution, bank: Bank, file: Path) -> None:
    """Left: LDS against compute. Right: retrained against predicted outputs of the target of median correlation."""
    from finetuning import draw_agreement
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    methods = list(dict.fromkeys(row["method"] for row in result["methods"]))
    for place, method in enumerate(methods):
        apart = 1 + 0.02 * place  # methods that cost the same would hide one another's intervals
        rows = [row for row in result["methods"] if row["method"] == method]
        values = [row["lds"] for row in rows]
        if not rows[0]["checkpoints"]:
            style = ":" if method == "random" else "-."
            left.axhline(values[0], color="#777777", linestyle=style, linewidth=1.2, label=method)
            continue
        errors = [[row["lds"] - row["low"] for row in rows], [row["high"] - row["lds"] for row in rows]]
        left.errorbar(
            [apart * sum(cost(result, row)) for row in rows],
            values,
            yerr=errors,
            marker="o",
            capsize=3,
            color=COLOURS[method],
            label=f"{method}, M = {', '.join(str(row['checkpoints']) for row in rows)}",
        )
    if result["noise ceiling"] is not None:
        left.axhline(
            result["noise ceiling"], color="#333333", linestyle="--", linewidth=1, label="noise ceiling"
        )
    left.set_xscale("log")
    seconds = sorted({round(sum(cost(result, row))) for row in result["methods"] if row["method"] == "TRAK"})
    left.set_xticks([1, *seconds], ["1", *map(str, seconds)])
    left.minorticks_off()
    left.set_xlabel("processor seconds: training and attribution")
    left.set_ylabel(f"LDS over {result['bank']['subsets']} subsets, 95% intervals")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    left.spines[["top", "right"]].set_visible(False)
    draw_agreement(right, attribution, bank)
    figure.savefig(file, dpi=120)


def number(value: float) -> str:
    """Three decimals without the leading zero, as in the other tables."""
    return f"{value:.3f}".replace("0.", ".", 1).replace("-", "−")


def signed(value: float) -> str:
    """Two decimals with a sign."""
    return f"{value:+.2f}".replace("-", "−")


def facts(record: Mapping[str, Any]) -> str:
    """Sizes, seeds, accuracy and times in words."""
    recipe, bank, seconds = record["recipe"], record["bank"], record["processor seconds"]
    accuracy, seeds, ceiling = record["accuracy on the targets"], record["seeds"], record["noise ceiling"]
    words = [
        f"N = {recipe['num_train']:,} training pairs and {recipe['num_targets']} targets of at most {recipe['max_tokens']} tokens "
        f"(on average {record['tokens per pair']:.0f}), drawn with seed {recipe['split_seed']}.",
        f"{record['parameters']:,} trained parameters, {recipe['epochs']} epochs, peak learning rate {recipe['lr']:g}.",
        f"Bank: {bank['subsets']} random halves of {bank['rows']:,} pairs, one model each (seed {seeds['bank']});",
        f"{bank['checkpoints']} checkpoints on other halves (seed {seeds['checkpoints']}).",
        f"Targets classified correctly: {accuracy['checkpoints']:.1%} (checkpoints), {accuracy['bank']:.1%} (bank);",
        f"the larger class has {accuracy['larger class']:.1%}.",
    ]
    if ceiling is not None:
        words.append(
            f"Noise ceiling {number(ceiling)}, from second models of {bank['repeats']} subsets (seed {seeds['repeats']})."
        )
    words.append(
        f"Median processor seconds: {seconds['model']:.1f} for a model, {seconds['features of a checkpoint']:.1f} for the features of a "
        f"checkpoint. {record['date']}."
    )
    return " ".join(words)


def section(record: Mapping[str, Any]) -> str:
    """Facts, table and quoted pairs."""
    related = record["same question or sentence"]
    lines = [
        facts(record),
        "",
        "| method | M | LDS | 95% interval | training, s | attribution, s |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["methods"]:
        training, attribution = cost(record, row)
        times = f"{training:.1f} | {attribution:.1f}" if row["checkpoints"] else " | "
        interval = f"[{number(row['low'])}, {number(row['high'])}]"
        lines.append(
            f"| {row['method']} | {row['checkpoints'] or ''} | {number(row['lds'])} | {interval} | {times} |"
        )
    lines += [
        "",
        f"{related['targets']} targets share their question or sentence with training pairs: {related['training pairs']} such pairs of a target "
        f"and a training pair, of which {related['among the largest']} are among the {related['k']} largest |scores| of their target "
        "(largest ensemble).",
    ]
    for example in record["quoted"]:
        lines += ["", f"> **{example['label']}**: {example['text']}", ">"]
        for name, words in (("raise", "raises f most"), ("lower", "lowers f most")):
            found = example[name][0]
            lines.append(f"> - {words} ({signed(found['score'])}), {found['label']}: {found['text']}")
    return "\n".join(lines) + "\n"


def page(text: str, record: Mapping[str, Any]) -> str:
    """The page's text with the section of a record."""
    return with_section(text, "qnli", section(record))


def write_page(result: Mapping[str, Any], examples: Sequence[Mapping[str, Any]], figure: Path) -> Path:
    """Record results, figure, and the two shown targets of which target and strongest pairs have the fewest words."""

    def length(example: Mapping[str, Any]) -> int:
        return sum(len(text.split()) for text in (example["text"], example["raise"][0]["text"], example["lower"][0]["text"]))  # fmt: skip

    quoted = [
        {**example, "raise": example["raise"][:1], "lower": example["lower"][:1]}
        for example in sorted(examples, key=length)[:2]
    ]
    record = {**result, "quoted": quoted}
    RECORD.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    FIGURE.parent.mkdir(exist_ok=True)
    shutil.copyfile(figure, FIGURE)
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), record), encoding="utf-8")
    return PAGE
