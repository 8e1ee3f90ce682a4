"""The kinds of numbered rows: tensors, datasets, sequences by length, and what can only be read from the front."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from trak import batches
from trak.datasets.content import content_hash
from trak.errors import InputError

Range = tuple[int, int]
"""(start, stop): rows start to stop − 1."""


class RowSource(ABC):
    """A dataset seen as numbered rows."""

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """N."""

    @abstractmethod
    def batches(self, ranges: Sequence[Range] | None = None) -> Iterator[tuple[Tensor, Any]]:
        """(rows [B] int64, batch): the batches that hold a row of `ranges`, or all of them, always in the same order.

        Every row comes once. Rows ascend, except where a source sorts them by cost.
        """

    @abstractmethod
    def example(self, row: int) -> Any:
        """A batch of one: for showing an example to a person."""

    def sample_hash(self, num_rows: int = 16) -> str | None:
        """A digest of up to `num_rows` rows spread over the dataset, None where rows cannot be read one by one.

        Two datasets with different digests are different; equal digests are a good sign, no proof.
        """
        if self.num_rows == 0:
            return None
        # In float32, or less where that is torch's default dtype, the last of many rows would be rounded to one that is not there.
        places = torch.linspace(0, self.num_rows - 1, num_rows, dtype=torch.float64)
        rows = sorted({int(row) for row in places.round()})
        return content_hash(self.example(row) for row in rows)


@dataclass(frozen=True, eq=False)
class TensorRows(RowSource):
    """A batch that holds the whole dataset: (inputs, labels), a mapping of tensors, and so on."""

    data: Any
    batch_size: int

    @property
    def num_rows(self) -> int:
        """N."""
        return batches.batch_size(self.data)

    def sample_hash(self, num_rows: int = 16) -> str | None:
        """A digest of all rows: they are at hand."""
        return content_hash([self.data])

    def batches(self, ranges: Sequence[Range] | None = None) -> Iterator[tuple[Tensor, Any]]:
        """Slices of the tensors (views)."""
        for start, stop in _cut(ranges, self.num_rows, self.batch_size):
            yield torch.arange(start, stop), batches.take(self.data, slice(start, stop))

    def example(self, row: int) -> Any:
        """Row `row` as a batch of one."""
        return batches.take(self.data, slice(row, row + 1))


@dataclass(frozen=True, eq=False)
class DatasetRows(RowSource):
    """A map-style dataset (`__len__` and `__getitem__`), collated into batches."""

    dataset: Any
    batch_size: int
    collate: Callable[[list[Any]], Any]
    num_workers: int = 0

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.dataset)

    def batches(self, ranges: Sequence[Range] | None = None) -> Iterator[tuple[Tensor, Any]]:
        """Collated batches, loaded by worker processes where the loader had some."""
        cuts = list(_cut(ranges, self.num_rows, self.batch_size))
        rows = [list(range(start, stop)) for start, stop in cuts]
        loader: Iterable[Any] = DataLoader(
            self.dataset, batch_sampler=rows, collate_fn=self.collate, num_workers=self.num_workers
        )
        for (start, stop), batch in zip(cuts, loader):
            yield torch.arange(start, stop), _checked(batch, stop - start)

    def example(self, row: int) -> Any:
        """Row `row` as a batch of one."""
        return self.collate([self.dataset[row]])


@dataclass(frozen=True, eq=False)
class TokenBudgetRows(RowSource):
    """A map-style dataset of sequences of unequal length, in batches of about equal cost.

    Rows are sorted by length within windows of consecutive rows, and cut into batches whose longest sequence times their
    number stays within the budget. Batches and their order depend on lengths, budget and window alone. Rows of a batch are
    not consecutive; features are stored by row all the same.

    See `token_budget_rows`, which checks what is given.
    """

    dataset: Any
    lengths: Tensor
    token_budget: int
    collate: Callable[[list[Any]], Any]
    window: int
    num_workers: int = 0

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.lengths)

    def batches(self, ranges: Sequence[Range] | None = None) -> Iterator[tuple[Tensor, Any]]:
        """Collated batches, window after window, short sequences first; rows of a batch ascend in length."""
        cuts = [rows for rows in self._cuts() if ranges is None or _any_inside(rows, ranges)]
        loader: Iterable[Any] = DataLoader(
            self.dataset,
            batch_sampler=[rows.tolist() for rows in cuts],
            collate_fn=self.collate,
            num_workers=self.num_workers,
        )
        for rows, batch in zip(cuts, loader):
            yield rows, _checked(batch, len(rows))

    def example(self, row: int) -> Any:
        """Row `row` as a batch of one."""
        return self.collate([self.dataset[row]])

    def _cuts(self) -> Iterator[Tensor]:
        for start in range(0, self.num_rows, self.window):
            lengths = self.lengths[start : start + self.window]
            order = torch.argsort(lengths, stable=True)
            first = 0
            for place, length in enumerate(lengths[order].tolist()):
                if place > first and length * (place + 1 - first) > self.token_budget:
                    yield start + order[first:place]
                    first = place
            yield start + order[first:]


@dataclass(frozen=True, eq=False)
class PrefetchedRows(RowSource):
    """Another source, whose next batch is loaded by a thread while the present one is computed with.

    For sources whose loading takes time and has no worker processes: reading, decoding, tokenising. The order is the
    source's; its errors are raised where the batch would have come.
    """

    source: RowSource

    @property
    def num_rows(self) -> int:
        """N."""
        return self.source.num_rows

    def batches(self, ranges: Sequence[Range] | None = None) -> Iterator[tuple[Tensor, Any]]:
        """The source's batches, at most one ahead."""
        loaded = self.source.batches(ranges)
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="trak-loading") as loading:
            coming = loading.submit(next, loaded, None)
            while (batch := coming.result()) is not None:
                coming = loading.submit(next, loaded, None)
                yield batch

    def example(self, row: int) -> Any:
        """Row `row` as a batch of one."""
        return self.source.example(row)

    def sample_hash(self, num_rows: int = 16) -> str | None:
        """The source's."""
        return self.source.sample_hash(num_rows)


