"""Is an attribution right? Measures for the [N, T] scores of any method, as functions of values.

masks = random_subsets(num_rows, 60, seed=0)          # [S, N]: which rows each retrained model saw
result = lds(attribution.scores, masks, outputs)      # outputs [S, T] of the retrained models
result.mean, result.low, result.high

noise_ceiling(outputs_SRT)                            # the LDS that noise in retraining allows
calibration_slope(attribution.scores, masks, outputs) # 1: predicted changes have the real size

removal_curve(train, {"trak": attribution.scores}, k=[10, 40])   # retrain without the top rows
retrieval(attribution.scores, relevant)               # known relevant rows, ranked
overlap(scores_a, scores_b)                           # agreement between projection seeds

lds(load_scores("theirs.npy", orientation="TN"), masks, outputs)  # what another tool wrote

curve = mislabel_curve(attribution.self_influence(), corrupted)
curve.auc
"""

from trak.evaluation.bootstrap import Interval, bootstrap_mean, percentile_interval
from trak.evaluation.brittleness import BrittlenessResult, Flip, brittleness
from trak.evaluation.calibration import CalibrationResult, calibration_slope
from trak.evaluation.ceiling import NoiseCeilingResult, noise_ceiling
from trak.evaluation.estimates import Estimate
from trak.evaluation.lds import LdsResult, lds, predictions
from trak.evaluation.loo import LooResult, loo_correlation, pearson
from trak.evaluation.mislabels import MislabelResult, mislabel_curve
from trak.evaluation.ranks import average_ranks, spearman
from trak.evaluation.removal import RemovalCurve, RemovalResult, removal_curve
from trak.evaluation.retrain import (
    Bank,
    RetrainError,
    load_packed_bank,
    model_seed,
    retrain,
    retrain_stacked,
    seeded,
)
from trak.evaluation.retrieval import RetrievalResult, retrieval
from trak.evaluation.sanity import (
    ClassAgreementResult,
    OverlapResult,
    ScoreCorrelationResult,
    class_agreement,
    overlap,
    score_correlation,
)
from trak.evaluation.score_files import load_scores
from trak.evaluation.subsets import half_splits, random_subsets

__all__ = [
    "Bank",
    "BrittlenessResult",
    "CalibrationResult",
    "ClassAgreementResult",
    "Estimate",
    "Flip",
    "Interval",
    "LdsResult",
    "LooResult",
    "MislabelResult",
    "NoiseCeilingResult",
    "OverlapResult",
    "RemovalCurve",
    "RemovalResult",
    "RetrainError",
    "RetrievalResult",
    "ScoreCorrelationResult",
    "average_ranks",
    "bootstrap_mean",
    "brittleness",
    "calibration_slope",
    "class_agreement",
    "half_splits",
    "lds",
    "load_packed_bank",
    "load_scores",
    "loo_correlation",
    "mislabel_curve",
    "model_seed",
    "noise_ceiling",
    "overlap",
    "pearson",
    "percentile_interval",
    "predictions",
    "random_subsets",
    "removal_curve",
    "retrain",
    "retrain_stacked",
    "retrieval",
    "score_correlation",
    "seeded",
    "spearman",
]
