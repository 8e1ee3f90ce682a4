"""Which estimate predicts retraining best? LDS of TRAK's alternatives on a bank of retrained models.

    python examples/alternatives.py examples/recipes/cifar2.py --bank ../shared/banks/cifar2 --what weights damping

`--what weights`: the exponent of the loss weights, the Gram matrix with and without the log loss's second derivatives, the leverage
correction. `--what damping`: the automatic rule, those of ridge regression, and a sweep of fixed damping. Features are computed once and
kept in `--save-dir`.
"""

from __future__ import annotations

import argparse
import json
import runpy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import trak
from trak.evaluation import Bank
from trak.precondition import CrossValidationDamping, Damping, EffectiveDimensionDamping, EvidenceDamping

SHARES = (30, 100, 300, 1000, 3000, 10_000)


@dataclass(frozen=True, eq=False)
class Remembered(Damping):
    """A rule whose answers are kept, since the eigendecomposition takes longest and every ensemble asks again."""

    rule: Damping
    answers: dict[float, float] = field(default_factory=dict)

    def value(self, moments: Any) -> float:
        key = float(moments.gram.diagonal().sum())
        if key not in self.answers:
            self.answers[key] = self.rule.value(moments)
        return self.answers[key]

    def fingerprint(self) -> dict[str, Any]:
        return self.rule.fingerprint()


def alternatives(
    what: list[str], size: int, kept: dict[str, Damping]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, settings of TRAK)."""
    if "weights" in what:
        for gram in ("uniform", "logistic"):
            for exponent in (1.0, 0.7, 0.5, 0.3, 0.0):
                yield f"q^{exponent:g}, {gram} Gram", {"weight_exponent": exponent, "gram": gram}
        yield "default with leverage correction", {"leverage_correction": True}
    if "damping" in what:
        yield "automatic", {}
        for name, rule in kept.items():
            yield name, {"damping": rule}
        for share in SHARES:
            rule = trak.AutomaticDamping(share=share / size**0.5)  # λ = trace / share for every M
            yield f"trace / {share}", {"damping": rule}


def fit(method: trak.TRAK, train_set: Any, checkpoints: list) -> Any:
    """The fitted method, None where its damping leaves the Gram matrix singular."""
    try:
        return method.fit(train_set, checkpoints)
    except trak.SingularGramError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("recipe", type=Path, help="a recipe of `trak frontier`")
    add("--bank", type=Path, required=True, help="its bank of retrained models")
    add("--what", nargs="+", choices=("weights", "damping"), default=["weights", "damping"])
    add("--checkpoints", type=int, nargs="+", default=[1, 3], help="ensemble sizes")
    add("--average", type=int, default=3, help="for an ensemble of one: mean over so many single checkpoints")
    add("--dim", type=int, default=4096, help="K")
    add("--save-dir", type=Path, default=None, help="keep features there")
    add("--json", type=Path, default=None, help="write the results there")
    options = parser.parse_args()

    recipe = runpy.run_path(str(options.recipe))
    train_set, targets, checkpoints = (recipe[name] for name in ("train_set", "targets", "checkpoints"))
    common = {
        "model": recipe["model"],
        "task": recipe["task"],
        "projection": trak.Sparse(dim=options.dim),
        "save_dir": options.save_dir,
        "batch_size": recipe.get("batch_size"),
    }
    bank = Bank.load(options.bank, num_train=trak.datasets.as_rows(train_set).num_rows)
    kept: dict[str, Damping] = {
        "cross-validation": Remembered(CrossValidationDamping()),
        "evidence": Remembered(EvidenceDamping()),
        "effective dimension 100": Remembered(EffectiveDimensionDamping(100)),
        "effective dimension 300": Remembered(EffectiveDimensionDamping(300)),
    }
    results = []
    for size in options.checkpoints:
        for name, settings in alternatives(options.what, size, kept):
            single = []
            for first in range(options.average if size == 1 else 1):
                fitted = fit(trak.TRAK(**common, **settings), train_set, checkpoints[first : first + size])
                if fitted is None:
                    continue
                attribution = fitted.attribute(targets)
                single.append(bank.lds(attribution.scores))
            if len(single) < (options.average if size == 1 else 1):
                results.append({"checkpoints": size, "name": name, "lds": None})
                print(
                    f"M = {size:2d}  {name:34s} so little damping that the Gram matrix is singular",
                    flush=True,
                )
                continue
            row = {"checkpoints": size, "name": name, "lds": float(np.mean([found.mean for found in single]))}
            row |= {
                "low": single[0].low,
                "high": single[0].high,
                "damping": attribution.info["damping"][0][0],
            }
            results.append(row)
            print(f"M = {size:2d}  {name:34s} LDS {row['lds']:.4f}  λ {row['damping']:.4g}", flush=True)
            if options.json is not None:
                options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
