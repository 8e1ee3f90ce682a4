"""Classifiers of every position of their input: segmentation of images, of volumes, of signals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trak.batches import describe
from trak.errors import InputError
from trak.tasks.series import IGNORED, Positions, SeriesTask, check_labels, check_options, check_positions


@dataclass(frozen=True)
class DenseClassification(SeriesTask):
    """f = the mean (or sum) over an input's positions of log(p / (1 − p)) of the position's class.

    Batches are (inputs, labels [B, ...]), or mappings with `labels` whose other fields are passed to the model by name. The model gives
    logits [B, C, ...], as a tensor, as `.logits`, or as the entry "out" of a mapping; one channel is a binary classifier with labels 0
    and 1. To explain a region, write `ignore_index` into the labels outside.

    Attributes:
        reduction: "mean" or "sum" over positions that are not ignored.
        weights: "per_position": training rows are featurized by −∇L = Σ_t q_t ∇f_t, each position with its own q_t = 1 − p_t, and have
            weight 1. "mean": by ∇f, with the mean of q_t for their weight. "single_position": rows with one position each.
        ignore_index: the label of positions that do not count.
    """

    reduction: str = "mean"
    weights: str = "per_position"
    ignore_index: int = IGNORED

    def __post_init__(self) -> None:
        check_options(self.reduction, self.weights)

    def positions(self, model: nn.Module, batch: Any) -> Positions:
        """Logits and labels of every position, [B, T]."""
        if isinstance(batch, Mapping) and "labels" in batch:
            labels = batch["labels"]
            output = model(**{name: value for name, value in batch.items() if name != "labels"})
        elif isinstance(batch, (tuple, list)) and len(batch) == 2:
            labels, output = batch[1], model(batch[0])
        else:
            raise InputError(
                f"dense_classification expects batches (inputs, labels), or a mapping with `labels`; got {describe(batch)}"
            )
        labels = check_labels(labels, what="dense_classification", ndim=None)
        logits = _logits(output)
        if isinstance(logits, Tensor) and (logits.shape[:1], logits.shape[2:]) == (
            labels.shape[:1],
            labels.shape[1:],
        ):
            logits = logits.flatten(2).movedim(1, 2)
            if logits.shape[2] == 1:
                # log(p / (1 − p)) of two classes, of which the first has logit 0.
                logits = torch.cat([torch.zeros_like(logits), logits], 2)
            labels = labels.flatten(1)
        return check_positions(
            logits,
            labels,
            labels != self.ignore_index,
            what="dense_classification",
            advice="The model must give [batch, classes, …] of the labels' size: resize its logits in a wrapper, or the labels",
        )

    def fingerprint(self) -> dict[str, Any]:
        """Name, reduction, weights and the ignored label."""
        return {**super().fingerprint(), "ignore_index": self.ignore_index}


def _logits(output: Any) -> Any:
    if isinstance(output, Mapping) and "out" in output:
        return output["out"]
    return getattr(output, "logits", output)
