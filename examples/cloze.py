"""Which training sentences taught a model to fill this blank? LDS of TRAK for Hugging Face's T5 and BERT, small and trained from nothing.

    python examples/cloze.py --model seq2seq        # T5: the input has a sentinel, the output is the object and the end
    python examples/cloze.py --model masked         # BERT: the object is [MASK], the only label

Sentences that state facts of T-REx, the object blanked out; facts have several sentences, so that most held-out ones are of a fact, and all of an
object, that training sentences have too. Chooses the length of training by the loss of rows that models have not seen, trains a bank of models on
random halves and checkpoints on all rows, and measures `trak.attribute` with its defaults beside inner products of gradients,
representations (T5 only: BERT's would have to be picked at the blank), BM25 on the texts and random scores. Gains are 95% intervals of the
difference to the first row of the same M, paired. A dozen minutes of one core for a model; kill it whenever you like: the same command
goes on where it stopped. Leaves result.json and prints the table and some targets' proponents.

Needs transformers, bm25s and the files of `facts.py` (--data).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from alternatives import compared
from cloze_task import RECIPES, Cloze, guess, make_cloze
from experiment_page import lds_table, number, record
from facts_task import Row, in_full
from small_banks import BANK_SEED, CHECKPOINT_SEED, TRIAL_SEED, Seconds, groups, kept_scores, train_all
from small_banks_settings import DATA_SEED
from torch import Tensor

import trak
from trak.evaluation import Bank, noise_ceiling
from trak.frontier.clock import machine_facts
from trak.progress import bar

SHOWN = 3  # targets whose proponents are printed, and as many proponents of each


def methods(cloze: Cloze, checkpoints: list[Path], folder: Path) -> dict[str, Callable[[], trak.Attribution]]:
    """By name, functions that attribute the targets by these checkpoints."""
    setting, model = cloze.setting, cloze.setting.build()
    data = (setting.train_set, setting.targets)
    texts, queries = (
        [in_full(row.words, row.object) for row in rows] for rows in (cloze.train, cloze.targets)
    )
    both: dict[str, Any] = {"model": model, "task": setting.task}
    dot = trak.GradientSimilarity(**both, similarity="dot", save_dir=folder / "columns")
    # What the decoder has made of the sentence before its first word; later it has read the answer.
    first = trak.RepresentationSimilarity(**both, similarity="cosine", transform=lambda hidden: hidden[:, 0])
    found = {
        "TRAK": lambda: trak.attribute(
            model, *data, task=setting.task, checkpoints=checkpoints, save_dir=folder / "eigenbasis"
        ),
        "gradient dot product": lambda: dot.fit(data[0], checkpoints).attribute(data[1]),
        "representation cosine": lambda: first.fit(data[0], checkpoints).attribute(data[1]),
        "BM25": lambda: trak.BM25().fit(texts).attribute(queries),
        "random": lambda: trak.RandomScores(seed=0).fit(data[0]).attribute(data[1]),
    }
    if isinstance(setting.task, trak.MaskedLM):
        del found["representation cosine"]
    return found


def evaluate(
    cloze: Cloze, bank: Bank, checkpoints: list[Path], folder: Path
) -> tuple[list[dict[str, Any]], Tensor]:
    """Rows of the table, and TRAK's scores [N, T] by all checkpoints."""
    rows: list[dict[str, Any]] = []
    ensembles = groups(len(checkpoints), (1, len(checkpoints)))
    with bar(sum(len(several) for _, several in ensembles), "Attributing", unit="ensembles") as shown:
        for size, several in ensembles:
            scores: dict[str, list[Tensor]] = {}
            seconds: dict[str, float] = {}
            for members in several:
                chosen = [checkpoints[m] for m in members]
                place = folder / "-".join(map(str, members))
                for name, compute in methods(cloze, chosen, folder / "features").items():
                    file = place / f"{name.replace(' ', '-')}.safetensors"
                    scores_NT, spent = kept_scores(file, compute)
                    scores.setdefault(name, []).append(scores_NT)
                    seconds[name] = seconds.get(name, 0.0) + spent / len(several)
                shown.update()
            for name, row in compared(bank, scores).items():
                # Larger ensembles find the features of single checkpoints in the store.
                spent = {"seconds": round(seconds[name], 1)} if size == 1 else {}
                rows.append({"scores": name, "checkpoints": size, **row, **spent})
    return rows, scores["TRAK"][0]


def proponents(cloze: Cloze, scores_NT: Tensor) -> list[dict[str, Any]]:
    """Of the first targets, as text."""

    def text(row: Row) -> str:
        return in_full(row.words, f"**{row.object}**")

    shown = []
    for target, scores_N in zip(cloze.targets[:SHOWN], scores_NT.T):
        strongest = scores_N.topk(SHOWN)
        found = [[round(float(score), 3), text(cloze.train[row])] for score, row in zip(*strongest)]
        shown.append({"target": text(target), "proponents": found})
    return shown


