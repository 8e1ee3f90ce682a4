r"""What precision costs: features, scores and the linear datamodeling score of each setting, against everything in float64.

    python benchmarks/precision.py [--bank demo-report/bank] [--checkpoints 3] [--projection Rademacher:2048]
    python benchmarks/precision.py --recipe examples/recipes/cifar2.py --bank ../shared/banks/cifar2 --projection Sparse:2048 \
        --rows-of-autocast 500 --out benchmarks/results/precision-cifar2.json

A recipe's model, data and targets (examples/recipes/fashion.py, the demo's, trains what is missing), TRAK with its defaults at each checkpoint
alone and with all of them. Relative error: ‖φ − φ₆₄‖ / ‖φ₆₄‖ of each training row, median and largest over checkpoints; of scores,
‖τ − τ₆₄‖ / ‖τ₆₄‖ of the whole matrix, mean over checkpoints. The LDS of one checkpoint is the mean over them; its interval and that of
the difference to float64 come from the same 1,000 resamples of subsets and targets. The error of the projection itself is beside them: how
far features, scores and the LDS are from those of another seed. Processors that emulate half precision take ten times as long under
autocast: `--rows-of-autocast` looks at so many training rows there, and at no scores. Settings that the result has already are left out;
float64's features stay in --work.
"""

from __future__ import annotations

import argparse
import json
import runpy
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path

import numpy as np
import torch
from records import processor
from torch import Tensor

import trak
from trak.blocks import DenseBlock
from trak.evaluation import Bank, predictions
from trak.evaluation.estimates import crossed_counts, resampled_mean
from trak.evaluation.lds import mean_outputs
from trak.evaluation.ranks import average_ranks, resampled_correlation
from trak.gradients import Gradients
from trak.store import load_store

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Autocast(trak.ImageClassification):
    """The margin of a model that runs under autocast; logits and what follows in float32."""

    dtype: str = "bfloat16"

    def logits_and_labels(self, model, batch):
        with torch.autocast("cpu", dtype=getattr(torch, self.dtype)):
            logits, labels = super().logits_and_labels(model, batch)
        return logits.float(), labels

    def fingerprint(self):
        return super().fingerprint() | {"autocast": self.dtype}


@dataclass(frozen=True)
class Rounded(Gradients):
    """Gradients rounded to another dtype before they are projected: what a product of that dtype with exact signs sees."""

    dtype: torch.dtype
    source: Gradients = field(default_factory=trak.Auto)

    def candidates(self, model, names):
        return tuple(replace(self, source=one) for one in self.source.candidates(model, names))

    def compute(self, model, state, task, batch, names, consume):
        def rounded(block):
            values = block.dense()
            consume(DenseBlock(block.name, block.shape, values.to(self.dtype).to(values.dtype)))

        return self.source.compute(model, state, task, batch, names, rounded)


SETTINGS = {
    "float64 throughout": {"dtype": torch.float64},
    "float32 (default)": {},
    "float32, stored in float16": {"feature_dtype": "float16"},
    "float32, stored in bfloat16": {"feature_dtype": "bfloat16"},
    "gradients rounded to bfloat16": {"gradients": Rounded(torch.bfloat16), "check": False},
    "autocast to bfloat16": {"task": Autocast(dtype="bfloat16")},
    "autocast to float16": {"task": Autocast(dtype="float16")},
    "model in bfloat16": {"dtype": torch.bfloat16},
    "float64, another seed": {"dtype": torch.float64, "seed": 1},
}


EXACT = next(iter(SETTINGS))
EMULATED = ("autocast to bfloat16", "autocast to float16", "model in bfloat16")
"""Settings that compute the model in half precision."""


def parse_projection(text: str, seed: int) -> trak.Projection:
    kind, _, dim = text.partition(":")
    return getattr(trak, kind)(int(dim), seed=seed)


def features(folder: Path, index: int) -> Tensor:
    """Those of all training rows at one checkpoint, [N, K] float64."""
    rows = load_store(folder).rows(index)
    return rows.read(0, rows.num_rows).features.double()


def resampled_lds(bank: Bank, scores: Tensor) -> np.ndarray:
    """The LDS in each of 1,000 resamples of subsets and targets, the same ones for all scores."""
    outputs_ST, _ = mean_outputs(bank.outputs, np.asarray(bank.masks))
    subset_counts_BS, target_counts_BT = crossed_counts(*outputs_ST.shape, num_bootstrap=1000, seed=0)
    ranks = average_ranks(predictions(scores, bank.masks)), average_ranks(outputs_ST)
    return resampled_mean(resampled_correlation(*ranks, subset_counts_BS), target_counts_BT)


