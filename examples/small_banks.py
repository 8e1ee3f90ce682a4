"""Random columns or the eigenbasis where data are few, or where the loss is no probability? LDS on three small banks of retrained models.

    python examples/small_banks.py --setting rows          # 300 images, log loss
    python examples/small_banks.py --setting regression    # 353 rows of numbers, squared error
    python examples/small_banks.py --setting language      # 1,000 sentences, a language model: losses summed over words

Chooses the length of training by the loss of rows that models have not seen, trains a bank of models on random halves and checkpoints on all rows,
and measures TRAK on `trak.Sparse(4096)`, `trak.Eigenbasis(4096)` and the same whitened, with default settings otherwise; beside them whole
gradients and their inner products, and a sweep of the damping. Minutes of one core; kill it whenever you like: the same command goes on where
it stopped. Leaves result.json and prints the tables. Gains are 95% intervals of the difference to the first row of the same M, paired.

`regression` needs scikit-learn, `language` the file lama_trex_28rel.jsonl.xz (--data).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from alternatives import compared
from experiment_page import record
from safetensors import safe_open
from safetensors.torch import save_file
from small_banks_kernels import Gram, dual_scores, kept_kernel
from small_banks_page import section
from small_banks_settings import RECIPES, Setting, make_setting
from torch import Tensor

import trak
from trak.evaluation import Bank, noise_ceiling
from trak.frontier.clock import machine_facts
from trak.methods.damping import damping_for
from trak.methods.runs import RunOptions
from trak.progress import bar

BANK_SEED, CHECKPOINT_SEED, TRIAL_SEED = 0, 1, 2
DIMENSIONS = (5, 10, 15, 20, 30, 40, 50, 75, 100, 150, 200)
BATCH = 50
SCORED = ("Sparse", "Eigenbasis", "Eigenbasis, whitened")  # by trak.TRAK; the others by inner products
SWEPT = ("Sparse", "Eigenbasis, whitened", "whole gradients")  # a ridge is their rule


class Seconds:
    """Processor seconds of stages, in a file: those of a run that was interrupted are added up."""

    def __init__(self, file: Path) -> None:
        self._file = file

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        """Counted also if the stage is killed by an error."""
        start = time.process_time()
        try:
            yield
        finally:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a") as lines:
                lines.write(json.dumps([stage, time.process_time() - start]) + "\n")

    def totals(self) -> dict[str, float]:
        """By stage, in the order of their beginning."""
        found: dict[str, float] = {}
        for stage, seconds in map(json.loads, self._file.read_text().splitlines()):
            found[stage] = round(found.get(stage, 0.0) + seconds, 1)
        return found


def train(setting: Setting, epochs: int, folder: Path, outputs: Callable, **plan: Any) -> Bank:
    """Models of one length; those that are in the folder are read."""
    recipe = asdict(setting.recipe)
    for name in ("lengths", "subsets", "models", "checkpoints", "trials", "dim"):
        del recipe[name]
    version = json.dumps({"setting": setting.name, "version": 1, "epochs": epochs, **recipe})
    return setting.train(setting.recipe, epochs, outputs, folder=folder, version=version, **plan)


def unseen_losses(setting: Setting, folder: Path) -> dict[int, dict[str, float]]:
    """By length of training: the mean loss of training rows that models on random halves saw, and of those that they did not see."""
    found = {}
    for epochs in setting.recipe.lengths:
        trials = train(
            setting,
            epochs,
            folder / f"trials-{epochs}",
            setting.losses,
            num_subsets=setting.recipe.trials,
            seed=TRIAL_SEED,
        )
        losses_SN, seen_SN = trials.mean_outputs, trials.masks
        found[epochs] = {
            "unseen": float(losses_SN[~seen_SN].mean()),
            "seen": float(losses_SN[seen_SN].mean()),
        }
    return found


@dataclass(frozen=True, eq=False, kw_only=True)
class Trained:
    """Everything that was trained.

    Attributes:
        epochs: that were chosen.
        losses: by length, of seen and unseen rows.
        bank: R models on each of S halves.
        checkpoints: files of models on all rows.
    """

    epochs: int
    losses: dict[int, dict[str, float]]
    bank: Bank
    checkpoints: list[Path]


def train_all(setting: Setting, folder: Path, seconds: Seconds) -> Trained:
    """Choose the length, then train with it."""
    recipe = setting.recipe
    with seconds.of("choosing the length"):
        losses = unseen_losses(setting, folder)
    epochs = min(losses, key=lambda length: losses[length]["unseen"])
    print(
        f"{epochs} epochs: " + "; ".join(f"{length}: {of['unseen']:.3f}" for length, of in losses.items()),
        flush=True,
    )
    with seconds.of("bank"):
        plan = {"num_subsets": recipe.subsets, "models_per_subset": recipe.models, "seed": BANK_SEED}
        bank = train(setting, epochs, folder / f"bank-{epochs}", setting.outputs, **plan)
    with seconds.of("checkpoints"):
        plan = {
            "masks": torch.ones(1, recipe.num_train, dtype=torch.bool),
            "models_per_subset": recipe.checkpoints,
            "seed": CHECKPOINT_SEED,
            "keep_models": True,
        }
        whole = train(setting, epochs, folder / f"checkpoints-{epochs}", setting.target_losses, **plan)
    return Trained(epochs=epochs, losses=losses, bank=bank, checkpoints=list(whole.models))


def kept_scores(file: Path, compute: Callable[[], trak.Attribution]) -> tuple[Tensor, float]:
    """(scores [N, T], processor seconds), from the file if it is there."""
    if not file.is_file():
        start = time.process_time()
        scores_NT = compute().scores.tensor().contiguous()
        seconds = time.process_time() - start
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".part")
        save_file({"scores": scores_NT}, unfinished, metadata={"seconds": str(seconds)})
        unfinished.rename(file)
    with safe_open(file, "pt") as kept:
        return kept.get_tensor("scores"), float(kept.metadata()["seconds"])


def groups(count: int, sizes: Sequence[int]) -> list[tuple[int, list[list[int]]]]:
    """(M, the ensembles whose LDS are averaged): every checkpoint alone, and otherwise the first M."""
    return [(size, [[m] for m in range(count)] if size == 1 else [list(range(size))]) for size in sizes]


def trak_scores(
    setting: Setting,
    checkpoints: Sequence[Path],
    options: dict[str, Any],
    folder: Path,
    members: Sequence[int],
) -> tuple[Tensor, float]:
    """TRAK's scores by the checkpoints of these numbers, and the seconds that they took."""
    chosen = [checkpoints[m] for m in members]
    return kept_scores(
        folder / f"scores-{'-'.join(map(str, members))}.safetensors",
        lambda: trak.TRAK(**options).fit(setting.train_set, chosen).attribute(setting.targets),
    )


