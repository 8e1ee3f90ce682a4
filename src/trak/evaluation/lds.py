"""The linear datamodeling score: do summed scores predict what retraining on a subset does?

Legend: N training rows, T targets, S subsets, R retrained models per subset, B bootstrap resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from trak.errors import InputError
from trak.evaluation._values import Bools, Floats, as_array, as_masks, check_axis, check_count, check_finite
from trak.evaluation.bootstrap import percentile_interval
from trak.evaluation.estimates import crossed_counts, resampled_mean
from trak.evaluation.ranks import average_ranks, resampled_correlation, spearman

ROW_BLOCK = 8192


@dataclass(frozen=True, eq=False)
class LdsResult:
    """What `lds` found.

    Attributes:
        per_target: Spearman correlation of each target, [T] float64; NaN for the targets left out (see
            `num_constant`).
        mean: mean over the targets that have one; the LDS.
        low: lower end of the bootstrap interval of `mean`.
        high: upper end.
        confidence: level of the interval.
        num_subsets: S.
        num_targets: T, the left-out ones included.
        num_models: R, retrained models per subset whose outputs were averaged.
        num_constant: targets whose predictions or outputs are the same on every subset: they have no rank
            correlation, and are neither in `mean` nor in the interval.
    """

    per_target: Floats
    mean: float
    low: float
    high: float
    confidence: float
    num_subsets: int
    num_targets: int
    num_models: int
    num_constant: int

    def __str__(self) -> str:
        """One line: mean, interval and sizes."""
        left_out = f", {self.num_constant} constant targets left out" if self.num_constant else ""
        return (
            f"LDS {self.mean:.3f} [{self.low:.3f}, {self.high:.3f}] "
            f"({self.num_targets} targets, {self.num_subsets} subsets × {self.num_models} models{left_out})"
        )


def predictions(scores: Any, masks: Any) -> Floats:
    """What additive scores predict for each subset: the sum of the scores of the rows in it, masks · scores.

    Args:
        scores: [N, T] of any real dtype: an array, a tensor, or a lazy object with `shape`, slicing and
            `__array__` (read in blocks of rows).
        masks: [S, N], bool.

    Returns:
        Predictions [S, T], float64, up to a constant per target, in the units of the scores.

    Raises:
        InputError: shapes that disagree, or masks of other values than 0 and 1.
        NonFiniteError: NaN or infinity in the scores.
    """
    masks_SN = as_masks(masks)
    shape = tuple(scores.shape) if hasattr(scores, "shape") else np.shape(scores)
    if len(shape) != 2:
        raise InputError(
            "scores must be [N, T], one row per training example and one column per target, "
            f"got shape {list(shape)}."
        )
    check_axis(shape[0], masks_SN.shape[1], what="scores", axis="N (training rows)", other="masks")
    lazy = hasattr(scores, "shape")
    out_ST = np.zeros((masks_SN.shape[0], shape[1]))
    magnitude_T = np.zeros(shape[1])
    for start in range(0, shape[0], ROW_BLOCK):
        rows = slice(start, min(start + ROW_BLOCK, shape[0]))
        block = as_array(scores[rows] if lazy else np.asarray(scores)[rows]).astype(np.float64)
        check_finite(block, f"scores (rows {rows.start} to {rows.stop})")
        out_ST += masks_SN[:, rows].astype(np.float64) @ block
        magnitude_T += np.abs(block).sum(axis=0)
    # Equal scores predict the same for all subsets of one size, but sums over other rows differ in their last
    # digits: without this, ranks would be made of rounding.
    within_rounding_T = np.ptp(out_ST, axis=0) <= shape[0] * np.finfo(np.float64).eps * magnitude_T
    return np.where(within_rounding_T, out_ST[0], out_ST)


def lds(
    scores: Any,
    masks: Any,
    outputs: Any,
    *,
    num_bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> LdsResult:
    """The linear datamodeling score of Park et al. (2023), definition 2.3.

    For each target: the Spearman rank correlation, over S random subsets of the training set, between the
    model output after training on the subset and the sum of the scores of the rows in the subset; then the
    mean over targets.

    The interval is a percentile bootstrap that resamples subsets and targets together, each with replacement,
    and so covers both the choice of subsets and that of targets (somewhat generously, as resampling two
    crossed factors does). Ranks are those of the full sample: in a resample repeated subsets tie with
    themselves, and ranking anew would bias the correlation towards zero. The interval does not cover the
    randomness of the attribution itself (its checkpoints, its projection).

    Args:
        scores: [N, T] scores of any method; positive means that the row raises the output.
        masks: [S, N] bool, the rows that each retrained model saw (`random_subsets`). They should be subsets
            that the attribution's own checkpoints were not trained on.
        outputs: [S, T], the model output f of each target after training on each subset; or [S, R, T] for R
            models per subset, which are averaged first (less noise from training).
        num_bootstrap: resamples for the interval.
        seed: of the bootstrap; the same seed gives the same interval.
        confidence: level of the interval.

    Returns:
        Mean, interval, and correlation per target. Targets that are constant over the subsets are counted in
        `num_constant` and left out.

    Raises:
        InputError: shapes that disagree (the message names the axis), fewer than three subsets, or no target
            that varies.
        NonFiniteError: NaN or infinity in scores or outputs.
    """
    check_count(num_bootstrap, "num_bootstrap", 1)
    masks_SN = as_masks(masks)
    outputs_ST, num_models = mean_outputs(outputs, masks_SN)
    predictions_ST = predictions(scores, masks_SN)
    check_axis(
        predictions_ST.shape[1], outputs_ST.shape[1], what="scores", axis="T (targets)", other="outputs"
    )
    per_target = spearman(predictions_ST, outputs_ST)
    varies_T = ~np.isnan(per_target)
    if not varies_T.any():
        raise InputError(
            f"None of the {len(varies_T)} targets has a rank correlation: over the {len(masks_SN)} subsets "
            "either its predictions or its outputs are all the same. Check that the masks differ and that the "
            "scores are not all zero."
        )
    samples_B = _bootstrap(predictions_ST[:, varies_T], outputs_ST[:, varies_T], num_bootstrap, seed)
    interval = percentile_interval(samples_B, confidence=confidence)
    return LdsResult(
        per_target=per_target,
        mean=float(per_target[varies_T].mean()),
        low=interval.low,
        high=interval.high,
        confidence=confidence,
        num_subsets=len(masks_SN),
        num_targets=len(per_target),
        num_models=num_models,
        num_constant=int((~varies_T).sum()),
    )


def mean_outputs(outputs: Any, masks_SN: Bools) -> tuple[Floats, int]:
    """(outputs [S, T] averaged over models, R), checked against the masks.

    Raises:
        InputError: another shape than [S, T] or [S, R, T], or fewer than three subsets.
        NonFiniteError: NaN or infinity.
    """
    array = as_array(outputs)
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise InputError(
            "outputs must be [S, T], or [S, R, T] for R models per subset, and not empty; "
            f"got shape {list(array.shape)}."
        )
    check_axis(array.shape[0], masks_SN.shape[0], what="outputs", axis="S (subsets)", other="masks")
    if len(masks_SN) < 3:
        raise InputError(
            f"A measure over subsets needs at least 3 subsets (a few dozen to say much), got {len(masks_SN)}."
        )
    floats = array.astype(np.float64)
    check_finite(floats, "outputs")
    return (floats, 1) if floats.ndim == 2 else (floats.mean(axis=1), floats.shape[1])


def _bootstrap(predictions_ST: Floats, outputs_ST: Floats, num_bootstrap: int, seed: int) -> Floats:
    """The mean correlation in each resample of subsets and targets, [B]; NaN where no target varies."""
    subset_counts_BS, target_counts_BT = crossed_counts(
        *outputs_ST.shape, num_bootstrap=num_bootstrap, seed=seed
    )
    ranks = average_ranks(predictions_ST), average_ranks(outputs_ST)
    return resampled_mean(resampled_correlation(*ranks, subset_counts_BS), target_counts_BT)
