"""The same matrices and features on a CUDA device as on the CPU."""

from dataclasses import replace

import pytest
import torch

from trak.projection import Gaussian, Identity, Kronecker, Rademacher, Sparse, pieces
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
