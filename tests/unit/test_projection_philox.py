"""The generator: published answers, an independent implementation, keys, and packed against plain signs."""

import hashlib
import math

import numpy as np
import pytest
import torch

from trak.projection.normals import draw_normals, reference_normals
from trak.projection.philox import _rounds, derive_key, draw_words, philox4x32
from trak.projection.shifts import Shifts
from trak.projection.signs import (
    _look_up_by_numpy,
    _look_up_by_torch,
    _pack_by_numpy,
    _pack_by_torch,
    draw_packed_signs,
    reference_signs,
    unpack_signs,
)

ONES = 0xFFFFFFFF
# Known answers published with the Random123 library (philox4x32, 10 rounds): counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox_by_integers(counter, key):
    """Straight from the paper, on Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(second >> 32) ^ c[1] ^ k[0], second & ONES, (first >> 32) ^ c[3] ^ k[1], first & ONES]
        k = [(k[0] + 0x9E3779B9) & ONES, (k[1] + 0xBB67AE85) & ONES]
    return tuple(c)


def philox_by_uint64(counters, key):
    """Out of place on unsigned 64-bit NumPy: written apart from the library's."""
    c = [np.asarray(counter, dtype=np.uint64) for counter in counters]
    k0, k1 = (np.uint64(word) for word in key)
    low, half = np.uint64(ONES), np.uint64(32)
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(second >> half) ^ c[1] ^ k0, second & low, (first >> half) ^ c[3] ^ k1, first & low]
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return c


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_published_answers(counter, key, words):
    tensors = [torch.tensor([word]) for word in counter]
    assert tuple(int(word) for word in philox4x32(tensors, key)) == words
    assert (
        tuple(int(word) for word in _rounds(torch, [*tensors, *(t.clone() for t in tensors[:2])], key))
        == words
    )
    assert philox_by_integers(counter, key) == words
    assert tuple(int(word[0]) for word in philox_by_uint64([[word] for word in counter], key)) == words


def test_numpy_and_torch_run_the_same_arithmetic():
    generator = torch.Generator().manual_seed(0)
    counters = [torch.randint(0, ONES + 1, (3, 500), generator=generator) for _ in range(4)]
    key = (0xDEADBEEF, 0xFEEDFACE)
    kept = [counter.clone() for counter in counters]
    got = philox4x32(counters, key)
    assert all(torch.equal(counter, before) for counter, before in zip(counters, kept)), (
        "the input was overwritten"
    )
    buffers = [counter.clone() for counter in counters] + [torch.empty_like(counters[0]) for _ in range(2)]
    on_torch = _rounds(torch, buffers, key)
    for mine, other, theirs in zip(got, on_torch, philox_by_uint64([c.numpy() for c in counters], key)):
        assert torch.equal(mine, other)
        assert np.array_equal(mine.numpy().astype(np.uint64), theirs)


def test_counters_are_first_low_first_high_second_zero():
    rows = torch.tensor([0, 5, (1 << 32) - 1, 1 << 32, (7 << 32) + 3])
    key = (1, 2)
    words = draw_words(key, rows, 3)
    for index, row in enumerate(rows.tolist()):
        for block in range(3):
            expected = philox_by_integers((row & ONES, row >> 32, block, 0), key)
            assert tuple(int(word[index, block]) for word in words) == expected


def test_key_is_the_documented_hash():
    digest = hashlib.sha256(b"trak-projection\nkronecker\n1\n-3\n12\nrows.0\nlayer.\xc3\xa9.weight").digest()
    expected = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))
    assert derive_key("kronecker", 1, -3, 12, "layer.é.weight", "rows.0") == expected


def test_keys_do_not_collide():
    keys = {
        derive_key(kind, version, seed, checkpoint, f"layers.{layer}.weight", role)
        for kind in ("rademacher", "sparse")
        for version in (1, 2)
        for seed in range(20)
        for checkpoint in range(20)
        for layer in range(20)
        for role in ("", "rows.0")
    }
    assert len(keys) == 2 * 2 * 20 * 20 * 20 * 2
    assert derive_key("a", 1, 11, 1, "w") != derive_key("a", 1, 1, 11, "w")
    assert derive_key("a", 1, 1, 1, "b\nw") != derive_key("a", 1, 1, 1, "w", "b")