def projections(setting: Setting) -> dict[str, trak.Projection]:
    """What is compared, the first with the others; but for the last by `trak.TRAK` with its defaults."""
    dim = setting.recipe.dim
    return {
        "Sparse": trak.Sparse(dim),
        "Eigenbasis": trak.Eigenbasis(dim),
        "Eigenbasis, whitened": trak.Eigenbasis(dim, whitening=1.0),
        "whole gradients": trak.Identity(),
    }


def num_parameters(setting: Setting) -> int:
    """P."""
    return sum(parameter.numel() for parameter in setting.build().parameters())


@dataclass(frozen=True, eq=False)
class Features:
    """Of one projection: inner products at every checkpoint, and TRAK's scores of all but the last.

    Attributes:
        grams: of every checkpoint.
        scores: by M, of every ensemble.
        seconds: by M, of an ensemble: features that are not there yet, Gram matrix and scores.
    """

    grams: list[Gram]
    scores: dict[int, list[Tensor]]
    seconds: dict[int, float]


def featurize(
    setting: Setting, trained: Trained, folder: Path, ensembles: Sequence[tuple[int, list[list[int]]]]
) -> dict[str, Features]:
    """Features and scores of every projection; what is in the folder is read."""
    found, compared = {}, projections(setting)
    work = len(SCORED) * sum(len(several) for _, several in ensembles) + len(compared) * len(
        trained.checkpoints
    )
    with bar(work, "Attributing", unit="stages") as shown:
        for name, projection in compared.items():
            own = folder / "attribution" / name.replace(",", "").replace(" ", "-")
            options = {
                "model": setting.build(),
                "task": setting.task,
                "projection": projection,
                "batch_size": BATCH,
                "save_dir": own / "features" if name in SCORED else None,
            }
            features = Features([], {}, {})
            for size, several in ensembles if name in SCORED else ():
                each = []
                for members in several:
                    each.append(trak_scores(setting, trained.checkpoints, options, own, members))
                    shown.update(1)
                features.scores[size] = [scores_NT for scores_NT, _ in each]
                features.seconds[size] = float(np.mean([spent for _, spent in each]))
            for m, checkpoint in enumerate(trained.checkpoints):
                data = (setting.train_set, setting.targets, checkpoint)
                kernel = kept_kernel(own / f"kernel-{m}.safetensors", RunOptions(**options), *data)
                features.grams.append(Gram.of(kernel, is_log_loss=setting.task.is_log_loss))
                shown.update(1)
            found[name] = features
    return found


def diagnostics() -> list[tuple[str, str, trak.Damping]]:
    """(name, features, damping) of what tells the basis from the damping, and both from what is cut off."""
    return [
        ("Eigenbasis, damped as Sparse", "Eigenbasis", trak.AutomaticDamping()),
        ("whole gradients", "whole gradients", trak.AutomaticDamping()),
    ]


