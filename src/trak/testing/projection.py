"""What every projection must keep: checks that raise AssertionError, for the built-in kinds and for your own.

    import pytest
    from trak.testing.projection import CHECKS

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    @pytest.mark.parametrize("projection", [MyProjection(dim=64)], ids=repr)
    def test_contract(projection, check):
        check(projection)

The projection has to accept `SHAPES`, of six parameters in four layers, 132 numbers in all.

Legend: B examples, P gradient entries, K features.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from trak.blocks import Block, ConvBlock, DenseBlock, IndexBlock, OuterBlock
from trak.errors import ProjectionError
from trak.hardware import multiplies_bfloat16
from trak.projection import Projection

SHAPES: Mapping[str, tuple[int, ...]] = {
    "embed.weight": (11, 4),
    "conv.weight": (6, 2, 3),
    "conv.bias": (6,),
    "fc.weight": (5, 8),
    "fc.bias": (5,),
    "scale": (),
}


def example_blocks(batch_size: int = 3, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Block]:
    """Gradients of `SHAPES` in every form, several blocks for some parameters."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch_size, *shape, generator=generator, dtype=torch.float64).to(dtype)

    indices = torch.randint(0, 11, (batch_size, 5), generator=generator)
    convolution = {"stride": (1,), "padding": (1,), "dilation": (1,), "groups": 1, "examples": batch_size}
    return [
        OuterBlock("fc.weight", (5, 8), draw(1, 3, 5), draw(1, 3, 8)),
        DenseBlock("fc.bias", (5,), draw(5)),
        ConvBlock("conv.weight", (6, 2, 3), draw(2, 7), draw(6, 7), **convolution),  # type: ignore[arg-type]
        DenseBlock("conv.bias", (6,), draw(6)),
        OuterBlock("conv.weight", (6, 2, 3), draw(2, 4, 3), draw(2, 4, 6)),
        DenseBlock("scale", (), draw()),
        IndexBlock("embed.weight", (11, 4), indices, draw(5, 4)),
        DenseBlock("fc.weight", (5, 8), draw(5, 8)),
    ]


