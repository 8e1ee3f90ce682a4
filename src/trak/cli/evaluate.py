"""`trak evaluate`: scores of any tool against a bank of retrained models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trak.cli.output import AsJson, console, json_text, make_table, print_json, say

if TYPE_CHECKING:
    from trak.evaluation import Bank
    from trak.scores import Scores

EPILOG = """\b
SCORES is a folder that trak attribute --out wrote, or a file of any tool:
.npy, .npz, .pt, .safetensors, .csv, .parquet. BANK is a folder of
trak.evaluation.retrain, or bank.npz.

\b
Examples:
  trak evaluate attribution bank
  trak evaluate theirs.npy bank --orientation TN --json
  trak evaluate scores.safetensors bank --key "layer1.*" --out result.json
"""


@dataclass(frozen=True)
class Row:
    """One measure: its value and interval."""

    measure: str
    value: float
    low: float
    high: float
    meaning: str


def evaluate(
    scores: Annotated[Path, typer.Argument(metavar="SCORES", help="Scores, see below.", show_default=False)],
    bank: Annotated[
        Path, typer.Argument(metavar="BANK", help="Retrained models, see below.", show_default=False)
    ],
    orientation: Annotated[
        str | None,
        typer.Option(metavar="NT|TN", help="NT: a row per training example; TN: per target."),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Which array of several; a pattern sums those that match."),
    ] = None,
    negate: Annotated[
        bool, typer.Option("--negate", help="The file's positive scores lower the output.")
    ] = False,
    all_targets: Annotated[
        bool,
        typer.Option("--all-targets", help="Scores are of all target rows, of which the bank has some."),
    ] = False,
    num_train: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Training rows, where bank.npz does not tell.")
    ] = None,
    num_bootstrap: Annotated[
        int, typer.Option(metavar="B", min=1, help="Resamples for the intervals.")
    ] = 1000,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of the resampling.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE.json", help="Write the JSON there too.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Test scores against retraining: LDS, calibration and noise ceiling.

    The linear datamodeling score says how well summed scores predict the outputs of models retrained on subsets,
    the ceiling how well any predictor could, and the slope whether predicted changes have the real size.
    """
    from trak.evaluation import Bank

    loaded = Bank.load(bank, num_train=num_train)
    chosen = _load(scores, loaded, orientation=orientation, key=key, negate=negate, all_targets=all_targets)
    values = _measure(chosen, loaded, num_bootstrap=num_bootstrap, seed=seed)
    if out is not None:
        out.write_text(json_text(values) + "\n", encoding="utf-8")
    if as_json:
        print_json(values)
    else:
        _print(values)
    if out is not None:
        say(f"Wrote {out}")


def _load(
    path: Path, bank: Bank, *, orientation: str | None, key: str | None, negate: bool, all_targets: bool
) -> Scores:
    """The scores of the bank's targets."""
    from trak.errors import InputError
    from trak.evaluation import load_scores

    scores = load_scores(
        path,
        orientation=orientation,
        num_train=bank.num_train,
        num_targets=None if all_targets else bank.outputs.shape[2],
        key=key,
        negate=negate,
    )
    if not all_targets:
        return scores
    last = int(bank.target_rows.max())
    if last >= scores.num_targets:
        raise InputError(
            f"--all-targets: the bank has target row {last}, but {path} has scores of {scores.num_targets} targets only"
        )
    return scores.select_targets(bank.target_rows)


def _measure(scores: Scores, bank: Bank, *, num_bootstrap: int, seed: int) -> dict[str, Any]:
    """Everything as JSON values; the ceiling is None for one model per subset."""
    from trak.evaluation import calibration_slope, noise_ceiling

    options = {"num_bootstrap": num_bootstrap, "seed": seed}
    lds = bank.lds(scores, num_bootstrap=num_bootstrap, seed=seed)
    slope = calibration_slope(scores, bank.masks, bank.outputs, num_bootstrap=num_bootstrap, seed=seed)
    num_subsets, num_models, num_targets = bank.outputs.shape
    ceiling = noise_ceiling(bank.outputs, **options) if num_models > 1 else None
    return {
        "num_train": bank.num_train,
        "num_targets": num_targets,
        "num_subsets": num_subsets,
        "models_per_subset": num_models,
        "confidence": lds.confidence,
        "lds": {"mean": lds.mean, "low": lds.low, "high": lds.high, "num_constant": lds.num_constant},
        "calibration_slope": {"slope": slope.slope, "low": slope.low, "high": slope.high},
        "noise_ceiling": None
        if ceiling is None
        else {"mean": ceiling.mean, "low": ceiling.low, "high": ceiling.high},
    }


def _print(values: dict[str, Any]) -> None:
    lds, slope, ceiling = values["lds"], values["calibration_slope"], values["noise_ceiling"]
    rows = [Row("LDS", lds["mean"], lds["low"], lds["high"], "rank correlation with retraining")]
    if ceiling is not None:
        rows.append(
            Row("noise ceiling", ceiling["mean"], ceiling["low"], ceiling["high"], "the highest LDS possible")
        )
    rows.append(Row("slope", slope["slope"], slope["low"], slope["high"], "actual / predicted changes"))
    interval = f"{values['confidence']:.0%} interval"
    table = make_table("measure", "value", interval, "what it is", right=("value", interval))
    for row in rows:
        table.add_row(row.measure, f"{row.value:.3f}", f"{row.low:.3f} to {row.high:.3f}", row.meaning)
    console().print(table)
    say(
        f"{values['num_train']} training rows, {values['num_targets']} targets, {values['num_subsets']} subsets × "
        f"{values['models_per_subset']} models"
    )
    if lds["num_constant"]:
        say(f"{lds['num_constant']} targets do not vary over the subsets and are left out of the LDS")
    if ceiling is None:
        say("No noise ceiling: it needs two models or more for each subset of the bank")
    elif ceiling["mean"] > 0:
        say(f"{lds['mean'] / ceiling['mean']:.0%} of what the noise of retraining allows")
