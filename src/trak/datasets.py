"""One view of every kind of training set: rows numbered from 0, in batches, starting anywhere.

A row is an example's position in the dataset: not in the order of some sampler, so that a shuffling loader and a plain one mean the
same rows.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

from trak import batches
from trak.errors import InputError

Range = tuple[int, int]
"""(start, stop): rows start to stop − 1."""

DEFAULT_BATCH_SIZE = 64


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
        rows = sorted({int(row) for row in torch.linspace(0, self.num_rows - 1, num_rows).round()})
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

    @property
    def num_rows(self) -> int:
        """N."""
        return self.count

    def batches(self, ranges: Sequence[Range] | None = None) -> Iterator[tuple[Tensor, Any]]:
        """The iterable's own batches, leaving out those of which no row is wanted."""
        start = 0
        for batch in self.iterable:
            stop = start + batches.batch_size(batch)
            if stop > self.count:
                raise InputError(
                    f"the dataset gave {self.count} rows when it was counted and more now: it must give the same rows each time"
                )
            if ranges is None or any(low < stop and start < high for low, high in ranges):
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


def as_rows(data: Any, *, batch_size: int | None = None, what: str = "train_set") -> RowSource:
    """A row source from a loader, a dataset, tensors, or an iterable of batches.

    Args:
        data: a `DataLoader` (its dataset, collate function, batch size and workers are used; rows are positions in the dataset),
            a map-style dataset (a Hugging Face dataset with `set_format("torch")` is one), a tuple or mapping of tensors with the
            examples along dimension 0, a list of examples as a map-style dataset, or a re-iterable of batches.
        batch_size: overrides the loader's.
        what: the argument's name, for messages.

    Raises:
        InputError: something else; a loader with a sampler of its own; a generator, which can be read only once; nothing in it.
    """
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise InputError(f"batch_size must be a whole number ≥ 1; got {batch_size!r}")
    if isinstance(data, RowSource):
        source = data
    elif isinstance(data, DataLoader):
        source = _loader_rows(data, batch_size, what)
    elif isinstance(data, TensorDataset):
        source = TensorRows(data.tensors, batch_size or DEFAULT_BATCH_SIZE)
    elif _is_tensor_batch(data):
        source = TensorRows(data, batch_size or DEFAULT_BATCH_SIZE)
    elif (
        hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, (str, bytes, dict))
    ):
        source = DatasetRows(data, batch_size or DEFAULT_BATCH_SIZE, _default_collate)
    elif isinstance(data, Iterable) and not isinstance(data, (str, bytes, dict)):
        source = _iterable_rows(data, what)
    else:
        raise InputError(
            f"{what} must be a DataLoader, a dataset with __len__ and __getitem__, tensors (inputs, labels), or a re-iterable of batches; "
            f"got {batches.describe(data)}"
        )
    if source.num_rows == 0:
        raise InputError(f"{what} is empty")
    return source


def token_budget_rows(
    dataset: Any,
    lengths: Sequence[int] | Tensor,
    token_budget: int,
    *,
    collate: Callable[[list[Any]], Any],
    window: int = 4096,
    num_workers: int = 0,
) -> TokenBudgetRows:
    """Batches of about equal cost for sequences of unequal length: pass the result as `train_set` or targets.

    A sequence that is longer than the budget makes a batch of its own. Padding is the collate function's: it sees sequences of
    about one length at a time.

    Args:
        dataset: map-style, with `__len__` and `__getitem__`.
        lengths: tokens of each row, [N], whole numbers ≥ 1.
        token_budget: most tokens of a batch, padding included.
        collate: makes a padded batch of a list of examples; see `torch.utils.data.DataLoader`.
        window: rows that are sorted together. Features wait in memory until their shard of consecutive rows is full.
        num_workers: processes that load.

    Raises:
        InputError: lengths that do not fit the dataset, or numbers below 1.
    """
    numbers = torch.as_tensor(lengths)
    if numbers.is_floating_point() or numbers.shape != (len(dataset),) or bool((numbers < 1).any()):
        raise InputError(
            f"lengths must be {len(dataset)} whole numbers ≥ 1, one for each row; got {batches.describe(numbers)}"
            + (f" with a least of {numbers.min()}" if numbers.numel() else "")
        )
    for name, value, least in (
        ("token_budget", token_budget, 1),
        ("window", window, 1),
        ("num_workers", num_workers, 0),
    ):
        if not isinstance(value, int) or value < least:
            raise InputError(f"{name} must be a whole number ≥ {least}; got {value!r}")
    return TokenBudgetRows(dataset, numbers.long(), token_budget, collate, window, num_workers)


def prefetched(data: Any, *, batch_size: int | None = None, what: str = "train_set") -> PrefetchedRows:
    """`as_rows(data)`, whose next batch is loaded while the present one is computed with.

    Raises:
        InputError: as `as_rows`.
    """
    return PrefetchedRows(as_rows(data, batch_size=batch_size, what=what))


