import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from trak.datasets import as_rows, content_hash, prefetched, token_budget_rows
from trak.errors import InputError
from trak.methods.samples import some_rows

X, Y = torch.arange(10.0)[:, None], torch.arange(10)


class Squares(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, i):
        return X[i] ** 2, int(Y[i])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y))


class Restarting:
    def __iter__(self):
        for start in range(0, 10, 4):
            yield X[start : start + 4], Y[start : start + 4]


SOURCES = {
    "tensors": (X, Y),
    "mapping": {"x": X, "y": Y},
    "tensor dataset": TensorDataset(X, Y),
    "dataset": Squares(),
    "list": list(zip(X, Y)),
    "loader": DataLoader(TensorDataset(X, Y), batch_size=4),
    "shuffling loader": DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True, drop_last=True),
    "unbatched loader": DataLoader(TensorDataset(X, Y), batch_size=None),
    "iterable loader": DataLoader(Stream(), batch_size=4),
    "iterable": Restarting(),
}


@pytest.mark.parametrize("name", SOURCES)
def test_rows_are_positions_in_the_dataset(name):
    source = as_rows(SOURCES[name], batch_size=3)
    assert source.num_rows == 10
    seen = []
    for rows, batch in source.batches():
        labels = batch["y"] if isinstance(batch, dict) else batch[1]
        assert torch.equal(labels, rows)
        seen += rows.tolist()
    assert seen == list(range(10))
    example = source.example(7)
    assert (example["y"] if isinstance(example, dict) else example[1]).tolist() == [7]


@pytest.mark.parametrize("name", SOURCES)
def test_only_the_batches_that_hold_a_row_of_the_ranges(name):
    rows = [
        rows.tolist() for rows, _ in as_rows(SOURCES[name], batch_size=2).batches([(1, 2), (3, 4), (9, 10)])
    ]
    # The same batches as in a full pass: a resumed run computes the same numbers.
    if "iterable" in name:
        assert rows == [[0, 1, 2, 3], [8, 9]]
    else:
        assert rows == [[0, 1], [2, 3], [8, 9]]


@settings(max_examples=100)
@given(st.integers(1, 40), st.integers(1, 12), st.data())
def test_batches_of_ranges_are_batches_of_the_full_pass(num_rows, batch_size, data):
    edges = sorted(data.draw(st.sets(st.integers(0, num_rows), max_size=8)))
    ranges = [(a, b) for a, b in zip(edges[::2], edges[1::2])]
    source = as_rows(torch.arange(num_rows), batch_size=batch_size)
    full = [tuple(rows.tolist()) for rows, _ in source.batches()]
    assert sorted(sum(full, ())) == list(range(num_rows))
    wanted = {row for a, b in ranges for row in range(a, b)}
    got = [tuple(rows.tolist()) for rows, _ in source.batches(ranges)]
    assert got == [batch for batch in full if wanted & set(batch)]


def test_collate_function_batch_size_and_subset_of_a_loader():
    loader = DataLoader(
        Subset(TensorDataset(X, Y), [9, 3, 5]),
        batch_size=2,
        collate_fn=lambda items: torch.stack([x for x, _ in items]),
    )
    assert [batch.reshape(-1).tolist() for _, batch in as_rows(loader).batches()] == [[9.0, 3.0], [5.0]]


def test_sample_hash_tells_datasets_apart():
    assert as_rows((X, Y)).sample_hash() == as_rows((X.clone(), Y)).sample_hash()
    assert as_rows((X, Y)).sample_hash() != as_rows((X + 1, Y)).sample_hash()


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (iter([(X, Y)]), "read only once"),
        (5, "must be a DataLoader"),
        ("text", "must be a DataLoader"),
        ([], "empty"),
        ((X, Y[:4]), "must be a DataLoader|same number"),
        (
            DataLoader(TensorDataset(X, Y), sampler=WeightedRandomSampler([1.0] * 10, 10)),
            "WeightedRandomSampler",
        ),
        (DataLoader(TensorDataset(X, Y), batch_sampler=[[1, 2], [0]]), "batch sampler"),
    ],
)
def test_refused(data, match):
    with pytest.raises(InputError, match=match):
        as_rows(data)


