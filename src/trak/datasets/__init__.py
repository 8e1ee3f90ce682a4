"""One view of every kind of training set: rows numbered from 0, in batches, starting anywhere.

A row is an example's position in the dataset: not in the order of some sampler, so that a shuffling loader and a plain one mean the
same rows. `sources` has the kinds of rows, `reading` makes one of what the user gives, and `content` says whether two are the same.
"""

from trak.datasets.content import content_hash
from trak.datasets.reading import DEFAULT_BATCH_SIZE, as_rows, prefetched, token_budget_rows
from trak.datasets.sources import (
    DatasetRows,
    IterableRows,
    PrefetchedRows,
    Range,
    RowSource,
    TensorRows,
    TokenBudgetRows,
)

__all__ = [
    "DEFAULT_BATCH_SIZE",
    "DatasetRows",
    "IterableRows",
    "PrefetchedRows",
    "Range",
    "RowSource",
    "TensorRows",
    "TokenBudgetRows",
    "as_rows",
    "content_hash",
    "prefetched",
    "token_budget_rows",
]