@pytest.mark.parametrize("columns", [1, 7, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_signs_are_the_plain_ones(columns, dtype):
    blocks = torch.tensor([0, 3, 1 << 33])
    packed = draw_packed_signs((3, 4), blocks, columns)
    assert packed.shape == (columns, 3 * 16)
    signs = unpack_signs(packed, dtype)
    assert signs.dtype == dtype
    assert torch.equal(signs, reference_signs((3, 4), blocks, columns).to(dtype))
    assert torch.equal(signs, unpack_signs(packed, dtype, torch.empty(signs.numel() + 5, dtype=dtype)))
    for index, block in enumerate(blocks.tolist()):
        for column in range(columns):
            words = philox_by_integers((block & ONES, block >> 32, column, 0), (3, 4))
            expected = [1 if words[row // 32] >> row % 32 & 1 else -1 for row in range(128)]
            assert signs[128 * index : 128 * index + 128, column].tolist() == expected


def test_numpy_and_torch_pack_and_unpack_alike():
    words = draw_words((1, 2), torch.arange(50), 3)
    packed = _pack_by_numpy(words)
    assert torch.equal(packed, _pack_by_torch(words))
    one, two = torch.empty(2, packed.numel(), 8)
    _look_up_by_numpy(packed, one)
    _look_up_by_torch(packed, two)
    assert torch.equal(one, two)


@pytest.mark.parametrize("columns", [1, 600])
def test_normals_by_their_description(columns):
    blocks = torch.tensor([2, 1 << 33])
    normals = draw_normals((3, 4), blocks, columns, torch.float64)
    assert normals.shape == (256, columns)
    assert torch.equal(normals.float(), reference_normals((3, 4), blocks, columns))
    for index, block in enumerate(blocks.tolist()):
        for lane in (0, 17, 31):
            column = columns - 1
            words = philox_by_integers((block & ONES, block >> 32, column, lane), (3, 4))
            for pair in (0, 2):
                radius = math.sqrt(-2 * math.log((words[pair] + 0.5) / 2**32))
                angle = 2 * math.pi * (words[pair + 1] + 0.5) / 2**32
                first = 128 * index + 32 * pair + lane
                assert normals[first, column] == pytest.approx(radius * math.cos(angle), abs=1e-6)
                assert normals[first + 32, column] == pytest.approx(radius * math.sin(angle), abs=1e-6)


@pytest.mark.parametrize(
    ("nonzeros", "columns", "size"),
    [
        (1, 1, 40),
        (1, 100, 50),
        (1, 100, 20_000),
        (3, 100, 20_000),
        (5, 5, 300),
        (4, 7, 300),
        (2, 9000, 10**6),
    ],
)
def test_sparse_columns_and_signs_by_their_description(nonzeros, columns, size):
    """Written again from the text of `Shifts`, on Python's integers."""
    length = columns // nonzeros
    blocks = -(-size // length)
    lanes = max(1, min(8192 // length, blocks // 16))
    entries = torch.randint(size, (60,), generator=torch.Generator().manual_seed(0))
    entries[:4] = torch.tensor([0, 1, 2, size - 1])
    shifts = Shifts((8, 9), (10, 11), size, columns, nonzeros)
    got_columns, got_signs = shifts.draw_rows(entries, 1)
    for index, entry in enumerate(entries.tolist()):
        block, offset = divmod(entry, length)
        for group in range(nonzeros):
            first, last = group * columns // nonzeros, (group + 1) * columns // nonzeros
            outer = philox_by_integers((block // lanes, 0, group, 0), (10, 11))[0] * (last - first) >> 32
            inner = philox_by_integers((block % lanes, 0, group, 0), (10, 11))[1] * (last - first) >> 32
            assert got_columns[group, index] == first + (offset + outer + inner) % (last - first)
            assert shifts.moves_sn[group, block] == (outer + inner) % (last - first)
            word = philox_by_integers((entry // 128, 0, group, 0), (8, 9))[entry % 128 // 32]
            assert got_signs[group, index] == (1 if word >> entry % 32 & 1 else -1)
        assert len(set(got_columns[:, index].tolist())) == nonzeros


@pytest.mark.parametrize(("first", "stop"), [(0, 1), (0, 500), (127, 129), (300, 777)])
def test_signs_of_a_range_are_those_of_its_entries(first, stop):
    shifts = Shifts((8, 9), (10, 11), 777, 30, 3)
    signs = shifts.signs(first, stop, torch.float64)
    assert torch.equal(signs, shifts.draw_rows(torch.arange(first, stop), 1)[1].double())


@pytest.mark.parametrize("width", [1, 8, 20, 96, 128, 130, 300])
def test_rows_are_those_of_their_entries(width):
    """Also the last one, whose last block is not full."""
    shifts = Shifts((8, 9), (10, 11), 41 * width, 30, 3)
    every = [part.view(3, 41, width) for part in shifts.draw_range(0, 41 * width)]
    rows = torch.tensor([40, 0, 7, 8, 7, 39])
    for got, expected in zip(shifts.draw_rows(rows, width), every):
        assert torch.equal(got.view(3, -1, width), expected[:, rows])
    assert [part.shape for part in shifts.draw_rows(rows[:0], width)] == [(3, 0), (3, 0)]


def test_shifts_are_even_and_those_of_two_blocks_independent():
    """Places of single entries, and differences between two blocks: in one superblock, in two, and in the same lane of two."""
    size, columns = 64 * 64 * 16, 64
    places = []
    for seed in range(3000):
        shifts = Shifts((5, 6), (7, seed), size, columns, 1)
        assert shifts.lanes == 64
        places.append(shifts.moves_sn[0, [0, 1, 64, 65]])
    first, neighbour, same_lane, other = torch.stack(places, dim=1)
    for values in (first, neighbour - first, same_lane - first, other - first):
        counts = (values % columns).bincount(minlength=columns).double()
        mean = 3000 / columns
        chi_square = float(((counts - mean) ** 2 / mean).sum())
        assert abs(chi_square - 63) < 5 * (2 * 63) ** 0.5


def test_signs_are_fair():
    signs = reference_signs((5, 6), torch.arange(16), 256).double()
    count = signs.numel()
    assert abs(signs.sum()) < 5 * count**0.5
    assert signs.sum(0).abs().max() < 5 * 2048**0.5
    assert signs.sum(1).abs().max() < 5 * 256**0.5
