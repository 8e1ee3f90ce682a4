"""Which estimate predicts retraining best? LDS of TRAK's alternatives on a bank of retrained models.

    python examples/alternatives.py examples/recipes/cifar2.py --bank ../shared/banks/cifar2 --what weights damping

`--what weights`: the exponent of the loss weights, the Gram matrix with and without the log loss's second derivatives, the leverage
correction. `--what damping`: the automatic rule and a sweep of fixed damping; `--what dimensions`: a sweep of effective dimensions; `--what
directions`: of the bound on it in the automatic rule of random columns. `--what diagonal`: multiples of the Gram matrix's diagonal and of its
trace, for the leading entries of the eigenbasis with `--projection eigenbasis:4096`. `--what rules`: the automatic rule and those of ridge
regression, each with an eigendecomposition for every checkpoint. `--what whitening`: gradients whitened by K-FAC or EK-FAC and projected
at random (`trak.Whitened`), or cut off to their leading entries (`trak.Eigenbasis`), with and without the Gram matrix.
Features are computed once and kept in `--save-dir`. Gains are 95% intervals of the difference to the first row, paired.
"""

from __future__ import annotations

import argparse
import json
import runpy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

import trak
from trak.cli.options import parse_projection
from trak.evaluation import Bank
from trak.evaluation.estimates import crossed_counts, resampled_mean
from trak.evaluation.lds import mean_outputs, predictions
from trak.evaluation.ranks import average_ranks, resampled_correlation
from trak.precondition import CrossValidationDamping, Damping, EffectiveDimensionDamping, EvidenceDamping

SHARES = (30, 100, 300, 1000, 3000, 10_000)
DIMENSIONS = (50, 100, 150, 200, 250, 300, 400, 500, 700)
DIRECTIONS = (1.5, 2.0, 2.5, 3.0, 4.0, 6.0)
DIAGONALS = (0.0, 0.3, 1.0, 2.0, 3.0, 10.0)
NO_GRAM = trak.AutomaticDamping(share=1e-6)  # so much that scores are inner products


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
    if "damping" in what or "rules" in what:
        yield "automatic", {}
    if "rules" in what:
        for name, rule in kept.items():
            yield name, {"damping": rule}
    if "damping" in what:
        for share in SHARES:
            rule = trak.AutomaticDamping(share=share / size**0.5, directions=None)  # λ = trace / share
            yield f"trace / {share}", {"damping": rule}
    if "dimensions" in what:
        for dimension in DIMENSIONS:
            yield f"effective dimension {dimension}", {"damping": EffectiveDimensionDamping(dimension)}
    if "diagonal" in what:
        yield "automatic", {}
        for diagonal, share in product(DIAGONALS, SHARES[2:]):
            rule = trak.MarquardtDamping(diagonal, share / size**0.5, None)  # λ = trace / share
            yield f"{diagonal:g} diagonal, trace / {share}", {"damping": rule}
    if "directions" in what:
        yield "automatic", {}
        for directions in DIRECTIONS:
            yield f"directions {directions:g}", {"damping": trak.AutomaticDamping(directions=directions)}


