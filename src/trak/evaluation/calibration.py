"""Do predicted changes have the real size? The LDS asks for their order only.

Legend: S subsets, T targets, B bootstrap resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from trak.errors import InputError
from trak.evaluation._values import Floats, as_masks, check_axis, check_count
from trak.evaluation.bootstrap import percentile_interval
from trak.evaluation.estimates import Counts, crossed_counts
from trak.evaluation.lds import mean_outputs, predictions


@dataclass(frozen=True, eq=False)
class CalibrationResult:
    """What `calibration_slope` found.

    Attributes:
        per_target: slope of each target, [T] float64; NaN where the predictions do not vary.
        slope: the pooled slope.
        low: lower end of the bootstrap interval of `slope`.
        high: upper end.
        confidence: level of the interval.
        num_subsets: S.
        num_targets: T, the left-out ones included.
        num_models: R, retrained models per subset whose outputs were averaged.
        num_constant: targets whose predictions are the same on every subset; they are in no slope.
    """

    per_target: Floats
    slope: float
    low: float
    high: float
    confidence: float
    num_subsets: int
    num_targets: int
    num_models: int
    num_constant: int

    def __str__(self) -> str:
        """One line: slope, interval and sizes."""
        left_out = f", {self.num_constant} constant targets left out" if self.num_constant else ""
        return (
            f"slope {self.slope:.3f} [{self.low:.3f}, {self.high:.3f}] "
            f"({self.num_targets} targets, {self.num_subsets} subsets × {self.num_models} models{left_out})"
        )


def calibration_slope(
    scores: Any,
    masks: Any,
    outputs: Any,
    *,
    num_bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> CalibrationResult:
    """Least-squares slope of actual changes of the output on predicted ones; 1 = they have the real size.

    With p_st = Σ_{i∈s} τ_it predicted and f_st actual, and bars for means over subsets, target t has

        slope_t = Σ_s (p_st − p̄_t)(f_st − f̄_t) / Σ_s (p_st − p̄_t)²

    (its own intercept, since additive scores predict up to a constant), and the pooled slope sums numerator
    and denominator over targets: the common slope of a regression with one intercept per target. Targets
    whose predictions vary more weigh more. Above 1 the real changes are larger than predicted, below 1
    smaller. Expect TRAK far above 1 for confident classifiers: its kernel leaves out the curvature p(1 − p)
    of the loss (Park et al., 2023, section 3), and damping shrinks scores further. Noise in the scores pulls
    the slope towards 0, as errors in a regressor do (Fuller, Measurement Error Models, 1987, section 1.1): a
    slope below 1 is not by itself a matter of scale.

    The interval is a percentile bootstrap that resamples subsets and targets together, as that of `lds`.

    Args:
        scores: [N, T], in units of the output: an array, a tensor or lazy scores (read in blocks of rows).
        masks: as in `lds`.
        outputs: as in `lds`.
        num_bootstrap: as in `lds`.
        seed: as in `lds`.
        confidence: as in `lds`.

    Returns:
        Slopes and the interval of the pooled one.

    Raises:
        InputError: shapes that disagree, fewer than three subsets, or no target whose predictions vary.
        NonFiniteError: NaN or infinity in scores or outputs.
    """
    check_count(num_bootstrap, "num_bootstrap", 1)
    masks_SN = as_masks(masks)
    outputs_ST, num_models = mean_outputs(outputs, masks_SN)
    predicted_ST = predictions(scores, masks_SN)
    check_axis(predicted_ST.shape[1], outputs_ST.shape[1], what="scores", axis="T (targets)", other="outputs")
    predicted_ST = predicted_ST - predicted_ST.mean(axis=0)
    # The mean of equal numbers may miss them by a rounding: only what is constant before counts as such.
    varies_T = np.ptp(predicted_ST, axis=0) > 0
    if not varies_T.any():
        raise InputError(
            f"The predictions of none of the {len(varies_T)} targets vary over the {len(masks_SN)} subsets: "
            "there is no slope. Check that the masks differ and that the scores are not all equal."
        )
    predicted_ST = np.where(varies_T, predicted_ST, 0.0)
    actual_ST = outputs_ST - outputs_ST.mean(axis=0)
    covariance_T = (predicted_ST * actual_ST).sum(axis=0)
    variance_T = (predicted_ST**2).sum(axis=0)
    counts = crossed_counts(*predicted_ST.shape, num_bootstrap=num_bootstrap, seed=seed)
    interval = percentile_interval(_pooled(predicted_ST, actual_ST, *counts), confidence=confidence)
    return CalibrationResult(
        per_target=np.where(varies_T, covariance_T / np.where(varies_T, variance_T, 1.0), np.nan),
        slope=float(covariance_T.sum() / variance_T.sum()),
        low=interval.low,
        high=interval.high,
        confidence=confidence,
        num_subsets=len(masks_SN),
        num_targets=len(varies_T),
        num_models=num_models,
        num_constant=int((~varies_T).sum()),
    )


def _pooled(predicted_ST: Floats, actual_ST: Floats, counts_BS: Counts, counts_BT: Counts) -> Floats:
    """The pooled slope in each resample of subsets and targets, [B]; NaN where no prediction varies."""
    weights_BS = counts_BS / counts_BS.sum(axis=1, keepdims=True)
    mean_BT = weights_BS @ predicted_ST
    covariance_BT = weights_BS @ (predicted_ST * actual_ST) - mean_BT * (weights_BS @ actual_ST)
    variance_BT = weights_BS @ predicted_ST**2 - mean_BT**2
    numerator_B = (counts_BT * covariance_BT).sum(axis=1)
    denominator_B = (counts_BT * variance_BT).sum(axis=1)
    # A difference of squares: what is left of a resample of one subset is rounding.
    defined_B = denominator_B > 1e-12 * (counts_BT * (predicted_ST**2).mean(axis=0)).sum(axis=1)
    return np.where(defined_B, numerator_B / np.where(defined_B, denominator_B, 1.0), np.nan)
