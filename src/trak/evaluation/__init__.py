"""Is an attribution right? Measures for the [N, T] scores of any method, as functions of values.

masks = random_subsets(num_rows, 60, seed=0)          # [S, N]: which rows each retrained model saw
result = lds(attribution.scores, masks, outputs)      # outputs [S, T] of the retrained models
result.mean, result.low, result.high

curve = mislabel_curve(attribution.self_influence(), corrupted)
curve.auc
"""

from trak.evaluation.bootstrap import Interval, bootstrap_mean, percentile_interval
from trak.evaluation.lds import LdsResult, lds, predictions
from trak.evaluation.mislabels import MislabelResult, mislabel_curve
from trak.evaluation.ranks import average_ranks, spearman
from trak.evaluation.subsets import half_splits, random_subsets

__all__ = [
    "Interval",
    "LdsResult",
    "MislabelResult",
    "average_ranks",
    "bootstrap_mean",
    "half_splits",
    "lds",
    "mislabel_curve",
    "percentile_interval",
    "predictions",
    "random_subsets",
    "spearman",
]
