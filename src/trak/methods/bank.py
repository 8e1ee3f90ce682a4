"""A bank of retrained models: which rows each saw, and what each says about the targets.

Shape legend: N training rows, T targets, S subsets, R models per subset.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trak.batches import on_host
from trak.datasets import RowSource, as_rows
from trak.errors import InputError, NonFiniteError


@dataclass(frozen=True, eq=False)
class Bank:
    """Checked masks and outputs.

    Attributes:
        masks: [S, N] bool: the rows that each model was trained on.
        outputs: [S, T] float64: f of each target after that.
        num_models: R: models per subset whose outputs were averaged.
    """

    masks: Tensor
    outputs: Tensor
    num_models: int


@dataclass(frozen=True, eq=False, kw_only=True)
class BankOptions:
    """Arguments common to the methods that read a bank of retrained models; tensors or arrays.

    Attributes:
        masks: [S, N] booleans (or 0 and 1): the rows that each model was trained on, as from `trak.evaluation.random_subsets`.
        outputs: [S, T], f of each target after training on each subset; or [S, R, T] for R models per subset, which are averaged.
    """

    masks: Any
    outputs: Any


def read_bank(options: BankOptions) -> Bank:
    """The bank, checked.

    Raises:
        InputError: other shapes, or masks that hold something else than booleans.
        NonFiniteError: NaN or infinity in the outputs.
    """
    masks, outputs = _tensor(options.masks), _tensor(options.outputs)
    if masks.ndim != 2 or 0 in masks.shape:
        raise InputError(f"masks must be [subsets, training rows]; got shape {list(masks.shape)}")
    if masks.dtype != torch.bool and not bool(((masks == 0) | (masks == 1)).all()):
        raise InputError(
            "masks must hold booleans (True where a training row is in the subset), not row numbers or weights"
        )
    if outputs.ndim not in (2, 3) or 0 in outputs.shape:
        raise InputError(
            f"outputs must be [subsets, targets] or [subsets, models, targets]; got shape {list(outputs.shape)}"
        )
    if len(outputs) != len(masks):
        raise InputError(
            f"outputs are of {len(outputs)} subsets and masks of {len(masks)}: both need one entry per subset, in the same order"
        )
    outputs = outputs.double()
    if not bool(outputs.isfinite().all()):
        raise NonFiniteError(
            "outputs of the bank hold NaN or infinity: leave out models that failed to train"
        )
    num_models = 1 if outputs.ndim == 2 else outputs.shape[1]
    return Bank(masks.bool(), outputs if outputs.ndim == 2 else outputs.mean(1), num_models)


def rows_of_bank(data: Any, expected: int, what: str) -> RowSource:
    """The examples that the bank was made with.

    Raises:
        InputError: another number of them than the bank has.
    """
    rows = as_rows(data, what=what)
    if rows.num_rows != expected:
        raise InputError(
            f"{what} has {rows.num_rows} rows, but the bank of models was made with {expected}: give the same data, in the same order"
        )
    return rows


def _tensor(values: Any) -> Tensor:
    values = on_host(values)
    return values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
