"""What precision costs: features, scores and the linear datamodeling score of each setting, against everything in float64.

    python benchmarks/precision.py [--bank demo-report/bank] [--checkpoints 3] [--dim 2048]

The demo's model and images (examples/recipes/fashion.py, which trains what is missing), TRAK with its defaults and Rademacher(2048). Relative error:
‖φ − φ₆₄‖ / ‖φ₆₄‖ of each training row at the first checkpoint, median and largest; of scores, ‖τ − τ₆₄‖ / ‖τ₆₄‖ of the whole matrix. The
error of the projection itself is beside them: how far inner products of features are from those of another seed.
"""

from __future__ import annotations

import argparse
import json
import platform
import runpy
import tempfile
import time
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

import trak
from trak.blocks import DenseBlock
from trak.evaluation import Bank
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


def run(recipe: dict, dim: int, count: int, setting: dict) -> tuple[Tensor, Tensor, float]:
    """(features [N, K] of the first checkpoint, scores [N, T], processor seconds)."""
    options = {"task": recipe["task"]} | setting
    seed = options.pop("seed", 0)
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        attribution = trak.attribute(
            recipe["model"],
            recipe["train_set"],
            recipe["targets"],
            checkpoints=recipe["checkpoints"][:count],
            projection=trak.Rademacher(dim, seed=seed),
            save_dir=folder,
            device="cpu",
            batch_size=recipe["batch_size"],
            progress=False,
            **options,
        )
        scores = attribution.scores.tensor().double()
        seconds = time.process_time() - start
        rows = load_store(folder).rows(0)
        return rows.read(0, rows.num_rows).features.double(), scores, seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, default=ROOT / "examples" / "recipes" / "fashion.py")
    parser.add_argument("--bank", type=Path, default=Path("demo-report/bank"))
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--checkpoints", type=int, default=3)
    parser.add_argument(
        "--settings", default=None, help="names, with semicolons; the first setting is always run"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "precision.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe, bank = runpy.run_path(str(options.recipe)), Bank.load(options.bank)
    record = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "trak": trak.__version__,
        "machine": platform.processor() or platform.machine(),
        "threads": options.threads,
        "title": recipe["title"],
        "dim": options.dim,
        "checkpoints": options.checkpoints,
        "settings": {},
    }
    exact = exact_scores = None
    for name, setting in SETTINGS.items():
        if exact is not None and options.settings and name not in options.settings.split(";"):
            continue
        features, scores, seconds = run(recipe, options.dim, options.checkpoints, setting)
        if exact is None or exact_scores is None:
            exact, exact_scores = features, scores
        errors_N = (features - exact).norm(dim=1) / exact.norm(dim=1)
        lds = bank.lds(scores)
        record["settings"][name] = {
            "feature_error_median": float(errors_N.median()),
            "feature_error_largest": float(errors_N.max()),
            "score_error": float((scores - exact_scores).norm() / exact_scores.norm()),
            "lds": {"mean": lds.mean, "low": lds.low, "high": lds.high},
            "cpu_seconds": seconds,
        }
        print(name, record["settings"][name], flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
