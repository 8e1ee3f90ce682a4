"""The same matrices and features on a CUDA device as on the CPU."""

from dataclasses import replace

import pytest
import torch

from trak.blocks import DenseBlock, IndexBlock
from trak.projection import Gaussian, Identity, Kronecker, Rademacher, Sparse, pieces, sparse_sums, tiles
from trak.projection.kernels.entries import NORMALS, SIGNS
from trak.projection.kernels.reference import add_by_reference
from trak.testing.projection import SHAPES, example_blocks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

KINDS = [
    Rademacher(200),
    Gaussian(130),
    Sparse(200, nonzeros=3),
    Rademacher(60, per_layer=True),
    Kronecker(40, sketches=2),
    Identity(),
]


@pytest.mark.parametrize("projection", KINDS, ids=repr)
def test_same_matrix(projection):
    on_cpu = projection.init(SHAPES, checkpoint=2)
    on_gpu = projection.init(SHAPES, checkpoint=2, device="cuda")
    for name in SHAPES:
        expected, got = projection.matrix(on_cpu, name), projection.matrix(on_gpu, name).cpu()
        # Logarithm and cosine may round differently, which float32 nearly always hides.
        torch.testing.assert_close(
            got, expected, rtol=2e-7 if isinstance(projection, Gaussian) else 0, atol=0
        )


