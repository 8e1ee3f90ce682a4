"""The contract of a store, as tests that any implementation can run. Needs pytest.

Subclass `StoreContract` in a test module, call it `Test...`, and override the fixture `make_store`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from trak.errors import FingerprintError, InputError, MissingRowsError, NonFiniteError, ProtocolError
from trak.store import Header, RowSet, Store

MakeStore = Callable[[Header, int], Store]
"""(header, shard_rows) to a new, empty store."""

NUM_ROWS, DIM, SHARD_ROWS = 53, 7, 8
TOLERANCE = {"float64": 0.0, "float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-10}
"""Largest error of a stored feature, relative to the largest of its row."""


def make_header(**changes: Any) -> Header:
    """A small header; keyword arguments replace its fields."""
    fields: dict[str, Any] = {
        "num_rows": NUM_ROWS,
        "dim": DIM,
        "columns": [("all", 0, DIM)],
        "parameters": {"weight": (3, 4), "bias": (3,)},
        "projection": {"kind": "rademacher", "version": 1, "seed": 0, "dim": DIM},
        "task": {"task": "regression"},
    }
    return Header(**{**fields, **changes})


def make_values(num_rows: int = NUM_ROWS, dim: int = DIM, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features [N, K], outputs [N], weights [N] in float32."""
    generator = torch.Generator().manual_seed(seed)
    features_NK = torch.randn(num_rows, dim, generator=generator)
    return features_NK, torch.randn(num_rows, generator=generator), torch.rand(num_rows, generator=generator)


def write(rows: RowSet, batches: Iterable[Tensor], values: tuple[Tensor, Tensor, Tensor]) -> None:
    """Add batches of row numbers, with their values, through one writer."""
    with rows.writer() as writer:
        for batch in batches:
            writer.add(batch, *(value[batch] for value in values))


def snapshot(rows: RowSet) -> list[Tensor]:
    """All that can be read of a complete row set."""
    whole = rows.read(0, rows.num_rows)
    return [whole.features, whole.outputs, whole.weights, rows.outputs(), rows.weights()]


every_dtype = pytest.mark.parametrize("feature_dtype", sorted(TOLERANCE))