def whitened(
    inner: trak.Sparse,
    folder: Path,
    kinds: Sequence[str],
    ratios: Sequence[float],
    samples: Sequence[int | None],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, settings of TRAK) with whitened gradients; the factors of every checkpoint are found once for each store."""
    yield "plain, Gram", {}
    yield "plain, no Gram", {"damping": NO_GRAM}
    for kind, sample in product(kinds, samples):
        fitted = {"factors": kind, "sample": sample}
        by = kind if len(samples) == 1 else f"{kind} of {sample or 'all'}"
        trials: dict[str, trak.Projection] = {
            f"leading by {by}": trak.Eigenbasis(inner.dim, whitening=None, **fitted)
        }
        for ratio in ratios:
            trials[f"{by} {ratio:g}, random"] = trak.Whitened(inner, whitening=ratio, **fitted)
            trials[f"{by} {ratio:g}, leading"] = trak.Eigenbasis(inner.dim, whitening=ratio, **fitted)
        for name, projection in trials.items():
            place = folder / name.replace(",", "").replace(" ", "-")
            settings = {"projection": projection, "save_dir": place}
            yield f"{name}, Gram", settings
            yield f"{name}, no Gram", {**settings, "damping": NO_GRAM}


def fit(method: trak.TRAK, train_set: Any, checkpoints: list) -> Any:
    """The fitted method, None where its damping leaves the Gram matrix singular."""
    try:
        return method.fit(train_set, checkpoints)
    except trak.SingularGramError:
        return None


def resampled_lds(bank: Bank, scores: Any) -> np.ndarray:
    """The LDS in each of 1,000 resamples of subsets and targets, [B]: the same resamples for all scores, so that differences are paired."""
    outputs_ST, _ = mean_outputs(bank.outputs, np.asarray(bank.masks))
    subset_counts_BS, target_counts_BT = crossed_counts(*outputs_ST.shape, num_bootstrap=1000, seed=0)
    ranks = average_ranks(predictions(scores, bank.masks)), average_ranks(outputs_ST)
    return resampled_mean(resampled_correlation(*ranks, subset_counts_BS), target_counts_BT)


def compared(bank: Bank, scores: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """By name: the mean LDS of several scores [N, T], the ends of its 95% interval, and those of its gain over the first name, paired."""
    found: dict[str, dict[str, Any]] = {}
    first_B = None
    for name, each in scores.items():
        samples_B = np.mean([resampled_lds(bank, scores_NT) for scores_NT in each], axis=0)
        low, high = np.quantile(samples_B, (0.025, 0.975)).tolist()
        lds = float(np.mean([bank.lds(scores_NT).mean for scores_NT in each]))
        found[name] = {"lds": lds, "low": low, "high": high}
        if first_B is None:
            first_B = samples_B
        else:
            found[name]["gain"] = np.quantile(samples_B - first_B, (0.025, 0.975)).tolist()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("recipe", type=Path, help="a recipe of `trak frontier`")
    add("--bank", type=Path, required=True, help="its bank of retrained models")
    add(
        "--what",
        nargs="+",
        choices=("weights", "damping", "rules", "dimensions", "directions", "diagonal", "whitening"),
        default=["weights", "damping"],
    )
    add("--checkpoints", type=int, nargs="+", default=[1, 3], help="ensemble sizes")
    add("--average", type=int, default=3, help="for an ensemble of one: mean over so many single checkpoints")
    add("--dim", type=int, default=4096, help="K of sparse columns and of whitened ones")
    add(
        "--projection",
        type=parse_projection,
        default=None,
        help="another than sparse:DIM, as on the command line of trak",
    )
    add("--factors", nargs="+", choices=("ekfac", "kfac"), default=["ekfac"], help="of whitening")
    add("--ratios", type=float, nargs="+", default=[1.0, 10.0], help="damping of whitening")
    add(
        "--samples",
        type=int,
        nargs="+",
        default=[trak.Eigenbasis().sample],
        help="training rows that factors are fitted to; 0 for all",
    )
    add("--only", nargs="+", default=[""], help="trials whose names contain one of these, and the first one")
    add("--save-dir", type=Path, default=None, help="keep features there")
    add("--json", type=Path, default=None, help="write the results there")
    options = parser.parse_args()

    recipe = runpy.run_path(str(options.recipe))
    train_set, targets, checkpoints = (recipe[name] for name in ("train_set", "targets", "checkpoints"))
    common = {
        "model": recipe["model"],
        "task": recipe["task"],
        "projection": options.projection or trak.Sparse(dim=options.dim),
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
    trials = []
    if "whitening" in options.what:
        if options.save_dir is None or options.projection is not None:
            parser.error("--what whitening needs --save-dir, and has its own projections")
        samples = [size or None for size in options.samples]
        trials = list(
            whitened(common["projection"], options.save_dir, options.factors, options.ratios, samples)
        )
    results = []
    for size in options.checkpoints:
        every = [*alternatives(options.what, size, kept), *trials]
        chosen = [
            trial
            for place, trial in enumerate(every)
            if place == 0 or any(part in trial[0] for part in options.only)
        ]
        reference_B = None
        for name, settings in chosen:
            single, samples = [], []
            for first in range(options.average if size == 1 else 1):
                fitted = fit(
                    trak.TRAK(**{**common, **settings}), train_set, checkpoints[first : first + size]
                )
                if fitted is None:
                    continue
                attribution = fitted.attribute(targets)
                scores_NT = attribution.scores.tensor()
                single.append(bank.lds(scores_NT))
                samples.append(resampled_lds(bank, scores_NT))
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
            # Paired with the first row.
            samples_B = np.mean(samples, axis=0)
            reference_B = samples_B if reference_B is None else reference_B
            row["gain_low"], row["gain_high"] = np.quantile(samples_B - reference_B, (0.025, 0.975)).tolist()
            results.append(row)
            gain = f"gain [{row['gain_low']:+.4f}, {row['gain_high']:+.4f}]"
            print(
                f"M = {size:2d}  {name:34s} LDS {row['lds']:.4f}  {gain}  λ {row['damping']:.4g}", flush=True
            )
            if options.json is not None:
                options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