def test_collate_that_drops_examples_is_caught():
    loader = DataLoader(
        TensorDataset(X, Y), batch_size=4, collate_fn=lambda items: torch.zeros(len(items) - 1, 2)
    )
    with pytest.raises(InputError, match="exactly one row"):
        list(as_rows(loader).batches())


def test_the_last_of_many_rows_is_one_that_is_there():
    class Many(Dataset):
        def __len__(self):
            return 2**24 + 4  # its last row is no float32

        def __getitem__(self, row):
            assert 0 <= row < len(self)
            return torch.tensor([row])

    assert as_rows(Many()).sample_hash()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert as_rows(Squares()).sample_hash() == as_rows(Squares()).sample_hash()
        assert as_rows(Many()).sample_hash()
    finally:
        torch.set_default_dtype(torch.float32)


def test_every_row_of_tensors_and_iterables_counts():
    other = Y.clone()
    other[1] = 7
    assert as_rows((X, Y)).sample_hash() != as_rows((X, other)).sample_hash()
    many = torch.arange(1000.0)
    changed = many.clone()
    changed[1] = 0.5
    assert as_rows(many).sample_hash() != as_rows(changed).sample_hash()

    class Other(Restarting):
        def __iter__(self):
            return ((x, y + 1) for x, y in super().__iter__())

    assert as_rows(Restarting()).sample_hash() == as_rows(Restarting()).sample_hash()
    assert as_rows(Restarting()).sample_hash() != as_rows(Other()).sample_hash()


@pytest.mark.parametrize(
    ("one", "other"),
    [("a", "b"), (1, 2), (0.5, 0.25), (True, False), ([1, 2], [2, 1]), (np.arange(3), np.arange(3) + 1)],
)
def test_content_hash_sees_what_is_no_tensor(one, other):
    assert content_hash([{"x": X, "more": one}]) == content_hash([{"x": X.clone(), "more": one}])
    assert content_hash([{"x": X, "more": one}]) != content_hash([{"x": X, "more": other}])


@pytest.mark.parametrize("data", [[torch.zeros(9, 2), torch.zeros(9)], (np.zeros((9, 2)), np.zeros(9))])
def test_a_list_or_arrays_in_place_of_a_tuple_of_tensors(data):
    with pytest.raises(InputError, match="pass a tuple of tensors"):
        list(as_rows(data).batches())


class Drawn(IterableDataset):
    """Row 0 stays, and the others change places."""

    def __iter__(self):
        order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(9)])
        return iter([(X[row], Y[row]) for row in order])


@pytest.mark.parametrize("wrap", [as_rows, prefetched])
def test_an_iterable_in_another_order_is_refused(wrap):
    torch.manual_seed(0)
    source = wrap(DataLoader(Drawn(), batch_size=4))
    with pytest.raises(InputError, match=r"rows 0 to 3 are not the examples.*Turn off shuffling"):
        list(source.batches())
    with pytest.raises(InputError, match="rows 8 to 9 are not"):
        list(source.batches([(9, 10)]))


class Ragged(Dataset):
    def __init__(self, lengths):
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        return torch.full((self.lengths[i],), float(i))