@dataclass(frozen=True, eq=False)
class IterableRows(RowSource):
    """Batches from something that can only be read from the front, again and again: rows are numbered as they come."""

    iterable: Iterable[Any]
    count: int
    digest: str | None = None
    batch_digests: tuple[str, ...] | None = None

    @property
    def num_rows(self) -> int:
        """N."""
        return self.count

    def batches(self, ranges: Sequence[Range] | None = None) -> Iterator[tuple[Tensor, Any]]:
        """The iterable's own batches, leaving out those of which no row is wanted.

        Raises:
            InputError: other rows than when they were counted: in another number, or, of the batches wanted, with other contents.
        """
        start, lows = 0, [low for low, _ in ranges or ()]
        for place, batch in enumerate(self.iterable):
            stop = start + batches.batch_size(batch)
            if stop > self.count:
                raise InputError(
                    f"the dataset gave {self.count} rows when it was counted and more now: it must give the same rows each time"
                )
            # Ranges ascend: of those that begin before the batch ends, the last one ends last.
            before = bisect_left(lows, stop)
            if ranges is None or (before and ranges[before - 1][1] > start):
                # In another order, row i would be another example at every checkpoint.
                if self.batch_digests and self.batch_digests[place : place + 1] != (content_hash([batch]),):
                    raise InputError(
                        f"rows {start} to {stop - 1} are not the examples that the dataset gave there when it was counted: rows are told by their "
                        "place, so it must give the same ones in the same order each time. Turn off shuffling and random augmentation, or fix their "
                        "seed in __iter__"
                    )
                yield torch.arange(start, stop), batch
            start = stop
        if start != self.count:
            raise InputError(
                f"the dataset gave {self.count} rows when it was counted and {start} now: it must give the same rows each time"
            )

    def example(self, row: int) -> Any:
        """Row `row`, found by reading from the front."""
        for rows, batch in self.batches([(row, row + 1)]):
            return batches.take(batch, slice(row - int(rows[0]), row - int(rows[0]) + 1))
        raise IndexError(row)

    def sample_hash(self, num_rows: int = 16) -> str | None:
        """What was found when the rows were counted: reading single ones would mean reading everything again."""
        return self.digest


def _any_inside(rows: Tensor, ranges: Sequence[Range]) -> bool:
    return any(bool(((rows >= low) & (rows < high)).any()) for low, high in ranges)


def _checked(batch: Any, expected: int) -> Any:
    got = batches.batch_size(batch)
    if got != expected:
        raise InputError(
            f"a batch of {expected} examples came out of the collate function with {got} rows: {batches.describe(batch)}. "
            "Every example must give exactly one row"
        )
    return batch


def _cut(ranges: Sequence[Range] | None, num_rows: int, batch_size: int) -> Iterator[Range]:
    """Batches [i·b, (i+1)·b) that hold a row of the ranges.

    Always the same grid: a resumed run computes the same batches as one that was not interrupted, so that features are the same to
    the last bit, at the price of a few rows computed again at the edges.
    """
    done = 0
    for low, high in [(0, num_rows)] if ranges is None else ranges:
        for start in range(max(low - low % batch_size, done), high, batch_size):
            done = min(start + batch_size, num_rows)
            yield start, done
