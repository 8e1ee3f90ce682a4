"""log(p / (1 − p)) of the correct class, in a form that stays finite.

Shape legend: B examples, C classes.
"""

from __future__ import annotations

from torch import Tensor

from trak.errors import InputError
from trak.tasks.blocked import blocked_margin
from trak.tasks.looking import is_true

LARGE = 2**20
"""Logits from which on margins are computed in blocks: of fewer, the tensors that this saves stay in a cache."""


def multiclass_margin(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """F = log(p_y / (1 − p_y)) = logit_y − logsumexp of the other logits (Park et al. 2023, section 2), [B]."""
    classes = logits_BC.shape[1]
    margin = blocked_margin if logits_BC.numel() >= LARGE else margin_as_written
    return _nan_outside(margin(logits_BC, labels_B.clamp(0, classes - 1)), labels_B, classes)


def margin_as_written(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """The margin of labels 0 to C − 1, [B].

    The other logits are summed without the label's: subtracting two probabilities would cancel where p → 1.
    """
    own_B1 = labels_B.unsqueeze(1)
    others_BC = logits_BC.scatter(1, own_B1, float("-inf"))
    return logits_BC.gather(1, own_B1).squeeze(1) - others_BC.logsumexp(1)


def binary_margin(logits_B: Tensor, labels_B: Tensor) -> Tensor:
    """F = logit for label 1 and −logit for label 0: log(p / (1 − p)) of the correct label, [B]."""
    return _nan_outside(logits_B * (2 * labels_B.to(logits_B.dtype) - 1), labels_B, 2)


def _nan_outside(values_B: Tensor, labels_B: Tensor, classes: int) -> Tensor:
    """NaN for labels that do not exist: `check_logits` cannot look at values under vmap."""
    return values_B.masked_fill((labels_B < 0) | (labels_B >= classes), float("nan"))


def class_margin(logits: Tensor, labels_B: Tensor) -> Tensor:
    """The margin for logits [B, C] with C ≥ 2, or for one logit per example ([B] or [B, 1]) with labels 0 and 1."""
    if logits.ndim == 1 or (logits.ndim == 2 and logits.shape[1] == 1):
        return binary_margin(logits.reshape(-1), labels_B)
    return multiclass_margin(logits, labels_B)


def check_logits(logits: object, labels_B: object, *, what: str) -> tuple[Tensor, Tensor]:
    """Logits and labels, or an error that says what the model and the batch gave instead."""
    if not isinstance(logits, Tensor):
        raise InputError(
            f"{what} needs the model to return logits as a tensor [batch, classes]; got {type(logits).__name__}. "
            "For other models write a task: trak.CustomTask(lambda model, batch: ...)"
        )
    if logits.ndim == 0:
        # A model that ends in squeeze() leaves no dimension of a batch of one.
        logits = logits.reshape(1)
    if not isinstance(labels_B, Tensor) or labels_B.is_floating_point():
        got = (
            f"{labels_B.dtype} of shape {list(labels_B.shape)}"
            if isinstance(labels_B, Tensor)
            else type(labels_B).__name__
        )
        raise InputError(f"{what} needs integer class labels, a tensor [batch]; got {got}")
    if logits.ndim not in (1, 2) or labels_B.ndim != 1 or logits.shape[0] != labels_B.shape[0]:
        raise InputError(
            f"{what} needs logits [batch, classes] and labels [batch]; got logits {list(logits.shape)} and labels "
            f"{list(labels_B.shape)}. For outputs at many positions write a task: trak.CustomTask(lambda model, batch: ...)"
        )
    labels_B = labels_B.long()
    _refuse_labels(labels_B, 2 if logits.ndim == 1 or logits.shape[1] == 1 else logits.shape[1], what)
    return logits, labels_B


def _refuse_labels(labels_B: Tensor, classes: int, what: str) -> None:
    outside_B = (labels_B < 0) | (labels_B >= classes)
    if not is_true(outside_B.any()):  # where it is not looked at f is NaN, which is refused later
        return
    position = int(outside_B.nonzero()[0])
    raise InputError(
        f"{what} needs labels 0 to {classes - 1} for a model of {classes} classes; got {int(labels_B[position])} at position {position} of the "
        f"batch, {int(outside_B.sum())} such of {len(labels_B)}. Leave examples without a class (such as -100) out, and check that labels count "
        "from 0"
    )
