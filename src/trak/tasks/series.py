"""Examples that are a series of classifications: the tokens of a text, the pixels of an image.

Shape legend: B examples, T positions, C classes.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trak.errors import InputError
from trak.tasks.base import Task
from trak.tasks.looking import is_true
from trak.tasks.margins import multiclass_margin

IGNORED = -100
"""The label of positions that are no targets, as in torch's cross-entropy."""

REDUCTIONS = ("sum", "mean")
WEIGHTS = ("per_position", "mean", "single_position")


@dataclass(frozen=True, eq=False)
class Positions:
    """What a forward pass says of every position.

    Attributes:
        logits: [B, T, C].
        labels: [B, T] int64; anything where they do not count.
        counted: [B, T] bool: the positions that are targets.
    """

    logits: Tensor
    labels: Tensor
    counted: Tensor


class SeriesTask(Task):
    """f = Σ_t f_t (or the mean) of margins f_t = log(p_t / (1 − p_t)) over the target positions t of an example.

    The loss of an example is the sum (or mean) of its positions' cross-entropies, so that −∇L = Σ_t q_t ∇f_t: each position has a
    weight of its own, and there are three ways to have them:

    - "per_position": training rows are featurized by −L itself, with weight 1 (see `for_training`): exact.
    - "mean": features are ∇f, and the weight is the mean of q_t: one weight for each example.
    - "single_position": every row has one position only, of which q = 1 − p is the weight: exact, and a log loss like that of the
      classifiers.

    A subclass says what the positions are, and has the two fields.

    Attributes:
        reduction: "sum" or "mean" over positions.
        weights: "per_position", "mean" or "single_position".
    """

    reduction: str
    weights: str

    @abstractmethod
    def positions(self, model: nn.Module, batch: Any) -> Positions:
        """Logits, labels and which positions count, from a forward pass."""

    def margins(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """(f_t [B, T], zero where a position does not count; counted [B, T] bool)."""
        found = self.positions(model, batch)
        labels_BT = found.labels.masked_fill(~found.counted, 0)
        margins_BT = multiclass_margin(found.logits.flatten(0, 1), labels_BT.flatten()).reshape(
            labels_BT.shape
        )
        return margins_BT.masked_fill(~found.counted, 0), found.counted

    def reduced(self, values_BT: Tensor, counted_BT: Tensor) -> Tensor:
        """Sum or mean over the positions that count, [B]; zero without any."""
        sums_B = values_BT.sum(1)
        return sums_B if self.reduction == "sum" else sums_B / counted_BT.sum(1).clamp_min(1)

    def output(self, model: nn.Module, batch: Any) -> Tensor:
        """Σ_t f_t, or the mean, [B].

        Raises:
            InputError: an example without target positions.
        """
        return self.output_and_weight(model, batch)[0]

    def output_and_weight(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """(f [B] with its graph, weight [B]): 1 for "per_position", else the mean of q_t = 1 − p_t.

        Raises:
            InputError: an example without target positions, or with several and `weights="single_position"`.
        """
        margins_BT, counted_BT = self.margins(model, batch)
        counts_B = counted_BT.sum(1)
        refuse_empty(counted_BT, type(self).__name__)
        impossible_B = counts_B == 0
        if self.weights == "single_position":
            refuse_several(counts_B, type(self).__name__)
            impossible_B = counts_B != 1
        # Where values are not looked at, as under vmap, NaN tells, and is refused later.
        outputs_B = self.reduced(margins_BT, counted_BT).masked_fill(impossible_B, float("nan"))
        if self.weights == "per_position":
            return outputs_B, torch.ones_like(outputs_B)
        weights_BT = torch.sigmoid(-margins_BT.detach()) * counted_BT
        weights_B = weights_BT.sum(1) / counts_B.clamp_min(1)
        return outputs_B, weights_B

    def loss_weight(self, outputs: Tensor) -> Tensor:
        """Q = sigmoid(−f) of single positions; of more, each has its own.

        Raises:
            InputError: unless `weights="single_position"`.
        """
        if self.weights == "single_position":
            return torch.sigmoid(-outputs)
        raise InputError(
            f"the loss of {type(self).__name__} is a sum over positions and no function of f: call output_and_weight(model, batch), or "
            "for_training() for the task whose features are −∇loss"
        )

    @property
    def is_log_loss(self) -> bool:
        """Of single positions; otherwise it is a sum of them."""
        return self.weights == "single_position"

    def for_training(self) -> Task:
        """With `weights="per_position"` the log-likelihood −L, whose gradient is Σ_t q_t ∇f_t; otherwise this task."""
        return LogLikelihood(self) if self.weights == "per_position" else self

    def fingerprint(self) -> dict[str, Any]:
        """Name, reduction and weights."""
        return {"task": type(self).__name__, "reduction": self.reduction, "weights": self.weights}


@dataclass(frozen=True)
class LogLikelihood(Task):
    """−L = Σ_t log p_t (or the mean) of a series task's target positions, with weight 1.

    Since log p_t = −log(1 + e^(−f_t)), its gradient is Σ_t q_t ∇f_t with q_t = 1 − p_t: training rows featurized by it have each
    position's weight inside their features. An example without target positions has output and gradient 0, and no influence.

    Attributes:
        series: whose positions these are.
    """

    series: SeriesTask

    def output(self, model: nn.Module, batch: Any) -> Tensor:
        """Σ_t log p_t, or the mean, [B]."""
        margins_BT, counted_BT = self.series.margins(model, batch)
        return self.series.reduced(F.logsigmoid(margins_BT).masked_fill(~counted_BT, 0), counted_BT)

    def loss_weight(self, outputs: Tensor) -> Tensor:
        """Ones: the output is the negative loss."""
        return torch.ones_like(outputs)

    @property
    def is_log_loss(self) -> bool:
        """No: the weights are 1."""
        return False

    def fingerprint(self) -> dict[str, Any]:
        """Its name and the series task's."""
        return {"task": "LogLikelihood", "of": self.series.fingerprint()}


def check_options(reduction: str, weights: str) -> None:
    """Nothing if both are known.

    Raises:
        InputError: they are not.
    """
    for name, value, allowed in (("reduction", reduction, REDUCTIONS), ("weights", weights, WEIGHTS)):
        if value not in allowed:
            raise InputError(f"{name} must be {' or '.join(map(repr, allowed))}; got {value!r}")


def check_positions(
    logits: object, labels: Tensor, counted: Tensor, *, what: str, advice: str = ""
) -> Positions:
    """The positions, or an error that says what the model and the batch gave instead.

    Args:
        logits: what should be [B, T, C].
        labels: [B, T], checked to be integers.
        counted: [B, T] bool.
        what: the task, for messages.
        advice: what to do where the shapes do not fit.
    """
    if (
        not isinstance(logits, Tensor)
        or logits.ndim != 3
        or logits.shape[:2] != labels.shape
        or logits.shape[2] < 2
    ):
        got = f"{list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(
            f"{what} needs logits [batch, positions, classes] for labels [batch, positions]; got logits {got} and labels "
            f"{list(labels.shape)}. {advice or 'For other models write a task: trak.CustomTask(lambda model, batch: ...)'}"
        )
    labels = labels.long()
    outside = counted & ((labels < 0) | (labels >= logits.shape[2]))
    if is_true(outside.any()):
        row, position = (int(index) for index in outside.nonzero()[0])
        raise InputError(
            f"{what} needs labels 0 to {logits.shape[2] - 1}, or {IGNORED} for positions that are no targets; got {int(labels[row, position])} "
            f"at position {position} of example {row} of the batch"
        )
    return Positions(logits, labels, counted)


def check_labels(labels: object, *, what: str, ndim: int | None = 2) -> Tensor:
    """Integer labels, or an error."""
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or (ndim is not None and labels.ndim != ndim)
    ):
        got = (
            f"{labels.dtype} of shape {list(labels.shape)}"
            if isinstance(labels, Tensor)
            else type(labels).__name__
        )
        raise InputError(f"{what} needs integer labels, a tensor [batch, positions]; got {got}")
    return labels


def refuse_empty(counted_BT: Tensor, what: str) -> None:
    """Nothing if every example has target positions, or if values are not looked at.

    Raises:
        InputError: one has none.
    """
    empty_B = ~counted_BT.any(1)
    if is_true(empty_B.any()):
        raise InputError(
            f"{what}: example {int(empty_B.nonzero()[0])} of the batch, {int(empty_B.sum())} of {len(empty_B)} in all, has no target positions (all "
            f"labels are {IGNORED} or masked), so that there is nothing to explain. Leave such examples out, or look at how labels are made"
        )


def refuse_several(counts_B: Tensor, what: str) -> None:
    """Nothing if every example has at most one target position, or if values are not looked at.

    Raises:
        InputError: one has several.
    """
    if is_true((counts_B > 1).any()):
        raise InputError(
            f'{what}(weights="single_position") is for rows of one target position, as token_rows() makes them; example '
            f'{int((counts_B > 1).nonzero()[0])} of the batch has {int(counts_B.max())}. For whole sequences use weights="per_position"'
        )