def flat_gradients(blocks: Sequence[Block], shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> Tensor:
    """The blocks summed up, parameters side by side in the order of `shapes`: [B, P]."""
    batch_size = blocks[0].batch_size
    parts = {name: blocks[0].dense().new_zeros(batch_size, prod(shape)) for name, shape in shapes.items()}
    for block in blocks:
        parts[block.name] += block.dense().reshape(batch_size, -1)
    return torch.cat(list(parts.values()), dim=1)


def full_matrix(projection: Projection, *, checkpoint: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """The matrices of all parameters of `SHAPES`, one below the other: [P, K]."""
    state = projection.init(SHAPES, checkpoint=checkpoint, dtype=dtype)
    return torch.cat([projection.matrix(state, name) for name in SHAPES])


def project(projection: Projection, blocks: Sequence[Block], dtype: torch.dtype = torch.float64) -> Tensor:
    """The features of these blocks, [B, K]."""
    state = projection.init(SHAPES, dtype=dtype)
    out_BK = state.zeros(blocks[0].batch_size)
    for block in blocks:
        projection.add(state, block, out_BK)
    return out_BK


def check_add_is_matrix(projection: Projection) -> None:
    """add() is multiplication by matrix(), in float64, for every block alone and for all together."""
    matrix_PK = full_matrix(projection)
    blocks = example_blocks()
    for chosen in [*([block] for block in blocks), blocks, blocks[::-1]]:
        torch.testing.assert_close(
            project(projection, chosen), flat_gradients(chosen) @ matrix_PK, rtol=1e-12, atol=1e-12
        )


def check_linear(projection: Projection) -> None:
    """add() adds to what is there, and is linear in the gradient."""
    state = projection.init(SHAPES, dtype=torch.float64)
    first, second = example_blocks(seed=0), example_blocks(seed=1)
    sums = [
        DenseBlock(one.name, one.shape, 2.0 * one.dense() - 3.0 * two.dense())
        for one, two in zip(first, second)
    ]
    expected = 2.0 * project(projection, first) - 3.0 * project(projection, second)
    out_BK = torch.ones_like(expected)
    for block in sums:
        projection.add(state, block, out_BK)
    torch.testing.assert_close(out_BK, expected + 1.0, rtol=1e-12, atol=1e-12)


def check_batches(projection: Projection) -> None:
    """An example's features do not depend on its batch."""
    whole_BK = project(projection, example_blocks(batch_size=5))
    gradients = example_blocks(batch_size=5)
    for row in range(5):
        alone = [DenseBlock(block.name, block.shape, block.dense()[row : row + 1]) for block in gradients]
        torch.testing.assert_close(project(projection, alone)[0], whole_BK[row], rtol=1e-12, atol=1e-12)


def check_columns(projection: Projection) -> None:
    """columns() cuts [0, K) without gaps, and a parameter writes only to its layer's columns."""
    columns = projection.columns(SHAPES)
    state = projection.init(SHAPES, dtype=torch.float64)
    assert columns[0].start == 0
    assert columns[-1].stop == state.dim == projection.output_dim(SHAPES)
    assert all(one.stop == two.start for one, two in pairwise(columns))
    assert all(column.start < column.stop for column in columns)
    assert len({column.name for column in columns}) == len(columns)
    if len(columns) == 1:
        return
    by_name = {column.name: column for column in columns}
    for name, shape in SHAPES.items():
        matrix_PK = projection.matrix(state, name)
        assert matrix_PK.shape == (prod(shape), state.dim)
        layer = by_name[name.rpartition(".")[0] or "(root)"]
        assert (matrix_PK[:, : layer.start] == 0).all()
        assert (matrix_PK[:, layer.stop :] == 0).all()
        assert (matrix_PK[:, layer.start : layer.stop] != 0).any()


def check_reproducible(projection: Projection) -> None:
    """Drawing again gives the same bits, another checkpoint others, unless the map is exact (P Pᵀ = I)."""
    matrix_PK = full_matrix(projection)
    assert torch.equal(matrix_PK, full_matrix(projection))
    if torch.equal(matrix_PK, full_matrix(projection, checkpoint=1)):
        torch.testing.assert_close(matrix_PK @ matrix_PK.T, torch.eye(len(matrix_PK), dtype=torch.float64))
    single = full_matrix(projection, dtype=torch.float32)
    torch.testing.assert_close(single.double(), matrix_PK, rtol=1e-6, atol=0)


def check_unbiased(projection: Projection, draws: int = 100) -> None:
    """E[P Pᵀ] = I: mean inner products of many checkpoints are within 5 standard errors of the true ones."""
    gradients_BP = flat_gradients(example_blocks(batch_size=3))
    gradients_BP = gradients_BP / gradients_BP.norm(dim=1, keepdim=True)
    gradients_BP[2] = (gradients_BP[0] + gradients_BP[2]) / 2**0.5
    features = [gradients_BP @ full_matrix(projection, checkpoint=draw) for draw in range(draws)]
    estimates = torch.stack([feature_BK @ feature_BK.T for feature_BK in features])
    error = (estimates.mean(0) - gradients_BP @ gradients_BP.T).abs()
    standard_error = estimates.std(0) / draws**0.5
    assert (error <= 5 * standard_error + 1e-10).all(), (
        f"off by {(error / standard_error).max():.1f} standard errors"
    )


def check_half_precision(projection: Projection) -> None:
    """Half-precision gradients are raised before anything is summed; but products in bfloat16 are rounded once or twice where those are fast."""
    for dtype in (torch.bfloat16, torch.float16):
        rounded = dtype == torch.bfloat16 and multiplies_bfloat16(torch.device("cpu"))
        blocks = example_blocks(dtype=dtype)
        exact = flat_gradients([_in_float64(block) for block in blocks]) @ full_matrix(projection)
        got = project(projection, blocks, dtype=torch.float32)
        assert got.dtype == torch.float32
        if rounded:
            assert float((got - exact).norm() / exact.norm()) < 2**-7
        else:
            torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-4)


def check_configuration(projection: Projection) -> None:
    """Equality and hash go by configuration; the fingerprint is JSON and names kind and version."""
    twin = replace(projection)  # type: ignore[type-var]
    assert twin == projection
    assert hash(twin) == hash(projection)
    assert repr(twin) == repr(projection)
    fingerprint = projection.fingerprint()
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    assert fingerprint["kind"] == projection.kind
    assert fingerprint["version"] == projection.version
    before = projection.fingerprint()
    project(projection, example_blocks())
    assert projection.fingerprint() == before


def check_refusals(projection: Projection) -> None:
    """Unknown parameters, wrong shapes and wrong accumulators raise ProjectionError and add nothing."""
    state = projection.init(SHAPES, dtype=torch.float64)
    values = torch.ones(2, 5, dtype=torch.float64)
    good = DenseBlock("fc.bias", (5,), values)
    calls: list[tuple[Block, Tensor]] = [
        (DenseBlock("nowhere.bias", (5,), values), state.zeros(2)),
        (DenseBlock("fc.bias", (1, 5), values[:, None]), state.zeros(2)),
        (DenseBlock("fc.bias", (5,), values[:, :1]), state.zeros(2)),
        (good, state.zeros(3)),
        (good, state.zeros(2)[:, :-1]),
        (good, state.zeros(2).float()),
        (good, state.zeros(2).to("meta")),
    ]
    for block, out_BK in calls:
        _refuses(lambda block=block, out_BK=out_BK: projection.add(state, block, out_BK))  # type: ignore[misc]
        assert out_BK.is_meta or (out_BK == 0).all()
    _refuses(lambda: projection.matrix(state, "nowhere.bias"))
    _refuses(lambda: projection.init({}))
    _refuses(lambda: projection.init(SHAPES, dtype=torch.float16))


CHECKS: tuple[Callable[[Projection], None], ...] = (
    check_add_is_matrix,
    check_linear,
    check_batches,
    check_columns,
    check_reproducible,
    check_unbiased,
    check_half_precision,
    check_configuration,
    check_refusals,
)
"""All of the above."""


def _in_float64(block: Block) -> Block:
    tensors = {field: value for field, value in vars(block).items() if isinstance(value, Tensor)}
    floats = {field: value.double() for field, value in tensors.items() if value.is_floating_point()}
    return replace(block, **floats)  # type: ignore[arg-type]


def _refuses(call: Callable[[], object]) -> None:
    try:
        call()
    except ProjectionError:
        return
    raise AssertionError("expected a ProjectionError, and none was raised")