class StoreContract:
    """What every store promises."""

    @pytest.fixture
    def make_store(self) -> MakeStore:
        """How to make an empty store; to be overridden."""
        raise NotImplementedError

    @pytest.fixture
    def feature_dtype(self) -> str:
        """The dtype with the most to it, where a test does not ask for all."""
        return "float16"

    @pytest.fixture
    def store(self, make_store: MakeStore, feature_dtype: str) -> Store:
        """A store with checkpoint 3 and experiment "val" of 5 targets, no rows."""
        store = make_store(make_header(feature_dtype=feature_dtype), SHARD_ROWS)
        store.add_checkpoint(3, "hash")
        store.add_experiment("val", 5, "targets")
        return store

    @pytest.fixture
    def rows(self, store: Store) -> RowSet:
        """Training rows of checkpoint 3, none stored."""
        return store.rows(3)

    @every_dtype
    def test_rows_come_back(self, rows: RowSet, feature_dtype: str) -> None:
        """Features within the dtype's rounding, outputs and weights exactly; NaN nowhere."""
        values = make_values()
        write(rows, torch.arange(NUM_ROWS).split(10), values)
        whole = rows.read(0, NUM_ROWS)
        wide = torch.float64 if feature_dtype == "float64" else torch.float32
        assert whole.features.dtype == whole.outputs.dtype == whole.weights.dtype == wide
        error_N = (whole.features.double() - values[0].double()).abs().amax(1)
        assert (error_N <= TOLERANCE[feature_dtype] * values[0].double().abs().amax(1)).all()
        assert torch.equal(whole.outputs, values[1].to(wide))
        assert torch.equal(whole.weights, values[2].to(wide))
        assert (whole.start, whole.stop) == (0, NUM_ROWS)

    @every_dtype
    @pytest.mark.parametrize("batch_size", [1, 9, 53])
    @pytest.mark.parametrize("shuffled", [False, True])
    def test_order_and_batch_size_do_not_matter(
        self, make_store: MakeStore, feature_dtype: str, batch_size: int, shuffled: bool
    ) -> None:
        """The same bits whatever the order of rows and the batch size."""
        values = make_values()
        order = (
            torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(1))
            if shuffled
            else torch.arange(NUM_ROWS)
        )
        seen = []
        for batches in ([torch.arange(NUM_ROWS)], order.split(batch_size)):
            store = make_store(make_header(feature_dtype=feature_dtype), SHARD_ROWS)
            store.add_checkpoint(0, "hash")
            write(store.rows(0), batches, values)
            seen.append(snapshot(store.rows(0)))
        assert all(torch.equal(a, b) for a, b in zip(*seen))

    @every_dtype
    def test_partial_reads_and_blocks_are_slices_of_the_whole(self, rows: RowSet) -> None:
        """Any range, across shards, and blocks of any size."""
        write(rows, [torch.arange(NUM_ROWS)], make_values())
        whole = rows.read(0, NUM_ROWS)
        for start, stop in [(0, 0), (0, 1), (7, 9), (3, 30), (48, 53), (53, 53)]:
            part = rows.read(start, stop)
            assert torch.equal(part.features, whole.features[start:stop])
            assert torch.equal(part.outputs, whole.outputs[start:stop])
        for block_rows in (None, 1, 5, 16, 100):
            blocks = list(rows.blocks(block_rows))
            assert [block.start for block in blocks] == list(range(0, NUM_ROWS, block_rows or SHARD_ROWS))
            assert torch.equal(torch.cat([block.features for block in blocks]), whole.features)
        assert torch.equal(rows.weights(), whole.weights)

    @every_dtype
    def test_stored_parts_decode_to_what_is_read(self, rows: RowSet) -> None:
        """In order, one for each shard, whether their rows are in shards or not; decoded a few rows at a time."""
        write(rows, [torch.arange(40), torch.arange(41, NUM_ROWS), torch.tensor([40])], make_values())
        for start, stop in [(0, 0), (0, 1), (7, 9), (0, 16), (3, 30), (48, 53), (0, 53)]:
            parts = rows.read_stored(start, stop)
            assert len(parts) == len({row // SHARD_ROWS for row in range(start, stop)})
            expected = rows.read(start, stop).features
            found = [torch.empty(0, DIM, dtype=expected.dtype)]
            for part in parts:
                assert part.dtype == expected.dtype
                for low in range(0, len(part), 3):
                    high = min(low + 3, len(part))
                    found.append(part.decode(low, high, torch.empty(high - low, DIM, dtype=part.dtype)))
                assert not part.is_plain or torch.equal(part.features, torch.cat(found)[-len(part) :])
            assert torch.equal(torch.cat(found), expected)

    def test_stored_parts_are_refused_where_reading_is(self, rows: RowSet) -> None:
        """Missing rows, ranges outside, deleted features; rows of unfinished shards are given."""
        write(rows, [torch.arange(20)], make_values())
        assert sum(len(part) for part in rows.read_stored(0, 20)) == 20
        with pytest.raises(MissingRowsError, match="rows 20 to 23 are missing"):
            rows.read_stored(8, 24)
        with pytest.raises(InputError, match="got start 8 and stop 54"):
            rows.read_stored(8, NUM_ROWS + 1)
        write(rows, [torch.arange(20, NUM_ROWS)], make_values())
        rows.delete_features()
        with pytest.raises(MissingRowsError, match="deleted"):
            rows.read_stored(0, 8)

    @every_dtype
    def test_what_is_read_is_a_copy(self, rows: RowSet) -> None:
        """Changing what was read, or what was added, changes nothing in the store."""
        values = make_values()
        with rows.writer() as writer:
            buffer = [value[:10].clone() for value in values]
            writer.add(torch.arange(10), *buffer)
            for value in buffer:
                value.fill_(0.0)
        before = rows.read(0, 10)
        rows.read(0, 10).features.fill_(0.0)
        rows.read(0, 8).outputs.fill_(0.0)
        assert torch.equal(before.features, rows.read(0, 10).features)
        assert before.features.abs().amin() > 0
        assert torch.equal(before.outputs, values[1][:10].to(before.outputs.dtype))

    def test_missing_rows_are_named_and_never_zeros(self, rows: RowSet) -> None:
        """An error with the ranges; reading what is there works."""
        assert rows.missing() == [(0, NUM_ROWS)]
        assert not rows.is_complete
        write(rows, [torch.tensor([0, 1, 2, 5, *range(16, 24), 30])], make_values())
        assert rows.missing() == [(3, 5), (6, 16), (24, 30), (31, NUM_ROWS)]
        with pytest.raises(
            MissingRowsError, match="rows 3 to 4, 6 to 15, 24 to 29 and 31 to 52 are missing for checkpoint 3"
        ):
            rows.read(0, NUM_ROWS)
        with pytest.raises(MissingRowsError, match="row 4 is missing for checkpoint 3"):
            rows.read(4, 6)
        for read in (
            rows.outputs,
            rows.weights,
            rows.blocks,
            lambda: rows.save_derived("gram", {}),
            rows.delete_features,
        ):
            with pytest.raises(MissingRowsError, match="31 to 52"):
                read()
        assert torch.equal(
            rows.read(16, 24).outputs, make_values()[1][16:24].to(rows.read(16, 24).outputs.dtype)
        )
        assert rows.read(0, 3).features.abs().amin() > 0

    def test_has(self, rows: RowSet) -> None:
        """Stored rows, in shards or not."""
        write(rows, [torch.arange(8, 20)], make_values())
        assert rows.has(torch.tensor([7, 8, 19, 20, 52])).tolist() == [False, True, True, False, False]
        assert rows.has(torch.tensor([], dtype=torch.int64)).tolist() == []
        assert rows.writer().has(torch.tensor([7, 8, 19, 20])).tolist() == [False, True, True, False]
        for refused in (rows.has, rows.outputs_of):
            with pytest.raises(InputError, match="0 to 52"):
                refused(torch.tensor([53]))

    def test_outputs_of_some_rows(self, rows: RowSet) -> None:
        """Any order, also twice, from shards and fragments, and after features were deleted."""
        values = make_values()
        write(rows, [torch.arange(20)], values)
        some = torch.tensor([18, 3, 4, 5, 3, 19, 0])
        assert torch.equal(rows.outputs_of(some), values[1][some])
        assert rows.outputs_of(some[:0]).shape == (0,)
        with pytest.raises(MissingRowsError, match="row 20 is missing"):
            rows.outputs_of(torch.tensor([3, 20]))
        write(rows, [torch.arange(NUM_ROWS)], values)
        rows.delete_features()
        assert torch.equal(rows.outputs_of(some), values[1][some])

    @every_dtype
    def test_stored_rows_are_skipped(self, rows: RowSet) -> None:
        """A row keeps what was stored first: within a writer and after a restart, in a shard or out of it."""
        values = make_values()
        other = (values[0] + 1, values[1] + 1, values[2] + 1)
        with rows.writer() as writer:
            writer.add(torch.arange(12), *(value[:12] for value in values))
            writer.add(torch.arange(12), *(value[:12] for value in other))
        write(rows, torch.arange(NUM_ROWS).split(7), other)
        outputs = rows.outputs()
        assert torch.equal(outputs[:12], values[1][:12].to(outputs.dtype))
        assert torch.equal(outputs[12:], other[1][12:].to(outputs.dtype))

    def test_an_exception_keeps_what_was_added(self, rows: RowSet) -> None:
        """Also rows of unfinished shards; the exception passes."""
        values = make_values()
        with pytest.raises(KeyboardInterrupt), rows.writer() as writer:  # noqa: PT012
            writer.add(torch.arange(20), *(value[:20] for value in values))
            raise KeyboardInterrupt
        assert rows.missing() == [(20, NUM_ROWS)]

    def test_closed_writer(self, rows: RowSet) -> None:
        """No rows after closing; closing twice is fine."""
        writer = rows.writer()
        writer.close()
        writer.close()
        with pytest.raises(ProtocolError, match="closed"):
            writer.add(torch.arange(1), *(value[:1] for value in make_values()))

    def test_random_order_needs_bounded_memory(self, rows: RowSet) -> None:
        """Never more than a few shards' rows and a batch."""
        values = make_values()
        with rows.writer() as writer:
            for batch in torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(2)).split(3):
                writer.add(batch, *(value[batch] for value in values))
                assert writer.num_buffered <= 4 * SHARD_ROWS
        assert rows.is_complete

    @pytest.mark.parametrize(
        ("rows_given", "changes", "message"),
        [
            ([0, 1, 0], {}, "row 0 of checkpoint 3 came more than once"),
            ([0, 53, -1], {}, "0 to 52; got 53, -1"),
            ([[0, 1, 2]], {}, "int64 tensor of shape"),
            ([0.0, 1.0, 2.0], {}, "int64 tensor of shape"),
            (
                [0, 1, 2],
                {"features": torch.zeros(3, DIM + 1)},
                r"features .* shape \[3, 7\]; got float32 \[3, 8\]",
            ),
            ([0, 1, 2], {"outputs": torch.zeros(2)}, r"outputs .* shape \[3\]"),
            ([0, 1, 2], {"weights": torch.zeros(3, 1)}, r"weights .* shape \[3\]"),
            ([0, 1, 2], {"features": torch.zeros(3, DIM, dtype=torch.int64)}, "floating-point"),
            ([0, 1, 2], {"outputs": None}, "outputs .* got NoneType"),
        ],
    )
    def test_wrong_batches_are_refused_whole(
        self, rows: RowSet, rows_given: list[Any], changes: dict[str, Any], message: str
    ) -> None:
        """An error, and not one row of the batch is stored."""
        features, outputs, weights = (value[:3] for value in make_values())
        batch = {"features": features, "outputs": outputs, "weights": weights, **changes}
        with rows.writer() as writer, pytest.raises(InputError, match=message):
            writer.add(torch.tensor(rows_given), **batch)
        assert rows.missing() == [(0, NUM_ROWS)]

    @every_dtype
    @pytest.mark.parametrize("name", ["features", "outputs", "weights"])
    @pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
    def test_non_finite_numbers_are_refused_whole(self, rows: RowSet, name: str, bad: float) -> None:
        """The error names checkpoint and rows; not one row of the batch is stored."""
        values = dict(
            zip(("features", "outputs", "weights"), (value[:20].clone() for value in make_values()))
        )
        values[name][[4, 11], ...] = bad
        with (
            rows.writer() as writer,
            pytest.raises(NonFiniteError, match=f"{name} of checkpoint 3, rows 24, 31"),
        ):
            writer.add(torch.arange(20, 40), **values)
        assert rows.missing() == [(0, NUM_ROWS)]

    @every_dtype
    def test_large_and_tiny_rows_come_back(self, rows: RowSet, feature_dtype: str) -> None:
        """Rows of 1e30 and of 1e-30 side by side."""
        features, outputs, weights = make_values()
        features = features * torch.logspace(-30, 30, NUM_ROWS).unsqueeze(1)
        write(rows, [torch.arange(NUM_ROWS)], (features, outputs, weights))
        error_N = (rows.read(0, NUM_ROWS).features.double() - features.double()).abs().amax(1)
        assert (error_N <= TOLERANCE[feature_dtype] * features.double().abs().amax(1)).all()

    def test_derived_results(self, rows: RowSet) -> None:
        """Kept beside the rows, replaced under the same name, copies."""
        write(rows, [torch.arange(NUM_ROWS)], make_values())
        gram = torch.eye(3, dtype=torch.float64)
        assert rows.derived("gram") is None
        rows.save_derived(
            "gram",
            {"gram": gram, "same": gram, "transposed": torch.ones(2, 3).T, "scalar": torch.tensor(2.0)},
        )
        gram.zero_()
        kept = rows.derived("gram")
        assert kept is not None
        assert sorted(kept) == ["gram", "same", "scalar", "transposed"]
        assert torch.equal(kept["gram"], torch.eye(3, dtype=torch.float64))
        assert kept["transposed"].shape == (3, 2)
        rows.save_derived("gram", {"gram": torch.zeros(1)})
        assert list(rows.derived("gram") or {}) == ["gram"]
        with pytest.raises(InputError, match="derived result"):
            rows.derived("../gram")
        with pytest.raises(InputError, match="list"):
            rows.save_derived("gram", {"gram": [1.0]})  # type: ignore[dict-item]

    def test_delete_features(self, rows: RowSet) -> None:
        """Outputs, weights and derived results stay; features are gone and said to be; nothing is missing."""
        values = make_values()
        write(rows, torch.arange(NUM_ROWS).split(20), values)
        rows.save_derived("gram", {"gram": torch.eye(2)})
        outputs, weights = rows.outputs(), rows.weights()
        rows.delete_features()
        rows.delete_features()
        assert not rows.has_features
        assert rows.is_complete
        assert torch.equal(rows.outputs(), outputs)
        assert torch.equal(rows.weights(), weights)
        assert rows.derived("gram") is not None
        for read in (lambda: rows.read(0, 1), rows.blocks):
            with pytest.raises(MissingRowsError, match="features of checkpoint 3 were deleted"):
                read()
        write(rows, [torch.arange(NUM_ROWS)], values)
        assert not rows.has_features

    def test_checkpoints(self, store: Store) -> None:
        """Ids in numeric order; adding again is nothing; other weights under one id are refused."""
        for model_id in (10, 0, 3):
            store.add_checkpoint(model_id, "hash")
        assert store.checkpoints() == [0, 3, 10]
        assert store.checkpoint_fingerprint(10) == "hash"
        with pytest.raises(FingerprintError, match="fingerprint: stored 'hash', asked for 'other'"):
            store.add_checkpoint(3, "other")
        for bad in (-1, True, "3", 1.0, None):
            with pytest.raises(InputError, match="model_id"):
                store.add_checkpoint(bad, "hash")  # type: ignore[arg-type]
        with pytest.raises(InputError, match="Checkpoint 4 is not in the store"):
            store.rows(4)
        with pytest.raises(InputError, match="fingerprint"):
            store.add_checkpoint(5, "")

    def test_experiments(self, store: Store) -> None:
        """Names, sizes and fingerprints; each has rows of its own for each checkpoint."""
        store.add_experiment("val", 5, "targets")
        store.add_experiment("val", 5)
        store.add_experiment("test-2.0", 9)
        assert store.experiments() == ["test-2.0", "val"]
        assert store.experiment_num_rows("val") == 5
        assert store.experiment_fingerprint("val") == "targets"
        assert store.experiment_fingerprint("test-2.0") is None
        with pytest.raises(FingerprintError, match="num_rows: stored 5, asked for 6"):
            store.add_experiment("val", 6)
        with pytest.raises(FingerprintError, match="fingerprint: stored 'targets', asked for 'others'"):
            store.add_experiment("val", 5, "others")
        with pytest.raises(InputError, match="'nothing' is not in the store"):
            store.rows(3, "nothing")
        targets = store.rows(3, "val")
        write(targets, [torch.arange(5)], make_values(5, seed=1))
        assert targets.is_complete
        assert targets.num_rows == 5
        assert not store.rows(3).is_complete
        with pytest.raises(MissingRowsError, match=r"checkpoint 3 in experiment 'test-2\.0'"):
            store.rows(3, "test-2.0").read(0, 1)

    @pytest.mark.parametrize(
        "name",
        ["", "..", ".", "a/b", "a\\b", ".hidden", "a b", "é", "con", "NUL.txt", "a.", "x" * 101, 3, None],
    )
    def test_unsafe_experiment_names(self, store: Store, name: Any) -> None:
        """Nothing that could leave the folder or that some file system cannot hold."""
        with pytest.raises(InputError, match="experiment's name must be 1 to 100 characters"):
            store.add_experiment(name, 5)

    def test_no_rows(self, make_store: MakeStore) -> None:
        """A row set of nothing is complete and can be read."""
        store = make_store(make_header(num_rows=0), SHARD_ROWS)
        store.add_checkpoint(0, "hash")
        rows = store.rows(0)
        write(rows, [], make_values())
        assert rows.is_complete
        assert rows.outputs().shape == (0,)
        assert rows.read(0, 0).features.shape == (0, DIM)
        assert list(rows.blocks()) == []

    @pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 2), (0, 54), (0.0, 1), (True, 2)])
    def test_ranges_that_cannot_be(self, rows: RowSet, start: Any, stop: Any) -> None:
        """No silent clipping."""
        with pytest.raises(InputError, match=r"start|stop|rows 0 to 52"):
            rows.read(start, stop)

    @every_dtype
    def test_gradients_and_other_dtypes_are_taken(self, rows: RowSet) -> None:
        """Tensors with a graph, of another precision, not contiguous, with int32 row numbers."""
        features, outputs, weights = make_values(8)
        with rows.writer() as writer:
            writer.add(
                torch.arange(8, dtype=torch.int32),
                features.double().T.contiguous().T.requires_grad_(),
                outputs.half(),
                weights.bfloat16(),
            )
        part = rows.read(0, 8)
        assert not part.features.requires_grad
        assert torch.equal(part.outputs, outputs.half().to(part.outputs.dtype))
