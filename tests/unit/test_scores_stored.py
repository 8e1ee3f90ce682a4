"""Scores of features that lie in a store: read as they are stored, decoded a few rows at a time, one piece ahead."""

import pytest
import torch

from trak.errors import CorruptShardError, MissingRowsError
from trak.products import Product
from trak.scores import KernelScores, Member
from trak.store import RowSet, open_store
from trak.testing.store import make_header, make_values

N, K, T = 53, 7, 4
DTYPES = ["float16", "bfloat16", "float32", "float64"]


def stored(folder, feature_dtype, members=2, shard_rows=8, dim=K):
    """Scores, and the same by the definition, in float64 from what `RowSet.read` gives."""
    store = open_store(
        folder,
        make_header(feature_dtype=feature_dtype, dim=dim, columns=[("all", 0, dim)]),
        shard_rows=shard_rows,
    )
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float64 if feature_dtype == "float64" else torch.float32
    parts, expected = [], torch.zeros(N, T, dtype=torch.float64)
    weights = torch.rand(N, generator=generator)
    for model_id in range(members):
        store.add_checkpoint(model_id, f"hash {model_id}")
        features, outputs, q = make_values(dim=dim, seed=model_id)
        # Rows of very different sizes, as gradients are.
        features = features * 10.0 ** torch.randint(-6, 6, (N, 1), generator=generator)
        with store.rows(model_id).writer() as writer:
            writer.add(torch.arange(N), features, outputs, q)
        solved_TK = torch.randn(T, dim, generator=generator, dtype=dtype)
        parts.append(Member(store.rows(model_id), solved_TK))
        expected += store.rows(model_id).read(0, N).features.double() @ solved_TK.double().T
    scores = KernelScores(tuple(parts), weights, torch.device("cpu"), False)
    return scores, expected * weights.double().unsqueeze(1) / members


def assert_equal(found, expected):
    """To the rounding of the products, row by row."""
    size_N1 = expected.abs().amax(1, keepdim=True)
    epsilon = 1e-13 if found.dtype == torch.float64 else 2e-6
    assert ((found.double() - expected).abs() <= epsilon * size_N1).all()


@pytest.mark.parametrize("near", [True, False], ids=["memory", "disk"])
@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("feature_dtype", DTYPES)
def test_scores_are_the_definitions(tmp_path, monkeypatch, feature_dtype, members, near):
    # Three rows are decoded at once, and two shards read.
    monkeypatch.setattr("trak.products.DECODED_BYTES", 3 * 4 * K)
    monkeypatch.setattr("trak.products.PIECE_BYTES", 16 * 4 * K)
    scores, expected = stored(None if near else tmp_path, feature_dtype, members)
    for block_rows in (None, 1, 8, 13, 100):
        blocks = list(scores.blocks(block_rows))
        assert_equal(torch.cat([block for _, block in blocks]), expected)
    assert blocks[0][1].dtype == (torch.float64 if feature_dtype == "float64" else torch.float32)
    assert_equal(scores.read(5, 29), expected[5:29])
    assert scores.read(9, 9).shape == (0, T) and scores.read(9, 9).dtype == blocks[0][1].dtype
    assert_equal(scores[[50, 3, 3], 1:3], expected[[50, 3, 3], 1:3])
    assert torch.equal(scores.top(5).rows, expected.sort(dim=0, descending=True).indices[:5].T)


