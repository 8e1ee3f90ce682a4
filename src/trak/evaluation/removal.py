"""What removing the highest-scored rows really does, by retraining without them.

Legend: N training rows, T targets, t chosen targets, K removal sizes, R training seeds, B bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trak.errors import InputError
from trak.evaluation._reading import (
    CheckedScores,
    Rows,
    as_row_numbers,
    as_scores,
    as_tensor_positions,
    check_removals,
    top_rows,
)
from trak.evaluation._training import Retraining, Train, check_train, keep_in
from trak.evaluation._values import Floats, check_count
from trak.evaluation.bootstrap import percentile_interval
from trak.evaluation.estimates import Estimate, crossed_counts
from trak.progress import bar

RANDOM = "random"


@dataclass(frozen=True, eq=False)
class RemovalCurve:
    """One method's curve.

    Attributes:
        estimates: for each k, the mean change over targets and seeds, with its interval.
        changes: f(without the k rows) − f(all rows) for each k, training seed and target, [K, R, t] float64.
    """

    estimates: Mapping[int, Estimate]
    changes: Floats


@dataclass(frozen=True, eq=False)
class RemovalResult:
    """What `removal_curve` found.

    Attributes:
        curves: a curve for each method, and one named "random" (unless it was left out).
        k: the numbers of removed rows, [K], rising.
        targets: the chosen targets, [t] int64.
        full_outputs: f after training on all rows, [R, t] float64.
        num_rows: N.
        num_seeds: R.
        num_trainings: models needed, those that were kept in a folder included.
    """

    curves: Mapping[str, RemovalCurve]
    k: tuple[int, ...]
    targets: Rows
    full_outputs: Floats
    num_rows: int
    num_seeds: int
    num_trainings: int

    def __str__(self) -> str:
        """A line for each method: the change at each k."""
        lines = [f"change of the output ({len(self.targets)} targets × {self.num_seeds} seeds)"]
        for name, curve in self.curves.items():
            parts = ", ".join(f"k={k}: {estimate}" for k, estimate in curve.estimates.items())
            lines.append(f"{name}: {parts}")
        return "\n".join(lines)


def removal_curve(
    train: Train,
    scores: Mapping[str, Any],
    *,
    k: Any,
    targets: Sequence[int] | None = None,
    num_seeds: int = 3,
    random: bool = True,
    num_bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    folder: str | Path | None = None,
    version: str | None = None,
    progress: bool | None = None,
) -> RemovalResult:
    """Retrains without each target's k highest-scored rows, and reports how its output changes.

    change(t, k, r) = f_t(all rows but the top k of t; seed r) − f_t(all rows; seed r): below 0 where the
    removed rows supported the output, and the lower the better the method (Hooker et al., 2019, for features;
    Ilyas et al., 2022, section 4, and Park et al., 2023, section 5 for training rows). Random removal of as
    many rows is the level to beat; its rows are drawn anew for each training seed, and nested over k as the
    methods' are.

    The interval of a mean is a percentile bootstrap that resamples targets and training seeds together. With
    few seeds it understates the noise of training: with one it covers the choice of targets alone, and with
    one seed and one target there is none (NaN).

    Trains R · (1 + K · (t · number of methods + 1)) models.

    Args:
        train: (indices, seed) -> outputs [T]. Must train from scratch on the rows `indices` ([n] int64 tensor,
            rising) with all randomness taken from `seed`, and return the output f of every scored target.
        scores: by method name, scores [N, T] of any kind.
        k: numbers of rows to remove, one or several, below N.
        targets: which targets to examine; None for all of them.
        num_seeds: R; training seeds are seed, seed + 1, …, seed + R − 1, the same for every set of rows.
        random: remove random rows too.
        num_bootstrap: resamples for the intervals.
        seed: first training seed, and seed of random removal and of the bootstrap.
        confidence: level of the intervals.
        folder: keep each model's outputs there: a run that was killed, or another one that needs some of the same models, goes on
            from them, whatever its scores. None keeps nothing. `removal_curve` and `brittleness` may share it if they
            have the same `train`.
        version: any word for your `train`, of which only the name can be compared: change it when the function changes, and
            models of the old version are refused.
        progress: True or False to force a progress bar over trainings; None shows one to those who watch.

    Returns:
        A curve for each method.

    Raises:
        InputError: a wrong argument, scores of different shapes, or `train` returns something else than [T].
        NonFiniteError: NaN or infinity in scores or outputs.
        FingerprintError: the folder is of other data or another version.
        CorruptShardError: a damaged file in the folder.
    """
    check_train(train)
    for value, name in ((num_seeds, "num_seeds"), (num_bootstrap, "num_bootstrap")):
        check_count(value, name, 1)
    check_count(seed, "seed", 0)
    methods = _check_methods(scores, random)
    num_rows, num_targets = next(iter(methods.values())).shape
    ks = check_removals(k, num_rows)
    chosen = (
        np.arange(num_targets)
        if targets is None
        else as_row_numbers(targets, num_targets, "targets", "target")
    )
    seeds = range(seed, seed + num_seeds)
    num_trainings = num_seeds * (1 + len(ks) * (len(chosen) * len(methods) + random))
    positions = as_tensor_positions(chosen)
    tops = {name: top_rows(one.select_targets(positions), ks[-1]) for name, one in methods.items()}
    kept = keep_in(folder, train, num_rows=num_rows, num_targets=num_targets, version=version)
    with bar(num_trainings, "Retraining", unit="models", enabled=progress) as shown:
        models = Retraining(train, num_rows, num_targets, shown, kept)
        full_Rt = models.without_by_seed(np.zeros(0, dtype=np.int64), seeds)[:, chosen]
        changes = {name: _without_top(models, top, ks, chosen, seeds) - full_Rt for name, top in tops.items()}
        if random:
            changes[RANDOM] = _without_random(models, ks, chosen, seeds) - full_Rt
    return RemovalResult(
        curves={
            name: RemovalCurve(_estimates(one, ks, num_bootstrap, seed, confidence), one)
            for name, one in changes.items()
        },
        k=ks,
        targets=chosen,
        full_outputs=full_Rt,
        num_rows=num_rows,
        num_seeds=num_seeds,
        num_trainings=num_trainings,
    )


def _without_top(models: Retraining, top_tk: Rows, ks: tuple[int, ...], chosen: Rows, seeds: range) -> Floats:
    """Each target's output without its own top rows, [K, R, t]."""
    out_KRt = np.empty((len(ks), len(seeds), len(chosen)))
    for column, (target, top_k) in enumerate(zip(chosen, top_tk)):
        for index, k in enumerate(ks):
            out_KRt[index, :, column] = models.without_by_seed(top_k[:k], seeds)[:, target]
    return out_KRt