def run(
    recipe: dict, options, setting: dict, folder: Path, rows: Tensor | None
) -> Iterator[tuple[int, Tensor | None, float]]:
    """(checkpoint, scores [N, T] in float64, processor seconds) of each checkpoint, then (-1, scores, 0) of all of them together.

    With `rows`, training features of these alone are computed, and no scores.
    """
    arguments = {"task": recipe["task"]} | setting
    method = trak.TRAK(
        model=recipe["model"],
        projection=parse_projection(options.projection, arguments.pop("seed", 0)),
        save_dir=folder,
        device="cpu",
        batch_size=recipe["batch_size"],
        progress=False,
        **arguments,
    )
    train_set = recipe["train_set"] if rows is None else tuple(part[rows] for part in recipe["train_set"])
    checkpoints = recipe["checkpoints"][: options.checkpoints]
    for index, checkpoint in enumerate(checkpoints):
        start = time.process_time()
        fitted = method.fit(train_set, [checkpoint])
        scores = None if rows is not None else fitted.attribute(recipe["targets"]).scores.tensor().double()
        yield index, scores, time.process_time() - start
    if rows is None and len(checkpoints) > 1:
        yield (
            -1,
            method.fit(train_set, checkpoints).attribute(recipe["targets"]).scores.tensor().double(),
            0.0,
        )


def lds_of(bank: Bank, found: list[Tensor], exact: list[Tensor]) -> dict:
    """Mean over some scores, interval, and interval of the difference to the exact ones."""
    samples_B = np.mean([resampled_lds(bank, scores) for scores in found], axis=0)
    exact_B = np.mean([resampled_lds(bank, scores) for scores in exact], axis=0)
    means = [np.mean([bank.lds(scores, num_bootstrap=1).mean for scores in each]) for each in (found, exact)]
    low, high = np.quantile(samples_B, (0.025, 0.975))
    less, more = np.quantile(samples_B - exact_B, (0.025, 0.975))
    return {
        "mean": float(means[0]),
        "low": float(low),
        "high": float(high),
        "difference": float(means[0] - means[1]),
        "difference_low": float(less),
        "difference_high": float(more),
    }


def compare(recipe: dict, bank: Bank, options, name: str, exact: dict[int, Tensor]) -> dict:
    """One setting's line; `exact` receives the scores of the first setting, by checkpoint, -1 for all of them."""
    rows = None
    if options.rows_of_autocast and name in EMULATED:
        count = len(recipe["train_set"][1])
        rows = torch.linspace(0, count - 1, options.rows_of_autocast).round().long()
    folder = options.work / name.replace(" ", "-").replace(",", "")
    errors, score_errors, seconds, scores = [], [], [], {}
    for index, found, spent in run(recipe, options, SETTINGS[name], folder, rows):
        if index >= 0:
            wanted = features(options.work / EXACT.replace(" ", "-"), index)
            wanted = wanted if rows is None else wanted[rows]
            errors.append((features(folder, index) - wanted).norm(dim=1) / wanted.norm(dim=1))
            seconds.append(spent)
        if found is not None:
            scores[index] = found
            if name == EXACT:
                exact[index] = found
            if index >= 0:
                score_errors.append(float((found - exact[index]).norm() / exact[index].norm()))
        print(name, index, f"{spent:.0f} s", flush=True)
    if name != EXACT:
        shutil.rmtree(folder)
    line = {
        "rows": len(errors[0]),
        "feature_error_median": float(torch.cat(errors).median()),
        "feature_error_largest": float(torch.cat(errors).max()),
        "cpu_seconds": statistics.mean(seconds),
    }
    if scores:
        line["score_error"] = statistics.mean(score_errors)
        singles = [index for index in scores if index >= 0]
        line["lds"] = {"1": lds_of(bank, [scores[i] for i in singles], [exact[i] for i in singles])}
        if -1 in scores:
            line["lds"][str(len(singles))] = lds_of(bank, [scores[-1]], [exact[-1]])
    return line


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, default=ROOT / "examples" / "recipes" / "fashion.py")
    parser.add_argument("--bank", type=Path, default=Path("demo-report/bank"))
    parser.add_argument("--projection", default="Rademacher:2048")
    parser.add_argument("--checkpoints", type=int, default=3)
    parser.add_argument("--rows-of-autocast", type=int, default=0, help="training rows there; 0 for all")
    parser.add_argument(
        "--settings", default=None, help="names, with semicolons; the first setting is always run"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("precision-features"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "precision.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe, bank = runpy.run_path(str(options.recipe)), Bank.load(options.bank)
    record = json.loads(options.out.read_text()) if options.out.exists() else {}
    settings, exact = record.get("settings", {}), {}
    for name in SETTINGS:
        if name != EXACT and (
            name in settings or (options.settings and name not in options.settings.split(";"))
        ):
            continue
        known = settings.get(name)
        settings[name] = compare(recipe, bank, options, name, exact)
        if known:  # The exact features were there: only scores were computed anew.
            settings[name] = known
        print(name, settings[name], flush=True)
        record = {
            "date": date.today().isoformat(),
            "torch": torch.__version__,
            "trak": trak.__version__,
            "machine": processor(),
            "threads": options.threads,
            "title": recipe["title"],
            "projection": options.projection,
            "checkpoints": options.checkpoints,
            "settings": {each: settings[each] for each in SETTINGS if each in settings},
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
