"""Batches of language models, as Hugging Face's collators give them, taken apart; and rows for single tokens.

Shape legend: B examples, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trak.batches import batch_size, describe, take
from trak.errors import InputError
from trak.tasks.series import IGNORED, check_labels

TARGET_MASK = "target_mask"
"""Name of the optional [B, T] field of a batch that says which labels count, never passed to the model."""


def split_batch(batch: Any, *, mask: str, what: str) -> tuple[dict[str, Any], Tensor, Tensor]:
    """(what the model is called with, labels [B, T], counted [B, T] bool).

    Args:
        batch: a mapping with `labels`, perhaps `target_mask`, and the model's inputs.
        mask: name of the input that is 0 at padding of the labels' sequence; positions there never count.
        what: the task, for messages.

    Raises:
        InputError: no mapping with labels, or masks of other shapes.
    """
    if not isinstance(batch, Mapping) or "labels" not in batch:
        raise InputError(
            f"{what} expects a mapping with `labels` beside the model's inputs (input_ids, attention_mask, …), {IGNORED} where a position is no "
            f"target; got {describe(batch)}"
        )
    labels_BT = check_labels(batch["labels"], what=what)
    counted_BT = labels_BT != IGNORED
    padding = batch.get(mask)
    if isinstance(padding, Tensor) and padding.shape == labels_BT.shape:
        counted_BT = counted_BT & (padding != 0)
    chosen = batch.get(TARGET_MASK)
    if chosen is not None:
        if not isinstance(chosen, Tensor) or chosen.shape != labels_BT.shape:
            raise InputError(
                f"{what}: `{TARGET_MASK}` must be a tensor like the labels, {list(labels_BT.shape)}, 1 where a label counts; got {describe(chosen)}"
            )
        counted_BT = counted_BT & (chosen != 0)
    inputs = {name: value for name, value in batch.items() if name not in ("labels", TARGET_MASK)}
    return inputs, labels_BT, counted_BT


def preceded(mask: Any, labels: Tensor) -> Tensor:
    """Positions that are predicted from a token and not from padding, bool like the labels [..., T]: all but the first after padding."""
    is_token = torch.ones_like(labels, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.shape == labels.shape:
        is_token = mask != 0
    return F.pad(is_token[..., :-1], (1, 0))


@dataclass(frozen=True, eq=False)
class TokenRows:
    """A dataset of sequences as a dataset of their target tokens, one row each; made by a task's `token_rows`.

    A row is its sequence with a `target_mask` that leaves this one token; for tasks whose inputs do not depend on the labels, the
    other labels are −100 instead, so that any collator of sequences with labels will do.

    Attributes:
        sequences: map-style dataset of mappings with `labels`, or one mapping of tensors.
        is_shifted: whether each token is predicted at the position before it, so that the first is no target.
        mask_labels: whether to write −100 into the labels rather than add a `target_mask`.
        origins: [R, 2] int64: the sequence and the position of every row; e.g. `attribution.group(rows.origins[:, 0].tolist())` sums a
            document's tokens.
    """

    sequences: Any
    is_shifted: bool = False
    mask_labels: bool = False
    origins: Tensor = field(init=False)

    def __post_init__(self) -> None:
        count = batch_size(self.sequences) if isinstance(self.sequences, Mapping) else len(self.sequences)
        found = [
            (row, int(position))
            for row in range(count)
            for position in self._targets(self._sequence(row)).nonzero()
        ]
        if not found:
            raise InputError(
                f"none of the {count} sequences has a target token: all labels are {IGNORED} or masked"
            )
        object.__setattr__(self, "origins", torch.tensor(found, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.origins)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, position = self.origins[index].tolist()
        sequence = self._sequence(row)
        labels_T = sequence["labels"]
        is_own_T = torch.arange(len(labels_T)) == position
        if self.mask_labels:
            return {**sequence, "labels": labels_T.masked_fill(~is_own_T, IGNORED)}
        return {**sequence, TARGET_MASK: is_own_T.long()}

    def _sequence(self, row: int) -> dict[str, Any]:
        """One sequence, its labels a tensor [T]."""
        if isinstance(self.sequences, Mapping):
            sequence = take(dict(self.sequences), slice(row, row + 1))
            sequence = {
                name: value[0] if isinstance(value, Tensor) else value for name, value in sequence.items()
            }
        else:
            sequence = self.sequences[row]
        if not isinstance(sequence, Mapping) or "labels" not in sequence:
            raise InputError(f"sequence {row} must be a mapping with `labels`; got {describe(sequence)}")
        return {
            name: torch.as_tensor(value)
            if isinstance(value, Sequence) and not isinstance(value, str)
            else value
            for name, value in sequence.items()
        }

    def _targets(self, sequence: Mapping[str, Any]) -> Tensor:
        labels_T = sequence["labels"]
        counted_T = labels_T != IGNORED
        padding = sequence.get("attention_mask") if self.mask_labels else None
        for mask in (padding, sequence.get(TARGET_MASK)):
            if mask is not None and mask.shape == labels_T.shape:
                counted_T = counted_T & (mask != 0)
        return counted_T & preceded(padding, labels_T) if self.is_shifted else counted_T
