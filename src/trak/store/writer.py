"""Fills shards from rows that come in any order and any number."""

from __future__ import annotations

from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from trak.errors import InputError, ProtocolError
from trak.logs import logger
from trak.store.encoding import Piece
from trak.store.layout import ranges_text
from trak.store.row_folder import RowFolder

BUFFERED_SHARDS = 4
"""Rows of unfinished shards kept in memory, in shards' worth of rows; beyond it the oldest are spilled."""

_ROWS_SHOWN = 5


class Writer:
    """Takes rows and makes shards of them; a context manager.

    A shard is written as soon as its last row is there. When rows of unfinished shards amount to more than
    four shards (a random order of rows), the oldest of them are spilled to a fragment file, so memory stays
    bounded. Closing spills what is left and compacts fragments that together complete shards; leaving the
    `with` block by an exception does the same: what was added is kept.
    """

    def __init__(self, files: RowFolder) -> None:
        self._files = files
        self._grid = files.grid
        self._closed = False
        files.folder.remove_stale()
        self._stored = files.look().stored()
        starts = np.arange(0, self._grid.num_rows, self._grid.shard_rows)
        self._remaining = np.add.reduceat((~self._stored).astype(np.int64), starts) if len(starts) else starts
        # Shard to its pieces; the oldest shard first.
        self._pending: dict[int, list[Piece]] = {}

    @property
    def num_buffered(self) -> int:
        """Rows in memory, not yet in any file."""
        return sum(len(piece.rows) for pieces in self._pending.values() for piece in pieces)

    def has(self, rows: Tensor) -> Tensor:
        """Which rows are stored or were added, bool [B] for row numbers int64 [B] in [0, num_rows)."""
        return torch.from_numpy(self._stored[rows.detach().cpu().numpy()])

    def add(self, rows: Tensor, features: Tensor, outputs: Tensor, weights: Tensor) -> None:
        """Add some rows. Rows that are stored or were added already are skipped.

        Args:
            rows: their numbers, int64 [B], each once, in any order.
            features: φ, [B, K], any floating dtype and device.
            outputs: f, [B].
            weights: q, [B].

        Raises:
            InputError: wrong shapes or dtypes, a row twice, or rows outside [0, num_rows).
            NonFiniteError: NaN or infinity; nothing of the batch is stored.
            ProtocolError: the writer is closed.
        """
        if self._closed:
            raise ProtocolError(
                f"The writer of {self._files.label} is closed. Open another with rows(...).writer(): rows "
                "already stored are skipped."
            )
        numbers = self._check(rows, features, outputs, weights)
        if len(numbers) == 0:
            return
        batch = self._files.encoding.encode(
            numbers,
            features.detach().cpu(),
            outputs.detach().cpu(),
            weights.detach().cpu(),
            self._files.label,
        )
        new = np.flatnonzero(~self._stored[numbers])
        new = new[np.argsort(numbers[new])]
        shards = numbers[new] // self._grid.shard_rows
        for index in np.split(new, np.flatnonzero(np.diff(shards)) + 1):
            if len(index):
                self._take(batch.select(index))
        if self.num_buffered > BUFFERED_SHARDS * self._grid.shard_rows:
            self._spill(keep=BUFFERED_SHARDS * self._grid.shard_rows // 2)

    def flush(self) -> None:
        """Write the rows that wait in memory for their shard to fill, so that they can be read."""
        self._spill(keep=0)

    def close(self) -> None:
        """Write what is left, and compact. A second call does nothing."""
        if self._closed:
            return
        self._spill(keep=0)
        self._files.compact()
        self._closed = True

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except Exception as second:
            # The first error is the one to report; this one is most likely its consequence (a full disk).
            logger.warning("Rows of %s still in memory could not be kept: %s", self._files.label, second)
        self._closed = True

    def _take(self, piece: Piece) -> None:
        """Buffer rows of one shard; write it if they were its last."""
        shard = int(piece.rows[0]) // self._grid.shard_rows
        self._stored[piece.rows] = True
        self._remaining[shard] -= len(piece.rows)
        pieces = self._pending.setdefault(shard, [])
        pieces.append(piece)
        if self._remaining[shard] == 0:
            self._files.retry(lambda: self._files.finish_shard(shard, pieces))
            del self._pending[shard]

    def _spill(self, *, keep: int) -> None:
        """Write rows of the oldest unfinished shards to a fragment; at most `keep` rows stay in memory."""
        buffered, spilled = self.num_buffered, []
        for shard, pieces in self._pending.items():
            if buffered <= keep:
                break
            spilled.append(shard)
            buffered -= sum(len(piece.rows) for piece in pieces)
        if spilled:
            self._files.write_fragment(
                Piece.join([piece for shard in spilled for piece in self._pending[shard]])
            )
            for shard in spilled:
                del self._pending[shard]

    def _check(self, rows: Tensor, features: Tensor, outputs: Tensor, weights: Tensor) -> np.ndarray:
        """The row numbers, if every argument is as it should be."""
        if not isinstance(rows, Tensor) or rows.dim() != 1 or rows.dtype not in (torch.int64, torch.int32):
            raise InputError(f"rows must be an int64 tensor of shape [B]; got {_describe(rows)}.")
        shapes = {
            "features": (len(rows), self._files.encoding.dim),
            "outputs": (len(rows),),
            "weights": (len(rows),),
        }
        for (name, shape), tensor in zip(shapes.items(), (features, outputs, weights)):
            if (
                not isinstance(tensor, Tensor)
                or tuple(tensor.shape) != shape
                or not tensor.is_floating_point()
            ):
                raise InputError(
                    f"{name} of {len(rows)} rows of {self._files.label} must be a floating-point tensor of "
                    f"shape {list(shape)}; got {_describe(tensor)}."
                )
        numbers = rows.detach().cpu().numpy().astype(np.int64)
        outside = numbers[(numbers < 0) | (numbers >= self._grid.num_rows)]
        if len(outside):
            raise InputError(
                f"Row numbers of {self._files.label} must lie in 0 to {self._grid.num_rows - 1}; got "
                f"{_listed(outside)}. Nothing was stored. The dataset is longer than the number of rows the "
                "store was made for."
            )
        unique, counts = np.unique(numbers, return_counts=True)
        if len(unique) != len(numbers):
            raise InputError(
                "A row may come once in a batch; "
                f"{ranges_text([(r, r + 1) for r in unique[counts > 1].tolist()])} of "
                f"{self._files.label} came more than once. Nothing was stored. Samplers with replacement or "
                "padding do this."
            )
        return numbers


def _listed(rows: np.ndarray) -> str:
    more = f" and {len(rows) - _ROWS_SHOWN} more" if len(rows) > _ROWS_SHOWN else ""
    return ", ".join(map(str, rows[:_ROWS_SHOWN].tolist())) + more


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__
