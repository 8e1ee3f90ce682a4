"""Batches that come one by one from outside: which rows they are, what is known of them, and where their features go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trak import batches
from trak.errors import InputError
from trak.projector import Projector
from trak.store import RowSet, Writer


@dataclass
class Session:
    """One checkpoint's training set or targets, batch after batch.

    Attributes:
        model_id: the checkpoint's number.
        projector: its projected gradients.
        rows: where they go.
        writer: how.
        cursor: the next row, for batches that come in order.
        experiment: the targets' name; None for training rows.
    """

    model_id: int
    projector: Projector
    rows: RowSet
    writer: Writer
    cursor: int = 0
    experiment: str | None = None

    @property
    def what(self) -> str:
        """What a row is, in messages."""
        return "training row" if self.experiment is None else "target"

    def add(self, batch: Any, rows_B: Tensor) -> None:
        """Project and store a prepared batch's examples, but those that are stored: their outputs are compared.

        Raises:
            InputError: rows that are stored already, from other data.
            TrakError: gradients that cannot be had.
        """
        stored_B = self.writer.has(rows_B)
        if stored_B.any():
            if not self.rows.has(rows_B[stored_B]).all():
                self.writer.flush()  # They were added in this session, and are still in memory.
            self._compare_stored(batch, rows_B, stored_B)
        if not stored_B.all():
            label = f"{self.what}s {int(rows_B.min())} to {int(rows_B.max())}"
            todo = (~stored_B).nonzero().squeeze(1)
            features_BK, outputs = self.projector(batches.take(batch, todo), label=label)
            self.writer.add(rows_B[todo], features_BK, outputs.f, outputs.q)

    def row_numbers(self, size: int, inds: Any, num_samples: int | None) -> Tensor:
        """The rows of a batch's examples, [B] int64.

        Raises:
            InputError: neither or both of inds and num_samples, or rows that do not exist.
        """
        what, total = self.what, self.rows.num_rows
        if (inds is None) == (num_samples is None):
            raise InputError(
                f"give exactly one of inds (the {what}s of this batch) and num_samples (the next ones in order)"
            )
        if inds is not None:
            given = torch.as_tensor(np.asarray(batches.on_host(inds))).reshape(-1)
            if given.is_floating_point() or given.dtype == torch.bool:
                raise InputError(f"inds must be whole numbers, the {what}s of this batch; got {given.dtype}")
            rows = given.long()
            if len(rows) != size:
                raise InputError(f"inds has {len(rows)} entries and the batch {size} examples")
        else:
            rows = torch.arange(self.cursor, self.cursor + size)
            is_last = self.cursor + size == total
            if num_samples != size and not (is_last and num_samples is not None and size < num_samples):
                raise InputError(
                    f"num_samples is {num_samples} and the batch has {size} examples; only the last batch may be shorter"
                )
        if int(rows.min()) < 0 or int(rows.max()) >= total:
            raise InputError(
                f"{what}s {int(rows.min())} to {int(rows.max())} do not exist: there are {total}. "
                "Was the loader run twice for one checkpoint, or is the size that was given too small?"
            )
        return rows

    def _compare_stored(self, batch: Any, rows_B: Tensor, stored_B: Tensor) -> None:
        """Stored rows must come from the same examples: their outputs, one forward pass, tell."""
        again_B = self.projector.outputs(batches.take(batch, stored_B.nonzero().squeeze(1)))
        before_B = self.rows.outputs_of(rows_B[stored_B])
        if not torch.allclose(again_B.double(), before_B.double(), rtol=1e-2, atol=1e-2):
            where = f"experiment {self.experiment!r}" if self.experiment else f"checkpoint {self.model_id}"
            raise InputError(
                f"{where} holds {self.what}s {int(rows_B.min())} to {int(rows_B.max())} from other data: the model outputs stored there differ from "
                f"this batch's by up to {float((again_B - before_B).abs().max()):.3g}. Use another "
                f"{'exp_name' if self.experiment else 'save_dir'} for other data; check that the loader does not shuffle"
            )
