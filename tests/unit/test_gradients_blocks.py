"""Blocks as they come out of layers.

Dense() and contract() say the same, and fast paths their readable twins.
"""

import pytest
import torch
from torch import nn

from trak.blocks import ConvBlock, DenseBlock, IndexBlock, OuterBlock
from trak.gradients import Hooked, Reference, model_state
from trak.testing.cases import CASES
from trak.testing.gradients import collect
from trak.testing.models import FoldedFrames, Readout

HOOKED = [case for case in CASES if case.hooked]
CONVOLUTIONS = [case for case in HOOKED if "conv" in case.name or "frames" in case.name]


def blocks_of(model, batch, names=None):
    blocks = []
    names = names or [name for name, _ in model.named_parameters()]
    Hooked().compute(model, model_state(model, None, "cpu"), Readout(), batch, names, blocks.append)
    return blocks


@pytest.mark.parametrize("case", HOOKED, ids=lambda case: case.name)
def test_contract_is_rows_dense_columns(case):
    model, batch = case.build()
    for block in blocks_of(model, batch):
        rows, columns = block.matrix_shape
        rows_RA, columns_CD = (
            torch.randn(rows, 3, dtype=torch.float64),
            torch.randn(columns, 2, dtype=torch.float64),
        )
        dense_BRC = block.dense().reshape(block.batch_size, rows, columns)
        wanted = torch.einsum("ra,brc,cd->bad", rows_RA, dense_BRC, columns_CD)
        torch.testing.assert_close(block.contract(rows_RA, columns_CD), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=lambda case: case.name)
def test_convolution_by_groups_is_convolution_by_patches(case):
    model, batch = case.build()
    (block,) = (block for block in blocks_of(model, batch) if isinstance(block, ConvBlock))
    patches = block.by_patches().reshape(block.examples, -1, *block.shape).sum(1)
    torch.testing.assert_close(block.dense(), patches, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(block.by_positions().dense(), patches, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("layer", "shape", "kind"),
    [
        (lambda: nn.Linear(4, 3), (4,), OuterBlock),
        (lambda: nn.Linear(4, 3), (5, 4), OuterBlock),
        (lambda: nn.Conv2d(3, 4, 3), (3, 5, 5), ConvBlock),
        (lambda: nn.LayerNorm(4), (4,), DenseBlock),
    ],
)
def test_weight_gradients_stay_factored(layer, shape, kind):
    (block,) = blocks_of(layer().double(), (torch.randn(2, *shape, dtype=torch.float64),), ["weight"])
    assert type(block) is kind
    assert block.batch_size == 2


def test_embedding_gradients_are_indices_and_values():
    (block,) = blocks_of(nn.Embedding(7, 4), (torch.tensor([[1, 2], [3, 3]]),))
    assert isinstance(block, IndexBlock)
    assert block.indices.tolist() == [[1, 2], [3, 3]]


def test_padding_row_has_no_gradient():
    _, found = collect(Hooked(), nn.Embedding(5, 3, padding_idx=1), (torch.tensor([[1, 2], [1, 1]]),))
    assert found["weight"][:, 1].count_nonzero() == 0
    assert found["weight"][1].count_nonzero() == 0
    assert found["weight"][0, 2].count_nonzero() == 3


def test_images_of_one_example_are_summed():
    model = FoldedFrames().double()
    batch = (torch.randn(3, 2, 2, 5, 5, dtype=torch.float64),)
    (block,) = (block for block in blocks_of(model, batch) if isinstance(block, ConvBlock))
    assert block.inputs.shape[0] == 6
    assert block.dense().shape == (3, *model.conv.weight.shape)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kernel", [2, 4])
def test_same_padding_with_one_more_on_the_right(kernel):
    model = nn.Conv1d(2, 3, kernel, padding="same").double()
    batch = (torch.randn(3, 2, 7, dtype=torch.float64),)
    _, got = collect(Hooked(), model, batch)
    _, wanted = collect(Reference(), model, batch)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_blocks_come_as_the_backward_pass_reaches_the_layers():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    names = [block.name for block in blocks_of(model, (torch.randn(2, 3),))]
    assert names == ["4.weight", "4.bias", "2.weight", "2.bias", "0.weight", "0.bias"]


def test_a_layer_that_is_not_called_gives_no_block():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle, self.blind = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            with torch.no_grad():
                shift = self.blind(x)
            return self.used(x) + shift

    assert {block.name for block in blocks_of(Idle(), (torch.randn(2, 3),))} == {"used.weight", "used.bias"}