def content_hash(items: Iterable[Any]) -> str:
    """SHA-256 over the structure, dtypes, shapes and bytes of batches, and the values of plain leaves that are no tensors."""
    digest = hashlib.sha256()
    for item in items:
        leaves, _ = batches.flatten(item)
        # What is no tensor (text, numbers) counts too, by its value; tensors show as their descriptions.
        digest.update(_outline(item).encode())
        for tensor in leaves:
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


def _outline(item: Any) -> str:
    """`batches.describe`, with the values of text, numbers and arrays in place of their types."""
    if isinstance(item, Mapping):
        return "{" + ", ".join(f"{key!r}: {_outline(value)}" for key, value in item.items()) + "}"
    if isinstance(item, (tuple, list)):
        inner = ", ".join(map(_outline, item))
        return f"({inner})" if isinstance(item, tuple) else f"[{inner}]"
    if isinstance(item, (str, bytes, bool, int, float, complex, np.generic)):
        return repr(item)
    if isinstance(item, np.ndarray):
        return f"array {item.dtype} {item.shape} {item.tolist()!r}"
    return batches.describe(item)


def _loader_rows(loader: DataLoader[Any], batch_size: int | None, what: str) -> RowSource:
    if isinstance(loader.dataset, IterableDataset):
        return _iterable_rows(loader, what)
    sampler: Any = loader.sampler
    size = loader.batch_size
    if size is None and type(loader.batch_sampler) is BatchSampler:
        # As trainers' launchers rebuild loaders: the sampler and the size are inside, and nothing else is.
        sampler, size = loader.batch_sampler.sampler, loader.batch_sampler.batch_size
    if loader.batch_sampler is not None and size is None:
        raise InputError(
            f"{what}: the loader has a batch sampler of its own, so positions in the dataset and in its batches differ. Pass the dataset "
            "itself (with batch_size=…), or a DataLoader with batch_size and without batch_sampler"
        )
    if not isinstance(sampler, (SequentialSampler, RandomSampler)) or getattr(sampler, "replacement", False):
        raise InputError(
            f"{what}: the loader draws its rows with {type(sampler).__name__}, so it is unclear which rows are meant. Pass a DataLoader over "
            "torch.utils.data.Subset(dataset, rows) without a sampler"
        )
    collate = loader.collate_fn if size is not None else _default_collate
    return DatasetRows(loader.dataset, batch_size or size or DEFAULT_BATCH_SIZE, collate, loader.num_workers)


def _iterable_rows(data: Iterable[Any], what: str) -> RowSource:
    if isinstance(data, Iterator):
        raise InputError(
            f"{what} is a generator, which can be read only once, and every checkpoint reads the data: pass a DataLoader, a dataset, "
            "or an object whose __iter__ starts anew"
        )
    count, digests = 0, []
    for batch in data:
        count += batches.batch_size(batch)
        digests.append(content_hash([batch]))
    return IterableRows(data, count, hashlib.sha256("".join(digests).encode()).hexdigest())


def _is_tensor_batch(data: Any) -> bool:
    """Whether data is a batch of everything: a tensor, or a tuple or mapping of tensors, rather than a list of examples."""
    if isinstance(data, Tensor):
        return True
    if isinstance(data, Mapping):
        return any(isinstance(value, Tensor) for value in data.values())
    # A tuple of tuples is taken for a sequence of examples.
    return (
        isinstance(data, tuple)
        and len(data) > 0
        and all(isinstance(part, (Tensor, Mapping)) for part in data)
    )


def _default_collate(examples: list[Any]) -> Any:
    """Torch's default collation; lists of numbers in mappings (token ids of a dataset without a format) are tensors.

    Raises:
        InputError: the examples do not fit together.
    """
    try:
        return torch.utils.data.default_collate([_with_tensors(example) for example in examples])
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"{len(examples)} examples, the first being {batches.describe(examples[0])}, cannot be put together into a batch: {error}. For data "
            "as a whole pass a tuple of tensors, (torch.as_tensor(inputs), torch.as_tensor(labels)), instead of a list or arrays; for examples of "
            "different sizes a DataLoader with a collate_fn"
        ) from error


def _with_tensors(example: Any) -> Any:
    """A mapping's lists of numbers as tensors: torch would take each for as many separate values."""
    lists = (
        [key for key, value in example.items() if isinstance(value, list) and _is_numbers(value)]
        if isinstance(example, Mapping)
        else []
    )
    return {**example, **{key: torch.as_tensor(example[key]) for key in lists}} if lists else example


def _is_numbers(values: list[Any]) -> bool:
    return bool(values) and all(
        _is_numbers(value) if isinstance(value, list) else isinstance(value, (bool, int, float))
        for value in values
    )


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