@pytest.mark.parametrize(
    ("near", "few_targets", "left"),
    [(True, T, 0), (False, T - 1, 0), (False, T, 1)],
    ids=["memory", "many", "few"],
)
def test_a_core_is_left_for_reading_where_targets_are_few(tmp_path, monkeypatch, near, few_targets, left):
    """While a piece is multiplied, and not while whoever asked for a block works with it."""
    monkeypatch.setattr("trak.scores.FEW_TARGETS", few_targets)
    monkeypatch.setattr("trak.hardware.available_cores", lambda: 2)
    seen, add, before = set(), Product.add, torch.get_num_threads()
    monkeypatch.setattr(
        Product, "add", lambda *args, **named: (seen.add(torch.get_num_threads()), add(*args, **named))
    )
    torch.set_num_threads(2)
    try:
        for _ in stored(None if near else tmp_path, "float16")[0].blocks(8):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == {2 - left}


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_rows_and_targets_of_any_size(size, monkeypatch):
    """Rows are scaled after their products only where that is exact."""
    monkeypatch.setattr("trak.products.DECODED_BYTES", 3 * 4 * K)
    for row_size in (1 / size, 1e-6 / size):
        rows = open_store(
            None, make_header(feature_dtype="float16", dim=K, columns=[("all", 0, K)]), shard_rows=8
        )
        rows.add_checkpoint(0, "hash")
        features, outputs, q = make_values(dim=K, seed=0)
        with rows.rows(0).writer() as writer:
            writer.add(torch.arange(N), features * row_size, outputs, q)
        solved_TK = torch.randn(T, K, generator=torch.Generator().manual_seed(0)) * size
        found = KernelScores((Member(rows.rows(0), solved_TK),), torch.ones(N), torch.device("cpu"), False)
        assert_equal(found.tensor(), rows.rows(0).read(0, N).features.double() @ solved_TK.double().T)


def test_scaling_scores_and_scaling_rows_give_the_same_bits():
    """Targets beyond 2^64 have their rows scaled before the products, others after."""
    scores, _ = stored(None, "float16", members=1)
    (member,) = scores.members
    large = KernelScores(
        (Member(member.rows, member.solved_TK * 2.0**70),), scores.weights, torch.device("cpu"), False
    )
    assert torch.equal(large.tensor() * 2.0**-70, scores.tensor())


@pytest.mark.parametrize("feature_dtype", DTYPES)
def test_disk_and_memory_give_the_same_bits(tmp_path, feature_dtype):
    found = [stored(folder, feature_dtype)[0].tensor() for folder in (tmp_path, None)]
    assert torch.equal(*found)


def test_a_store_in_memory_is_not_written_to(monkeypatch):
    monkeypatch.setattr("trak.products.DECODED_BYTES", 3 * 4 * K)
    for feature_dtype in DTYPES:
        scores, _ = stored(None, feature_dtype, members=1)
        rows = scores.members[0].rows
        before = rows.read(0, N).features
        scores.tensor()
        assert torch.equal(rows.read(0, N).features, before)


def ranges_read(scores, monkeypatch):
    asked, plain = [], RowSet.read_stored
    with monkeypatch.context() as patched:
        patched.setattr(
            RowSet,
            "read_stored",
            lambda self, start, stop: asked.append((start, stop)) or plain(self, start, stop),
        )
        scores.tensor()
    return asked


def test_whole_shards_are_read_unless_they_are_large(tmp_path, monkeypatch):
    """So that they are compared with their checksums; a piece of half a shard would not be."""
    scores, _ = stored(tmp_path, "float16", members=1)
    # Six rows in float32, less than a shard; in float16 a shard has two thirds of that.
    monkeypatch.setattr("trak.products.PIECE_BYTES", 6 * 4 * K)
    assert ranges_read(scores, monkeypatch) == [(start, min(start + 8, N)) for start in range(0, N, 8)]
    # Three times as much as a piece: not held as a whole.
    monkeypatch.setattr("trak.products.PIECE_BYTES", 8 * 2 * K // 3)
    assert max(stop - start for start, stop in ranges_read(scores, monkeypatch)) == 1


def test_damage_and_gaps_come_up_while_scoring(tmp_path):
    scores, _ = stored(tmp_path, "float16", members=1)
    path = sorted(tmp_path.rglob("rows-*"))[3]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # Features are the last that a file holds.
    path.write_bytes(data)
    for read in (scores.tensor, lambda: scores.extremes(3), lambda: scores.read(20, 40)):
        with pytest.raises(CorruptShardError, match="checksum of 'features'"):
            read()
    assert scores.read(0, 24).isfinite().all()
    path.unlink()
    with pytest.raises(MissingRowsError, match="rows 24 to 31"):
        scores.tensor()