def _without_random(models: Retraining, ks: tuple[int, ...], chosen: Rows, seeds: range) -> Floats:
    """Outputs without random rows, [K, R, t]: one training serves all targets."""
    out_KRt = np.empty((len(ks), len(seeds), len(chosen)))
    for number, seed in enumerate(seeds):
        order = np.random.Generator(np.random.PCG64([seed, models.num_rows])).permutation(models.num_rows)
        for index, k in enumerate(ks):
            out_KRt[index, number] = models.without(order[:k], seed)[chosen]
    return out_KRt


def _estimates(
    changes_KRt: Floats, ks: tuple[int, ...], num_bootstrap: int, seed: int, confidence: float
) -> dict[int, Estimate]:
    """Mean change and interval for each k."""
    _, num_seeds, num_targets = changes_KRt.shape
    counts_BR, counts_Bt = crossed_counts(num_seeds, num_targets, num_bootstrap=num_bootstrap, seed=seed)
    out = {}
    for k, changes_Rt in zip(ks, changes_KRt):
        samples_B = ((counts_BR @ changes_Rt) * counts_Bt).sum(axis=1) / changes_Rt.size
        if changes_Rt.size == 1:
            samples_B = np.full(1, np.nan)
        interval = percentile_interval(samples_B, confidence=confidence)
        out[k] = Estimate(float(changes_Rt.mean()), interval.low, interval.high, confidence)
    return out


def _check_methods(scores: Any, random: bool) -> dict[str, CheckedScores]:
    """Scores by method name, of one shape."""
    if not isinstance(scores, Mapping) or not scores:
        raise InputError(
            "scores must be a mapping from method names to scores [N, T], such as {'trak': attribution.scores}, "
            f"got {type(scores).__name__}."
        )
    if random and RANDOM in scores:
        raise InputError(
            f"A method is named {RANDOM!r}, as the random removal is: rename it, or pass random=False."
        )
    methods = {name: as_scores(one, f"scores[{name!r}]") for name, one in scores.items()}
    shapes = {name: list(one.shape) for name, one in methods.items()}
    if len({tuple(shape) for shape in shapes.values()}) > 1:
        raise InputError(
            f"All methods must score the same training rows for the same targets, got shapes {shapes}."
        )
    return methods
