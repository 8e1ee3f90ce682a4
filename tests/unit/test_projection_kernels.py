"""Kernels for dense matrices against their readable reference, and which of them runs."""

import logging
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trak.blocks import DenseBlock, IndexBlock
from trak.projection import Gaussian, Rademacher, pieces, tiles
from trak.projection.kernels import digits, dispatch
from trak.projection.kernels.digits import add_by_digits
from trak.projection.kernels.dispatch import choose_kernel, has_triton
from trak.projection.kernels.entries import NORMALS, SIGNS, Part
from trak.projection.kernels.matmul import add_by_matmul
from trak.projection.kernels.reference import add_by_reference
from trak.projection.kernels.tables import SLICE_EXAMPLES, add_by_tables, signed_sums
from trak.testing.projection import check_half_precision, example_blocks, flat_gradients, full_matrix, project

KEY = (0xDEADBEEF, 0xFEEDFACE)
# Examples, entries, columns, and the row of the blocks at which the entries start.
SHAPES = [
    (1, 1, 1, 0),
    (3, 5, 33, 127),
    (2, 300, 33, 13),
    (SLICE_EXAMPLES + 3, 259, 200, 8),
    (4, 130, 2048, 61),
]
BY_SIGNS = {"digits": add_by_digits, "tables": add_by_tables}


