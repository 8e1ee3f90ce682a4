"""The Triton kernels against their readable references, run by Triton's interpreter on CPU tensors.

Triton decides on import whether to interpret. So in an ordinary run the one test here starts the others in a
process of their own.
"""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trak.projection.kernels.entries import NORMALS, SIGNS
from trak.projection.kernels.reference import add_by_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
inside = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter")

AHEAD = Path(__file__).parents[2] / "benchmarks" / "triton_ahead.py"
KEY = (0xDEADBEEF, 0xFEEDFACE)
FORMATS = [torch.float32, torch.bfloat16, torch.float16]
# Examples, entries, columns, and the row of the blocks at which the entries start. The last has two ranges of rows.
SHAPES = [(1, 5, 1, 3), (3, 200, 33, 100), (2, 60, 2048, 0), (17, 128 * 16 + 1, 40, 0)]
CASES = [(SIGNS, dtype, shape) for dtype in FORMATS for shape in SHAPES[:2]]
CASES += [(SIGNS, torch.float32, shape) for shape in SHAPES[2:]]
CASES += [(NORMALS, torch.float32, shape) for shape in SHAPES] + [(NORMALS, torch.float16, SHAPES[1])]


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.skipif(INTERPRETED, reason="Triton does not compile while it interprets")
def test_compiled_for_a_gpu(tmp_path):
    """Without one: signs come from tensor cores, each product is done once, sparse sums wait for memory, and no register is spilled."""
    _needs_a_compiler()
    out = tmp_path / "ahead.json"
    command = [sys.executable, str(AHEAD), "--capabilities", "9.0", "--batches", "16,64", "--out", str(out)]
    command += ["--kinds", "signs-float32,signs-bfloat16,sparse-float32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = json.loads(out.read_text())["cases"]
    assert len(cases) == 6
    for name, case in cases.items():
        if "sparse" in name:
            assert case["least_ps"]["issue"] < 0.5 * case["least_ps"]["memory"], name
        else:
            assert case["wgmma" if name.endswith(" 64") else "mma"] > 0, name
            assert case["products_done_over_needed"] == 1, name
        assert case["spill_stores"] == case["spill_loads"] == 0, name


def _needs_a_compiler():
    import triton
    from triton.runtime.jit import JITFunction

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    for tool in ("ptxas", "cuobjdump"):
        if not (tools / tool).exists():
            pytest.skip(f"this Triton comes without {tool}")
    if not (hasattr(triton, "knobs") and hasattr(JITFunction, "_pack_args")):
        pytest.skip(f"the benchmark that compiles needs a later Triton than {triton.__version__}")
    if not AHEAD.exists():
        pytest.skip("the benchmarks are not here")


def run(values_Bn, columns, skip, entries, start=1.0, *, blocks_c=None):
    """(what the kernel adds to `start`, what the reference adds in float64)."""
    from trak.projection.kernels.triton import add_by_triton

    if blocks_c is None:
        blocks_c = torch.arange(-(-(skip + values_Bn.shape[1]) // 128)) + (1 << 32) - 1
    options = {"skip": skip, "entries": entries, "key": KEY, "blocks_c": blocks_c, "scale": 0.5}
    out_BK = torch.full((len(values_Bn), columns), start)
    expected_BK = out_BK.double()
    add_by_triton(out_BK, values_Bn, **options)
    add_by_reference(expected_BK, values_Bn.double(), **options)
    return out_BK, expected_BK


@inside
@pytest.mark.parametrize(("entries", "dtype", "shape"), CASES, ids=str)
def test_the_kernel_is_the_reference(entries, dtype, shape):
    batch_size, count, columns, skip = shape
    out_BK, expected_BK = run(torch.randn(batch_size, count).to(dtype), columns, skip, entries)
    scale = expected_BK.abs().max()
    torch.testing.assert_close(out_BK.double() / scale, expected_BK / scale, rtol=0, atol=1e-6)


@inside
def test_signs_are_bit_for_bit_those_of_the_cpu():
    blocks_c = torch.tensor([0, 1 << 33])
    out_BK, expected_BK = run(torch.eye(256), 130, 0, SIGNS, 0.0, blocks_c=blocks_c)
    assert torch.equal(out_BK, 0.5 * SIGNS.reference(KEY, blocks_c, 130).float())
    assert torch.equal(out_BK.double(), expected_BK)


@inside
def test_normal_numbers_are_those_of_the_cpu():
    blocks_c = torch.tensor([5])
    out_BK, _ = run(torch.eye(128), 70, 0, NORMALS, 0.0, blocks_c=blocks_c)
    torch.testing.assert_close(
        2 * out_BK, NORMALS.reference(KEY, blocks_c, 70), rtol=2e-7, atol=1e-9, msg="another matrix"
    )


@inside
@pytest.mark.parametrize("value", [65504.0, 1e38, 3e-20])
def test_large_and_small_values(value):
    """Sums of float16 beyond its range do not overflow, and no bit of float32 is lost on the way."""
    values_Bn = torch.randn(2, 200).sign() * value
    dtype = torch.float16 if value == 65504.0 else torch.float32
    out_BK, expected_BK = run(values_Bn.to(dtype) / (1 if value < 1e30 else 100), 9, 3, SIGNS, 0.0)
    assert out_BK.isfinite().all()
    torch.testing.assert_close(
        out_BK.double(), expected_BK, rtol=1e-6, atol=1e-6 * float(expected_BK.abs().max())
    )


@inside
def test_every_bit_of_float32_counts():
    """One entry alone comes out as it went in: the three terms hold all 24 bits, where TF32 would round to 11."""
    values_Bn = torch.randn(50, 1) * 1.2345678
    out_BK, _ = run(values_Bn, 20, 7, SIGNS, 0.0)
    assert torch.equal(out_BK.abs(), (0.5 * values_Bn).abs().expand(50, 20))


@inside
def test_strides_and_repetition():
    values_Bn = torch.randn(300, 6).T[::2]
    assert not values_Bn.is_contiguous()
    out_BK, expected_BK = run(values_Bn, 20, 7, SIGNS)
    torch.testing.assert_close(out_BK.double(), expected_BK, rtol=1e-5, atol=1e-5)
    assert torch.equal(out_BK, run(values_Bn, 20, 7, SIGNS)[0])


@inside
def test_nothing_is_added_for_nothing():
    out_BK, _ = run(torch.randn(0, 5), 3, 0, SIGNS)
    assert out_BK.shape == (0, 3)


@inside
def test_ranges_fill_a_device_whatever_the_columns():
    from trak.projection.kernels.triton import MIN_BLOCKS, PROGRAMS, _range_blocks

    for columns, ranges in ((100, 256), (2048, 16), (4096, 8), (1 << 20, 1)):
        assert -(-(1 << 14) // _range_blocks(1 << 14, columns)) == ranges
        assert ranges * -(-columns // 128) <= max(PROGRAMS, columns // 128)
    assert _range_blocks(20, 100) == MIN_BLOCKS


@inside
def test_projections_through_the_kernel(monkeypatch):
    """The contract's blocks, as `add` hands them on where it would on CUDA: half precision as it is, tables by rows."""
    from trak.projection import Gaussian, Rademacher, pieces, tiles
    from trak.testing.projection import example_blocks, flat_gradients, full_matrix, project

    monkeypatch.setattr(tiles, "choose_kernel", lambda *args: "triton")
    monkeypatch.setattr(pieces, "multiplies_bfloat16", lambda device: False)
    monkeypatch.setattr(pieces, "SMALL_TABLE", 0)
    monkeypatch.setattr(pieces, "PIECE_ENTRIES", 70)
    cases = [(Rademacher(40), dtype) for dtype in FORMATS] + [(Rademacher(60, per_layer=True), torch.float32)]
    for projection, dtype in [*cases, (Gaussian(33), torch.float32)]:
        blocks = example_blocks(dtype=dtype)
        got = project(projection, blocks, dtype=torch.float32)
        expected = flat_gradients([_in_float64(block) for block in blocks]) @ full_matrix(projection)
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
    # Outer products of bfloat16 numbers are rounded to it where such products are fast.
    monkeypatch.setattr(pieces, "multiplies_bfloat16", lambda device: True)
    blocks = example_blocks(dtype=torch.bfloat16)
    expected = flat_gradients([_in_float64(block) for block in blocks]) @ full_matrix(Rademacher(40))
    rounded = project(Rademacher(40), blocks, dtype=torch.float32)
    assert 1e-5 < float((rounded - expected).norm() / expected.norm()) < 2**-7


SPARSE = [(40, 1, (11, 20)), (300, 3, (41, 50)), (3, 3, (9, 3)), (20, 1, (50, 20)), (600, 2, (20, 10))]


@inside
@pytest.mark.parametrize("dtype", [*FORMATS, torch.float64])
@pytest.mark.parametrize(("columns", "nonzeros", "shape"), SPARSE)
def test_gathered_entries_are_the_product(columns, nonzeros, shape, dtype, monkeypatch):
    """The sparse kernel, on pieces that begin and end anywhere in a block."""
    from trak.projection import Sparse
    from trak.projection.kernels import triton_slices

    projection, size = Sparse(columns, nonzeros=nonzeros), shape[0] * shape[1]
    state = projection.init({"w": shape})
    shifts = state.shifts["w"]
    values_Bn = torch.randn(5, size, dtype=torch.float64).to(dtype)
    expected = values_Bn.double() @ projection.matrix(state, "w").double()
    words, moves = shifts.packed_signs(0, -(-size // 128), "cpu").view(torch.int32), shifts.moves_sn.int()
    for min_blocks in (1, 1000):
        monkeypatch.setattr(triton_slices, "MIN_BLOCKS", min_blocks)
        outs = []
        for _ in range(2):
            out_BK = torch.ones(5, columns)
            for first, stop in ((0, 17), (17, 18), (18, size)):
                part = values_Bn[:, first:stop]
                triton_slices.add_by_gathering(out_BK, part, first, shifts, words, moves)
            outs.append(out_BK)
        torch.testing.assert_close(outs[0].double() - 1, expected, rtol=1e-4, atol=2e-5)
        assert torch.equal(*outs)


@inside
def test_gathered_signs_and_places_are_exact():
    from trak.projection import Sparse
    from trak.projection.kernels.triton_slices import add_by_gathering

    state = Sparse(50).init({"w": (300,)})
    shifts, out_BK = state.shifts["w"], torch.zeros(300, 50)
    words, moves = shifts.packed_signs(0, 3, "cpu").view(torch.int32), shifts.moves_sn.int()
    add_by_gathering(out_BK, torch.eye(300), 0, shifts, words, moves)
    assert torch.equal(out_BK, Sparse(50).matrix(state, "w"))


@inside
def test_a_piece_may_cross_two_billion_entries():
    """With K_t > L, where an end that wrapped around would count an entry of the next block."""
    from trak.projection.kernels.triton_slices import add_by_gathering
    from trak.projection.shifts import Shifts

    shifts = Shifts((1, 2), (3, 4), 1 << 32, 2001, 2)
    first, count = (1 << 31) - 3000, 6000
    # Zeros that nobody touches take no memory: all signs −1, no shift.
    words, moves = (
        torch.zeros(2, 1 << 27, dtype=torch.int32),
        torch.zeros(2, (1 << 32) // 1000 + 1, dtype=torch.int32),
    )
    out_BK = torch.zeros(1, 2001)
    add_by_gathering(out_BK, torch.ones(1, count), first, shifts, words, moves)
    torch.testing.assert_close(out_BK.sum().item(), -2 * count / 2**0.5, rtol=1e-5, atol=0)


@inside
def test_sparse_projections_through_the_kernel(monkeypatch):
    from trak.projection import Sparse, pieces, sparse_sums
    from trak.testing.projection import example_blocks, flat_gradients, full_matrix, project

    monkeypatch.setattr(sparse_sums, "choose_way", lambda device, dtype: "gathered")
    monkeypatch.setattr(pieces, "multiplies_bfloat16", lambda device: False)
    for small_table, piece_entries in ((1 << 18, 1 << 24), (0, 70)):
        monkeypatch.setattr(pieces, "SMALL_TABLE", small_table)
        monkeypatch.setattr(pieces, "PIECE_ENTRIES", piece_entries)
        for projection in (Sparse(40), Sparse(40, nonzeros=3), Sparse(60, nonzeros=2, per_layer=True)):
            blocks = example_blocks(dtype=torch.float32)
            expected = flat_gradients([_in_float64(block) for block in blocks]) @ full_matrix(projection)
            got = project(projection, blocks, dtype=torch.float32)
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


def _in_float64(block):
    floats = {k: v.double() for k, v in vars(block).items() if torch.is_tensor(v) and v.is_floating_point()}
    return replace(block, **floats)
