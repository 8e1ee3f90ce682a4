"""The weights of training examples in TRAK's scores: q, flattened, or averaged along training.

Shape legend: N training rows, B rows of one batch, M checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trak.checkpoints import describe
from trak.errors import InputError
from trak.gradients import lend
from trak.methods.runs import Run, load_state
from trak.progress import bar
from trak.setting import bound_task, prepare
from trak.store import Store
from trak.tasks import Task


def resolve_exponent(exponent: float | None, task: Task, *, has_trajectories: bool = False) -> float:
    """γ of the weights q^γ: what was given, or the default for the task.

    Raises:
        InputError: a negative or non-finite exponent, or something that is no number.
    """
    if exponent is None:
        return 0.5 if task.is_log_loss and not has_trajectories else 1.0
    if isinstance(exponent, bool) or not isinstance(exponent, (int, float)) or not 0 <= exponent < math.inf:
        raise InputError(
            f"weight_exponent must be a number ≥ 0 (1 for the paper's weights, 0.5 for their square root); got {exponent!r}"
        )
    return float(exponent)


def resolve_curvature(gram: str | None, task: Task, weight_exponent: float) -> float:
    """The exponent γ of R^γ in the Gram matrix: that of the weights for the logistic one, 0 for the uniform one.

    Raises:
        InputError: an unknown word, or the logistic Gram for a task that has no log loss.
    """
    if gram is None:
        return weight_exponent if task.is_log_loss else 0.0
    if gram not in ("uniform", "logistic"):
        raise InputError(f'gram must be "uniform" or "logistic"; got {gram!r}')
    if gram == "logistic" and not task.is_log_loss:
        raise InputError(
            f'gram="logistic" needs a task whose weights are q = 1 − p; those of {type(task).__name__} are not: use gram="uniform"'
        )
    return weight_exponent if gram == "logistic" else 0.0


def flattened(weights_N: Tensor, exponent: float) -> Tensor:
    """sign(q) · |q|^exponent, [N]: 1 is the loss weight of the paper, 0 leaves its sign only."""
    return weights_N if exponent == 1 else weights_N.sign() * weights_N.abs() ** exponent


def member_weights(store: Store, model_ids: Sequence[int], exponent: float) -> tuple[Tensor, ...]:
    """q_m^γ of each checkpoint's training examples, [N] each."""
    return tuple(flattened(store.rows(model_id).weights(), exponent) for model_id in model_ids)


def trajectory_weights(
    run: Run, trajectories: Sequence[Sequence[Any]], exponent: float
) -> tuple[Tensor, ...]:
    """q^γ of each checkpoint averaged over it and the earlier checkpoints of its run, [N] each.

    An example acts on the model at every step of training, in proportion to its q there; a model that fits its training set shows
    little of that at the end.

    Raises:
        InputError: not one list of checkpoints for each checkpoint of the ensemble.
        CheckpointError: one of them cannot be read or does not fit the model.
    """
    averaged = []
    for model_id, earlier in zip(run.model_ids, _checked(trajectories, len(run.model_ids))):
        own_N = flattened(run.store.rows(model_id).weights(), exponent)
        others = [flattened(forward_weights(run, source), exponent) for source in earlier]
        averaged.append(torch.stack([own_N, *others]).mean(0))
    return tuple(averaged)


def _checked(trajectories: Sequence[Sequence[Any]], num_checkpoints: int) -> Sequence[Sequence[Any]]:
    is_list = isinstance(trajectories, Sequence) and not isinstance(trajectories, str)
    if not is_list or len(trajectories) != num_checkpoints:
        got = f"{len(trajectories)} of them" if is_list else type(trajectories).__name__
        raise InputError(
            f"trajectories must be a list of {num_checkpoints} lists of earlier checkpoints, one list for each checkpoint of the ensemble; got "
            f"{got}: write [[first_epoch, second_epoch], …], with [] where a run has none"
        )
    for index, earlier in enumerate(trajectories):
        if isinstance(earlier, (str, Path, Mapping, nn.Module)) or not isinstance(earlier, Sequence):
            raise InputError(
                f"trajectories[{index}] must be a list of checkpoints; got {type(earlier).__name__}: write [checkpoint]"
            )
    return trajectories


def forward_weights(run: Run, source: Any) -> Tensor:
    """The loss weights q of the training examples at another checkpoint of the model, [N] float32, by forward passes only.

    Raises:
        CheckpointError: it cannot be read or does not fit the model.
    """
    state = load_state(run.options, run.setting, source)
    weights_N = torch.empty(run.train.num_rows, dtype=torch.float32)
    task = bound_task(run.setting.for_training, state)
    with (
        torch.no_grad(),
        lend(run.setting.model, state) as model,
        bar(run.train.num_rows, f"Weights at {describe(source)}", enabled=run.options.progress) as shown,
    ):
        for rows_B, batch in run.train.batches():
            _, weights_B = task.output_and_weight(model, prepare(run.setting, batch))
            weights_N[rows_B] = weights_B.float().cpu()
            shown.update(len(rows_B))
    return weights_N
