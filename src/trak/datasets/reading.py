"""A row source of whatever the user has: loaders, datasets, tensors, iterables of batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

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
from trak.datasets.content import content_hash
from trak.datasets.sources import (
    DatasetRows,
    IterableRows,
    PrefetchedRows,
    RowSource,
    TensorRows,
    TokenBudgetRows,
)
from trak.errors import InputError

DEFAULT_BATCH_SIZE = 64


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
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
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
    whole = hashlib.sha256("".join(digests).encode()).hexdigest()
    return IterableRows(data, count, whole, tuple(digests))


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
