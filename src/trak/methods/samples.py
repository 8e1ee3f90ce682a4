"""Some rows of a training set, spread over it, as a training set of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from trak import batches
from trak.datasets import DatasetRows, PrefetchedRows, Range, RowSource, TensorRows, TokenBudgetRows
from trak.datasets.content import outline
from trak.projection.philox import derive_key, draw_words


def spread_rows(num_rows: int, size: int | None) -> Tensor:
    """One row of each of `size` equal parts of the set, drawn by the documented hash: int64 [size], ascending; all rows for None.

    The same rows for every checkpoint, machine and process. Drawn, and not every n-th: rows often come in some period (of classes, say).
    """
    if size is None or size >= num_rows:
        return torch.arange(num_rows)
    edges = torch.arange(size + 1) * num_rows // size
    key = derive_key("sample", 1, 0, 0, "rows")
    words = draw_words(key, torch.arange(size), 1)[0][:, 0]
    return edges[:-1] + (words * edges.diff() >> 32)


def some_rows(source: RowSource, rows: Tensor) -> RowSource:
    """Those rows (int64, ascending) of a source, as many at once as the source gives where it can read single ones."""
    if len(rows) == source.num_rows:
        return source
    if isinstance(source, TensorRows):
        return replace(source, data=batches.take(source.data, rows))
    if isinstance(source, DatasetRows):
        return replace(source, dataset=Subset(source.dataset, rows.tolist()))
    if isinstance(source, TokenBudgetRows):
        return replace(source, dataset=Subset(source.dataset, rows.tolist()), lengths=source.lengths[rows])
    if isinstance(source, PrefetchedRows):
        return replace(source, source=some_rows(source.source, rows))
    return SomeRows(source, rows)


@dataclass(frozen=True, eq=False)
class SomeRows(RowSource):
    """Rows of a source that can only be read through: what is wanted of its batches, put together to batches of that size where they are alike."""

    source: RowSource
    rows: Tensor

    @property
    def num_rows(self) -> int:
        """Number of wanted rows."""
        return len(self.rows)

    def batches(self, ranges: Sequence[Range] | None = None) -> Iterator[tuple[Tensor, Any]]:
        """All wanted rows, whatever the ranges."""
        waiting: list[tuple[Tensor, Any]] = []
        largest, kind = 0, ""
        for numbers_B, batch in self.source.batches([(row, row + 1) for row in self.rows.tolist()]):
            wanted_B = torch.isin(numbers_B, self.rows)
            if not wanted_B.any():
                continue
            piece = (
                torch.searchsorted(self.rows, numbers_B[wanted_B]),
                batches.take(batch, wanted_B.nonzero().squeeze(1)),
            )
            # Sequences may be padded to another length in each batch.
            largest, other = max(largest, len(numbers_B)), outline(batches.take(batch, slice(0, 0)))
            if waiting and (other != kind or sum(len(places) for places, _ in [*waiting, piece]) > largest):
                yield _together(waiting)
                waiting = []
            waiting.append(piece)
            kind = other
        if waiting:
            yield _together(waiting)

    def example(self, row: int) -> Any:
        """Row `row` as a batch of one."""
        return self.source.example(int(self.rows[row]))


def _together(pieces: Sequence[tuple[Tensor, Any]]) -> tuple[Tensor, Any]:
    places, parts = zip(*pieces)
    return torch.cat(places), batches.joined(parts)