def reference(values_Bn, columns, skip, entries, scale, start=0.0):
    blocks_c = torch.arange(-(-(skip + values_Bn.shape[1]) // 128)) + (1 << 32) - 1
    expected_BK = torch.full((len(values_Bn), columns), start, dtype=torch.float64)
    add_by_reference(
        expected_BK, values_Bn, skip=skip, entries=entries, key=KEY, blocks_c=blocks_c, scale=scale
    )
    return blocks_c, expected_BK


def test_the_reference_by_loops():
    values_Bn = torch.randn(2, 5, dtype=torch.float64)
    for entries in (SIGNS, NORMALS):
        blocks_c, got_BK = reference(values_Bn, 3, 126, entries, 0.5, start=1.0)
        matrix = entries.reference(KEY, blocks_c, 3).double()
        for example in range(2):
            for column in range(3):
                total = sum(float(values_Bn[example, i] * matrix[126 + i, column]) for i in range(5))
                assert got_BK[example, column] == pytest.approx(1 + 0.5 * total)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("entries", [SIGNS, NORMALS])
@pytest.mark.parametrize("kernel", ["digits", "tables", "matmul", "matmul64"])
def test_kernels_are_the_reference(kernel, entries, shape):
    batch_size, count, columns, skip = shape
    dtype = torch.float64 if kernel == "matmul64" else torch.float32
    if kernel in BY_SIGNS and entries is NORMALS:
        pytest.skip("only signs have tables, and are bytes")
    values_Bn = torch.randn(batch_size, count, dtype=dtype)
    blocks_c, expected_BK = reference(values_Bn, columns, skip, entries, 0.5, start=1.0)
    # Two parts that meet in the middle of a byte.
    cut = count // 2
    kept = entries.draw(KEY, blocks_c, columns, dtype)
    parts = [Part(values_Bn[:, :cut], skip, kept), Part(values_Bn[:, cut:], skip + cut, kept)]
    parts = [part for part in parts if part.values_Bn.shape[1]]
    out_BK = torch.ones(batch_size, columns, dtype=dtype)
    if kernel in BY_SIGNS:
        BY_SIGNS[kernel](out_BK, iter(parts), 0.5)
    else:
        add_by_matmul(out_BK, iter(parts), entries, 0.5)
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    scale = expected_BK.abs().max()
    torch.testing.assert_close(out_BK.double() / scale, expected_BK / scale, rtol=0, atol=tolerance)


def test_tables_hold_signed_sums():
    values = torch.randn(3, 11, dtype=torch.float64)
    table = signed_sums(values, 2, 2, torch.empty(2000, dtype=torch.float64)).view(256, 2, 3)
    padded = torch.zeros(3, 16, dtype=torch.float64)
    padded[:, 2:13] = values
    for byte in (0, 1, 0b10010110, 255):
        signs = torch.tensor([1.0 if byte >> bit & 1 else -1.0 for bit in range(8)], dtype=torch.float64)
        for place in (0, 1):
            expected = padded[:, 8 * place : 8 * place + 8] @ signs
            torch.testing.assert_close(table[byte, place], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kernel", BY_SIGNS)
def test_sums_of_signs_are_as_exact_as_a_product(kernel):
    """Gradients of sizes 1e-6 to 1e6 in one row: errors below those of a float32 product, with its own scale."""
    values_Bn = torch.randn(4, 5000) * torch.logspace(-6, 6, 5000)
    blocks_c, expected_BK = reference(values_Bn, 1024, 0, SIGNS, 1.0)
    kept = SIGNS.draw(KEY, blocks_c, 1024, torch.float32)
    errors = []
    for add in (
        lambda out: BY_SIGNS[kernel](out, iter([Part(values_Bn, 0, kept)]), 1.0),
        lambda out: add_by_matmul(out, iter([Part(values_Bn, 0, kept)]), SIGNS, 1.0),
    ):
        out_BK = torch.zeros(4, 1024)
        add(out_BK)
        errors.append(float((out_BK - expected_BK).abs().max() / expected_BK.abs().max()))
    assert errors[0] < max(2e-6, 2 * errors[1])


@pytest.mark.parametrize("kernel", BY_SIGNS)
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_stays_so(value, kernel):
    values_Bn = torch.ones(2, 40)
    values_Bn[1, 3] = value
    out_BK = torch.zeros(2, 1024)
    BY_SIGNS[kernel](
        out_BK, iter([Part(values_Bn, 0, SIGNS.draw(KEY, torch.arange(1), 1024, torch.float32))]), 1.0
    )
    assert out_BK[0].isfinite().all()
    assert not out_BK[1].isfinite().any()


@pytest.mark.parametrize("columns", [511, 512, 1023, 1024, 2048])
def test_features_on_both_sides_of_the_rule(columns):
    """The kernel that `add` takes at this K, in float32, gives the features of float64."""
    projection = Rademacher(columns)
    blocks = example_blocks(dtype=torch.float32)
    got = project(projection, blocks, dtype=torch.float32)
    expected = flat_gradients(blocks).double() @ full_matrix(projection)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    check_half_precision(projection)


@pytest.mark.parametrize("kind", [Rademacher, Gaussian])
@pytest.mark.parametrize("width", [5, 128, 200])
def test_tables_of_rows_that_share_blocks(kind, width, monkeypatch):
    """Rows of an embedding whose entries lie in the same block of 128 rows, in several tiles."""
    monkeypatch.setattr(pieces, "SMALL_TABLE", 0)
    monkeypatch.setattr(tiles, "tile_rows", lambda columns: 128)
    indices = torch.tensor([[0, 1, 30, 1], [29, 0, 7, 7]])
    block = IndexBlock("w", (31, width), indices, torch.randn(2, 4, width))
    projection = kind(1030)
    state = projection.init({"w": (31, width)})
    out = state.zeros(2)
    projection.add(state, block, out)
    expected = block.dense().flatten(1) @ projection.matrix(state, "w")
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_digits_of_several_groups(monkeypatch):
    """Parts gathered into groups and longer than one, slices of columns and of examples."""
    monkeypatch.setattr(digits, "GROUP_ROWS", 64)
    monkeypatch.setattr(digits, "SLICE_COLUMNS", 16)
    monkeypatch.setattr(digits, "SLICE_EXAMPLES", 2)
    values_Bn = torch.randn(5, 300) * torch.tensor([1e-3, 1, 1e3]).repeat_interleave(100)
    blocks_c, expected_BK = reference(values_Bn, 40, 13, SIGNS, 1.0)
    kept = SIGNS.draw(KEY, blocks_c, 40, torch.float32)
    cuts = [0, 3, 11, 19, 60, 230, 300]
    parts = [Part(values_Bn[:, low:high], 13 + low, kept) for low, high in pairwise(cuts)]
    groups = list(digits._groups(parts))
    assert sum(span.values_Bn.shape[1] for group in groups for span in group) == 300
    assert all(sum(8 * span.packed_KW.shape[1] for span in group) <= 64 for group in groups)
    out_BK = torch.zeros(5, 40)
    add_by_digits(out_BK, iter(parts), 1.0)
    torch.testing.assert_close(out_BK.double(), expected_BK, rtol=1e-5, atol=1e-2)


def test_digits_of_gradients_in_bfloat16(monkeypatch):
    """Two digits, far below the rounding that such gradients have; as they are handed on by `add`, and beside float32 ones."""
    values_Bn = torch.randn(5, 3000).bfloat16()
    blocks_c, expected_BK = reference(values_Bn.double(), 600, 0, SIGNS, 1.0)
    kept = SIGNS.draw(KEY, blocks_c, 600, torch.float32)
    mixed = [Part(values_Bn[:, :1000], 0, kept), Part(values_Bn[:, 1000:].float(), 1000, kept)]
    for parts, limit in (([Part(values_Bn, 0, kept)], 1e-4), (mixed, 1e-6)):
        out_BK = torch.zeros(5, 600)
        add_by_digits(out_BK, iter(parts), 1.0)
        assert float((out_BK - expected_BK).norm() / expected_BK.norm()) < limit
    monkeypatch.setattr(tiles, "choose_kernel", lambda *args: "digits")
    state = Rademacher(600).init({"w": (3000,)})
    out_BK = state.zeros(5)
    Rademacher(600).add(state, DenseBlock("w", (3000,), values_Bn), out_BK)
    exact_BK = values_Bn.double() @ Rademacher(600).matrix(state, "w").double()
    assert 1e-7 < float((out_BK - exact_BK).norm() / exact_BK.norm()) < 1e-4


def test_digits_do_not_depend_on_the_batch():
    """Sums of whole numbers: the same bits for an example alone and among others."""
    values_Bn = torch.randn(70, 5000)
    kept = SIGNS.draw(KEY, torch.arange(40), 600, torch.float32)
    whole_BK = torch.zeros(70, 600)
    add_by_digits(whole_BK, iter([Part(values_Bn, 0, kept)]), 1.0)
    for start, stop in ((0, 1), (1, 8), (8, 70)):
        part_bK = torch.zeros(stop - start, 600)
        add_by_digits(part_bK, iter([Part(values_Bn[start:stop], 0, kept)]), 1.0)
        assert torch.equal(part_bK, whole_BK[start:stop])


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e36])
def test_digits_of_very_small_and_very_large_gradients(size):
    """Digits of gradients of one size, the largest of each example exactly at the end of the scale."""
    values_Bn = size * torch.randn(3, 200).clamp(-1, 1)
    blocks_c, expected_BK = reference(values_Bn, 16, 0, SIGNS, 1e-2)
    out_BK = torch.zeros(3, 16)
    add_by_digits(out_BK, iter([Part(values_Bn, 0, SIGNS.draw(KEY, blocks_c, 16, torch.float32))]), 1e-2)
    torch.testing.assert_close(out_BK.double(), expected_BK, rtol=2e-6, atol=3e-6 * size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(deadline=None, max_examples=50)
@given(numbers=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40))
def test_digits_add_up_to_the_gradients(numbers, dtype):
    """The unit times (65536 d2 + 256 d1 + d0) is within half a unit (and a rounding) of every gradient."""
    values_Bn = torch.tensor([numbers])
    values_Bn = values_Bn.to(dtype)
    digits_DBn, unit_B = digits._cut([digits._Span(values_Bn, 0, torch.zeros(1, 5, dtype=torch.uint8))])
    places = [1.0, 256.0, 65536.0][: len(digits_DBn)]
    whole_Bn = (digits_DBn.double() * torch.tensor(places)[:, None, None]).sum(0)
    error_Bn = whole_Bn[:, : len(numbers)] * unit_B.double() - values_Bn.double()
    assert len(places) == (2 if dtype == torch.bfloat16 else 3)
    assert (error_Bn.abs() <= 1.1 * unit_B.double()).all()
    assert not whole_Bn[:, len(numbers) :].any()


def test_batches_agree():
    projection = Rademacher(1024)
    values = torch.randn(70, 900)
    state = projection.init({"w": (900,)})
    whole = state.zeros(70)
    projection.add(state, DenseBlock("w", (900,), values), whole)
    for start, stop in ((0, 1), (1, 8), (8, 70)):
        part = state.zeros(stop - start)
        projection.add(state, DenseBlock("w", (900,), values[start:stop]), part)
        torch.testing.assert_close(part, whole[start:stop], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kernel", BY_SIGNS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_sums_are_in_float32_whatever_the_default(dtype, kernel):
    values_Bn = torch.randn(4, 3000)
    part = Part(values_Bn, 0, SIGNS.draw(KEY, torch.arange(-(-3000 // 32)), 1024, torch.float32))
    plain_BK, other_BK = torch.zeros(4, 1024), torch.zeros(4, 1024)
    BY_SIGNS[kernel](plain_BK, iter([part]), 1.0)
    torch.set_default_dtype(dtype)
    try:
        BY_SIGNS[kernel](other_BK, iter([part]), 1.0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(plain_BK, other_BK)


def test_dispatch(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    monkeypatch.setattr(dispatch, "multiplies_bytes", lambda: True)
    assert choose_kernel(cpu, torch.float32, SIGNS, 512) == "digits"
    assert choose_kernel(cpu, torch.float32, SIGNS, 511) == "matmul"
    monkeypatch.setattr(dispatch, "multiplies_bytes", lambda: False)
    assert choose_kernel(cpu, torch.float32, SIGNS, 2048) == "tables"
    assert choose_kernel(cpu, torch.float32, SIGNS, 100) == "matmul"
    assert choose_kernel(cpu, torch.float32, NORMALS, 2048) == "matmul"
    assert choose_kernel(cpu, torch.float64, SIGNS, 2048) == "matmul"
    assert choose_kernel(cuda, torch.float32, NORMALS, 1) == "triton"
    assert choose_kernel(cuda, torch.float64, SIGNS, 2048) == "matmul"
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    assert choose_kernel(cuda, torch.float32, SIGNS, 2048) == "matmul"


def test_a_missing_triton_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    has_triton.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="trak"):
            assert not has_triton()
            assert not has_triton()
        assert [record.message for record in caplog.records] == [caplog.records[0].message]
        assert "fall back to unpacked tiles" in caplog.records[0].message
    finally:
        has_triton.cache_clear()