def pad(items):
    return torch.nn.utils.rnn.pad_sequence(items, batch_first=True, padding_value=-1.0)


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=40), st.integers(1, 60), st.integers(1, 50), st.data()
)
def test_batches_by_cost(lengths, budget, window, data):
    source = token_budget_rows(Ragged(lengths), lengths, budget, collate=pad, window=window)
    full = list(source.batches())
    assert sorted(torch.cat([rows for rows, _ in full]).tolist()) == list(range(len(lengths)))
    for rows, batch in full:
        assert batch.numel() <= budget or len(rows) == 1
        assert batch[:, 0].tolist() == rows.tolist()
        assert batch.shape == (len(rows), max(lengths[row] for row in rows.tolist()))
        assert len({row // window for row in rows.tolist()}) == 1
    edges = sorted(data.draw(st.sets(st.integers(0, len(lengths)), max_size=6)))
    ranges = [(a, b) for a, b in zip(edges[::2], edges[1::2])]
    wanted = {row for a, b in ranges for row in range(a, b)}
    got = [rows.tolist() for rows, _ in source.batches(ranges)]
    assert got == [rows.tolist() for rows, _ in full if wanted & set(rows.tolist())]


def test_batches_by_cost_waste_less():
    lengths = torch.randint(1, 100, (500,), generator=torch.Generator().manual_seed(0))
    sources = (
        as_rows(list(lengths), batch_size=20),
        token_budget_rows(Ragged(lengths), lengths, 1000, collate=pad),
    )
    padded = [sum(len(r) * int(lengths[r].max()) for r, _ in source.batches()) for source in sources]
    assert padded[1] < 1.05 * int(lengths.sum()) < 1.6 * int(lengths.sum()) < padded[0]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lengths": [1, 2]}, "lengths must be 3 whole numbers"),
        ({"lengths": [1, 0, 2]}, "a least of 0"),
        ({"lengths": [1.0, 2.0, 3.0]}, "whole numbers"),
        ({"token_budget": 0}, "token_budget"),
        ({"window": 0}, "window"),
        ({"num_workers": -1}, "num_workers"),
    ],
)
def test_budgets_that_cannot_be(options, match):
    options = {"lengths": [1, 2, 3], "token_budget": 5, **options}
    with pytest.raises(InputError, match=match):
        token_budget_rows(Ragged([1, 2, 3]), collate=pad, **options)


@pytest.mark.parametrize("name", SOURCES)
def test_loading_ahead_changes_nothing(name):
    plain, ahead = as_rows(SOURCES[name], batch_size=3), prefetched(SOURCES[name], batch_size=3)
    assert (ahead.num_rows, ahead.sample_hash()) == (plain.num_rows, plain.sample_hash())
    for ranges in (None, [(2, 3), (7, 9)]):
        both = list(zip(plain.batches(ranges), ahead.batches(ranges), strict=True))
        assert all(torch.equal(one[0], other[0]) for one, other in both)
        assert content_hash(one for one, _ in both) == content_hash(other for _, other in both)


class Slow(Dataset):
    """Notes what is loaded, and fails at row 6."""

    def __init__(self):
        self.loaded = []

    def __len__(self):
        return 8

    def __getitem__(self, i):
        if i == 6:
            raise OSError("row 6 cannot be read")
        self.loaded.append(i)
        return torch.tensor(float(i))


def test_one_batch_is_loaded_ahead_and_errors_come_in_their_place():
    dataset = Slow()
    batches = prefetched(dataset, batch_size=2).batches()
    next(batches)
    for _ in range(200):
        if len(dataset.loaded) == 4:
            break
        time.sleep(0.01)
    assert dataset.loaded == [0, 1, 2, 3]
    assert [rows.tolist() for rows, _ in (next(batches), next(batches))] == [[2, 3], [4, 5]]
    with pytest.raises(OSError, match="row 6"):
        next(batches)


def test_threads_end_with_the_loop():
    batches = prefetched(Slow(), batch_size=2).batches()
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("trak-loading")]


class Sevens:
    """Batches of seven rows, which can only be read from the front."""

    def __iter__(self):
        return (rows.double() for rows in torch.arange(40).split(7))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 40), max_size=10, unique=True).map(sorted))
def test_an_iterable_gives_the_batches_with_wanted_rows_and_no_others(edges):
    ranges = list(zip(edges[::2], edges[1::2]))
    wanted = {row // 7 for low, high in ranges for row in range(low, high)}
    found = [int(rows[0]) // 7 for rows, _ in as_rows(Sevens()).batches(ranges)]
    assert found == sorted(wanted)


class Padded:
    """Batches of three sequences, padded to another length every other batch."""

    def __iter__(self):
        return (torch.full((3, 2 + index // 2), index) for index in range(8))


def test_samples_of_an_iterable_are_put_together_where_batches_are_alike():
    sample = some_rows(as_rows(Padded()), torch.tensor([1, 4, 5, 6, 10, 22]))
    found = [(places.tolist(), batch[:, 0].tolist(), batch.shape[1]) for places, batch in sample.batches()]
    assert found == [([0, 1, 2], [0, 1, 1], 2), ([3, 4], [2, 3], 3), ([5], [7], 5)]