def by_token(cloze: Cloze, checkpoints: list[Path], scores_NT: Tensor, folder: Path) -> dict[str, float]:
    """Scores of the first targets' object alone and of the end alone: how large the end's are, and whether both add up to the whole."""
    setting = cloze.setting
    rows = setting.task.token_rows({name: values[:SHOWN] for name, values in setting.targets.items()})
    file = folder / "tokens.safetensors"
    options = {
        "task": setting.task,
        "checkpoints": checkpoints,
        "save_dir": folder / "features" / "eigenbasis",
    }
    parts_NR, _ = kept_scores(
        file, lambda: trak.attribute(setting.build(), setting.train_set, rows, **options)
    )
    whole_NT, is_end_R = scores_NT[:, :SHOWN], rows.origins[:, 1] == 1
    added_NT = torch.zeros_like(whole_NT).index_add(1, rows.origins[:, 0], parts_NR)
    return {
        "end": float(parts_NR[:, is_end_R].norm() / whole_NT.norm()),
        "difference": float((added_NT - whole_NT).norm() / whole_NT.norm()),
    }


def run(cloze: Cloze, folder: Path) -> dict[str, Any]:
    """All stages; the result as JSON values."""
    setting, seconds = cloze.setting, Seconds(folder / "seconds.jsonl")
    recipe = setting.recipe
    trained = train_all(setting, folder, seconds)
    place = folder / f"attribution-{trained.epochs}"
    with seconds.of("attribution"):
        rows, scores_NT = evaluate(cloze, trained.bank, trained.checkpoints, place)
        is_seq2seq = isinstance(setting.task, trak.Seq2SeqLM)
        tokens = by_token(cloze, trained.checkpoints, scores_NT, place) if is_seq2seq else None
    whole = Bank.load(folder / f"checkpoints-{trained.epochs}")
    result = {
        "words": setting.words,
        "recipe": asdict(recipe),
        "seeds": {"data": DATA_SEED, "bank": BANK_SEED, "checkpoints": CHECKPOINT_SEED, "trials": TRIAL_SEED},
        "parameters": sum(parameter.numel() for parameter in setting.build().parameters()),
        "epochs": trained.epochs,
        "losses": {str(length): losses for length, losses in trained.losses.items()},
        "loss of the targets": float(whole.outputs.mean()),
        "loss of a guess": guess(cloze),
        "noise ceiling": noise_ceiling(trained.bank.outputs).mean,
        "methods": rows,
        "proponents": proponents(cloze, scores_NT),
        "tokens": tokens,
        "processor seconds": seconds.totals(),
        "machine": machine_facts(),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def section(result: dict[str, Any]) -> str:
    """Facts, table and proponents, for the terminal and the page."""
    recipe, seeds, machine = result["recipe"], result["seeds"], result["machine"]
    lengths = ", ".join(f"{length}: {losses['unseen']:.2f}" for length, losses in result["losses"].items())
    facts = (
        f"{result['words']}; {result['parameters']:,} parameters. N = {recipe['num_train']:,}, {recipe['num_targets']} targets (seed "
        f"{seeds['data']}). Bank: {recipe['subsets']} halves, {recipe['models']} models each (seed {seeds['bank']}); {recipe['checkpoints']} "
        f"checkpoints on all rows (seed {seeds['checkpoints']}). {result['epochs']} epochs: mean loss of unseen rows by epochs {lengths}. Mean "
        f"loss of the targets at the checkpoints {result['loss of the targets']:.2f}; by the objects' shares of the training set "
        f"{result['loss of a guess']:.2f}. Noise ceiling {number(result['noise ceiling'])}. "
        f"{sum(result['processor seconds'].values()):.0f} processor seconds, one thread of {machine['processor']}, torch {machine['torch']}, "
        f"{machine['date']}."
    )
    parts = [facts, lds_table(result["methods"], "scores", "TRAK")]
    parts.append(
        f"The strongest proponents of the first targets by TRAK, M = {recipe['checkpoints']}, the object in bold:"
    )
    for one in result["proponents"]:
        parts.append(
            "\n".join(
                [f"- {one['target']}", *(f"    - {score:g}: {text}" for score, text in one["proponents"])]
            )
        )
    if result["tokens"] is not None:
        parts.append(
            f"Scores of their objects alone and of the end alone add up to those of the whole output but for {result['tokens']['difference']:.1e} of "
            f"its norm; the end's have {result['tokens']['end']:.1%} of it."
        )
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, beside = parser.add_argument, Path(__file__).resolve().parents[2] / "shared" / "data"
    add("--model", choices=list(RECIPES), required=True)
    add("--out", type=Path, help="folder of everything that is written [cloze-MODEL]")
    add("--data", type=Path, default=beside, help="folder with lama_trex_28rel.jsonl.xz [%(default)s]")
    add("--quick", action="store_true", help="few rows and models, in seconds; proves nothing")
    add(
        "--page",
        action="store_true",
        help="also record the result in benchmarks/results and docs/experiments",
    )
    options = parser.parse_args(arguments)
    if options.page and options.quick:
        parser.error("--page records the real run: leave out --quick")
    torch.set_num_threads(1)
    cloze = make_cloze(options.model, options.data, quick=options.quick)
    result = json.loads(json.dumps(run(cloze, options.out or Path(cloze.setting.name))))  # as it will be read
    print(section(result))
    if options.page:
        record("cloze", cloze.setting.name, result, section(result))


if __name__ == "__main__":
    main()