def evaluate(
    setting: Setting, trained: Trained, folder: Path, sizes: Sequence[int]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the two tables: methods, and LDS against the effective dimension."""
    ensembles = groups(len(trained.checkpoints), sizes)
    found = featurize(setting, trained, folder, ensembles)
    methods, dimensions = [], []
    for size, several in ensembles:
        scores = {name: features.scores[size] for name, features in found.items() if features.scores}
        for name, kind, rule in diagnostics():
            chosen = [[found[kind].grams[m] for m in members] for members in several]
            scores[name] = [dual_scores(grams, rule) for grams in chosen]
        dots = [gram.kernel.dot_products for gram in found["whole gradients"].grams]
        scores["gradient dot product"] = [torch.stack([dots[m] for m in one]).mean(0) for one in several]

        for name, row in compared(trained.bank, scores).items():
            # Larger ensembles find the features of single checkpoints in the store.
            is_timed = size == 1 and name in found and 1 in found[name].seconds
            spent = {"seconds": round(found[name].seconds[1], 1)} if is_timed else {}
            methods.append({"features": name, "checkpoints": size, **row, **spent})
        for name in SWEPT:
            rule = damping_for("auto", projections(setting)[name], setting.task)
            dimensions.append(sweep(name, found[name].grams, several, trained.bank, rule))
    return methods, dimensions


def sweep(
    name: str, grams: Sequence[Gram], several: list[list[int]], bank: Bank, rule: trak.Damping
) -> dict[str, Any]:
    """LDS at given effective dimensions, and that of the rule at the first checkpoint. For looking at, not for choosing."""
    found, size = {}, len(several[0])
    for dimension in DIMENSIONS:
        if dimension < 0.9 * len(grams[0].values_N):
            each = [dual_scores([grams[m] for m in members], float(dimension)) for members in several]
            found[dimension] = float(np.mean([bank.lds(scores_NT).mean for scores_NT in each]))
    used = grams[0].dimension(grams[0].damping(rule, size))
    return {"features": name, "checkpoints": size, "lds": found, "of the rule": round(used, 1)}


def run(setting: Setting, folder: Path, sizes: Sequence[int]) -> dict[str, Any]:
    """All stages; the result as JSON values."""
    seconds = Seconds(folder / "seconds.jsonl")
    trained = train_all(setting, folder, seconds)
    with seconds.of("attribution"):
        methods, dimensions = evaluate(setting, trained, folder, sizes)
    bank = trained.bank
    checkpoints = Bank.load(folder / f"checkpoints-{trained.epochs}")
    result = {
        "setting": setting.name,
        "words": setting.words,
        "recipe": asdict(setting.recipe),
        "seeds": {"bank": BANK_SEED, "checkpoints": CHECKPOINT_SEED, "trials": TRIAL_SEED},
        "parameters": num_parameters(setting),
        "rows of a subset": int(bank.masks[0].sum()),
        "targets": bank.outputs.shape[2],
        "epochs": trained.epochs,
        "losses": {str(length): losses for length, losses in trained.losses.items()},
        "loss of the targets": float(checkpoints.outputs.mean()),
        "noise ceiling": noise_ceiling(bank.outputs).mean if bank.outputs.shape[1] > 1 else None,
        "methods": methods,
        "effective dimensions": dimensions,
        "processor seconds": seconds.totals(),
        "machine": machine_facts(),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, beside = parser.add_argument, Path(__file__).resolve().parents[2] / "shared" / "data"
    add("--setting", choices=list(RECIPES), required=True)
    add("--out", type=Path, help="folder of everything that is written [small-banks-SETTING]")
    add("--data", type=Path, default=beside, help="folder with lama_trex_28rel.jsonl.xz [%(default)s]")
    add("--checkpoints", type=int, nargs="+", help="ensemble sizes [1 and all]")
    add("--quick", action="store_true", help="few rows, models and columns, in seconds; proves nothing")
    add(
        "--page",
        action="store_true",
        help="also record the result in benchmarks/results and docs/experiments",
    )
    options = parser.parse_args(arguments)
    setting = make_setting(options.setting, options.data, quick=options.quick)
    sizes = options.checkpoints or sorted({1, setting.recipe.checkpoints})
    if not 1 <= min(sizes) <= max(sizes) <= setting.recipe.checkpoints:
        parser.error(f"--checkpoints must be from 1 to {setting.recipe.checkpoints}, got {sizes}")
    if options.page and options.quick:
        parser.error("--page records the real run: leave out --quick")
    torch.set_num_threads(1)
    result = run(setting, options.out or Path(f"small-banks-{setting.name}"), sizes)
    result = json.loads(json.dumps(result))  # as it will be read, for the tables
    print(section(result))
    if options.page:
        record("small-banks", f"small-banks-{setting.name}", result, section(result))


if __name__ == "__main__":
    main()