@pytest.mark.parametrize("small_table", [0, 1 << 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("projection", KINDS, ids=repr)
def test_same_features(projection, dtype, small_table, monkeypatch):
    monkeypatch.setattr(pieces, "SMALL_TABLE", small_table)
    on_cpu = projection.init(SHAPES, dtype=dtype)
    on_gpu = projection.init(SHAPES, device="cuda", dtype=dtype)
    expected, got = on_cpu.zeros(3), on_gpu.zeros(3)
    for block in example_blocks(dtype=dtype):
        projection.add(on_cpu, block, expected)
        tensors = {field: value.cuda() for field, value in vars(block).items() if torch.is_tensor(value)}
        projection.add(on_gpu, replace(block, **tensors), got)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(got.cpu(), expected, rtol=tolerance, atol=tolerance)


KEY = (0xDEADBEEF, 0xFEEDFACE)
# Examples, entries, columns, and the row of the blocks at which the entries start.
# The large ones take minutes in Triton's interpreter.
SHAPES_OF_PRODUCTS = [
    (1, 1, 1, 0),
    (3, 300, 33, 100),
    pytest.param((40, 5000, 200, 7), marks=pytest.mark.slow),
    pytest.param((64, 128 * 200, 2048, 0), marks=pytest.mark.slow),
    pytest.param((200, 3001, 4096, 5), marks=pytest.mark.slow),
]


def run_kernel(values_Bn, columns, skip, entries):
    """(what the Triton kernel adds to zeros, what the reference gives in float64 on a CPU)."""
    from trak.projection.kernels.triton import add_by_triton

    blocks_c = torch.arange(-(-(skip + values_Bn.shape[1]) // 128)) + (1 << 32) - 1
    options = {"skip": skip, "entries": entries, "key": KEY, "scale": 0.5}
    out_BK = torch.zeros(len(values_Bn), columns, device="cuda")
    expected_BK = torch.zeros(len(values_Bn), columns, dtype=torch.float64)
    add_by_triton(out_BK, values_Bn.cuda(), blocks_c=blocks_c.cuda(), **options)
    add_by_reference(expected_BK, values_Bn.double(), blocks_c=blocks_c, **options)
    return out_BK.cpu(), expected_BK


@pytest.mark.parametrize("shape", SHAPES_OF_PRODUCTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("entries", [SIGNS, NORMALS])
def test_triton_is_the_reference(entries, dtype, shape):
    pytest.importorskip("triton")
    batch_size, count, columns, skip = shape
    values_Bn = (torch.randn(batch_size, count) * (1e4 if dtype == torch.float16 else 1)).to(dtype)
    out_BK, expected_BK = run_kernel(values_Bn, columns, skip, entries)
    size = expected_BK.abs().max()
    torch.testing.assert_close(out_BK.double() / size, expected_BK / size, rtol=0, atol=3e-6)
    assert torch.equal(out_BK, run_kernel(values_Bn, columns, skip, entries)[0]), "another run, other bits"


def test_triton_draws_the_signs_of_the_cpu():
    """Every bit of float32 gradients is multiplied by exactly the sign of the CPU."""
    pytest.importorskip("triton")
    values_Bn = torch.diag(torch.randn(256))
    out_BK, expected_BK = run_kernel(values_Bn, 300, 0, SIGNS)
    assert torch.equal(out_BK.double(), expected_BK)


@pytest.mark.slow
@pytest.mark.parametrize("projection", [Rademacher(2048), Sparse(2048, nonzeros=2)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_two_runs_give_the_same_bits(projection, dtype):
    dense = DenseBlock("w", (700, 300), torch.randn(16, 700, 300, device="cuda").to(dtype))
    indices = torch.randint(0, 5000, (16, 400), device="cuda")
    values = torch.randn(16, 400, 64, device="cuda").to(dtype)
    large, small = (
        IndexBlock("t", (5000, 64), indices, values),
        IndexBlock("s", (50, 64), indices % 50, values),
    )
    results = []
    for _ in range(3):
        state = projection.init({"w": (700, 300), "t": (5000, 64), "s": (50, 64)}, device="cuda")
        out = state.zeros(16)
        for block in (dense, large, small):
            projection.add(state, block, out)
        results.append(out)
    assert all(torch.equal(out, results[0]) for out in results)


@pytest.mark.slow
@pytest.mark.parametrize("projection", [Sparse(2048), Sparse(2001, nonzeros=2), Sparse(50)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_parameters_are_gathered_as_on_the_cpu(projection, dtype):
    """Many blocks in several ranges; the last example tile is short."""
    values = torch.randn(19, 700, 300).to(dtype)
    on_cpu, on_gpu = (projection.init({"w": (700, 300)}, device=device) for device in ("cpu", "cuda"))
    expected, got = on_cpu.zeros(19), on_gpu.zeros(19)
    projection.add(on_cpu, DenseBlock("w", (700, 300), values), expected)
    projection.add(on_gpu, DenseBlock("w", (700, 300), values.cuda()), got)
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("width", [8, 20, 128, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("projection", [Rademacher(40), Gaussian(30), Sparse(40, nonzeros=3)], ids=repr)
def test_large_tables_in_pieces(projection, dtype, width, monkeypatch):
    """Tokens that repeat, in one example and in several, and pieces that hold some of the rows."""
    monkeypatch.setattr(pieces, "SMALL_TABLE", 0)
    for module in (pieces, sparse_sums):
        monkeypatch.setattr(module, "PIECE_ENTRIES", 4 * 128 * 3 * (1 if module is pieces else 24))
    indices = torch.randint(0, 30, (4, 25)) ** 2
    values = torch.randn(4, 25, width, dtype=dtype)
    outs = []
    for device in ("cpu", "cuda"):
        state = projection.init({"t": (900, width)}, device=device, dtype=dtype)
        out = state.zeros(4)
        projection.add(state, IndexBlock("t", (900, width), indices.to(device), values.to(device)), out)
        outs.append(out.cpu())
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(outs[1], outs[0], rtol=tolerance, atol=tolerance)


def test_fused_and_unpacked_agree(monkeypatch):
    pytest.importorskip("triton")
    projection = Rademacher(1000)
    state = projection.init(SHAPES, device="cuda")
    outs = []
    for kernel in ("triton", "matmul"):
        monkeypatch.setattr(tiles, "choose_kernel", lambda *args, kernel=kernel: kernel)
        out = state.zeros(3)
        for block in example_blocks(dtype=torch.float32):
            tensors = {field: value.cuda() for field, value in vars(block).items() if torch.is_tensor(value)}
            projection.add(state, replace(block, **tensors), out)
        outs.append(out)
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)
