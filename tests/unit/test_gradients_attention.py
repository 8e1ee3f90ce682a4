"""nn.MultiheadAttention in steps: the same numbers as torch's one function, and gradients of its projections."""

import itertools

import pytest
import torch
from torch import nn

from trak.blocks import OuterBlock
from trak.gradients import Hooked, model_state
from trak.gradients.layers.multihead_attention import forward_in_steps, in_steps, projections
from trak.testing.models import Attention, Readout

DOUBLE = torch.float64
B, L, S, E, H = 3, 4, 5, 6, 2


def masks():
    causal = torch.ones(L, S, dtype=torch.bool).triu(2)
    per_head = torch.rand(B * H, L, S, generator=torch.Generator().manual_seed(0)) > 0.8
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1, 3:] = True
    numbers = torch.where(causal, -5.0, 0.5).double()
    return {
        "no mask": {},
        "boolean": {"attn_mask": causal},
        "numbers": {"attn_mask": numbers},
        "per head": {"attn_mask": per_head},
        "padding": {"key_padding_mask": padding},
        "padding, numbers": {
            "key_padding_mask": torch.where(padding, -9.0, 0.0).double(),
            "attn_mask": numbers,
        },
        "both": {"key_padding_mask": padding, "attn_mask": causal},
    }


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize(
    ("batch_first", "weights"), list(itertools.product([True, False], [False, "mean", "per head"]))
)
def test_outputs_and_weights_are_torchs(mask, batch_first, weights):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(E, H, batch_first=batch_first).double().eval()
    nn.init.normal_(attention.in_proj_bias)
    shapes = ((B, L, E), (B, S, E), (B, S, E))
    inputs = [torch.randn(shape, dtype=DOUBLE) for shape in shapes]
    inputs = inputs if batch_first else [x.transpose(0, 1) for x in inputs]
    options = {**masks()[mask], "need_weights": bool(weights), "average_attn_weights": weights != "per head"}
    wanted, wanted_weights = attention(*inputs, **options)
    got, got_weights = forward_in_steps(attention, projections(attention))(*inputs, **options)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(got_weights, wanted_weights)


def test_no_batch_dimension_and_one_sequence():
    attention = nn.MultiheadAttention(E, H, bias=False).double().eval()
    x, hidden = torch.randn(L, E, dtype=DOUBLE), torch.tensor([False, True, False, False])
    wanted, wanted_weights = attention(x, x, x, key_padding_mask=hidden)
    got, got_weights = forward_in_steps(attention, projections(attention))(x, x, x, key_padding_mask=hidden)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(got_weights, wanted_weights)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, True), ({"bias": False}, True), ({"add_bias_kv": True}, False), ({"add_zero_attn": True}, False), ({"vdim": 3}, False)],
)  # fmt: skip
def test_which_settings(settings, expected):
    assert in_steps(nn.MultiheadAttention(E, H, **settings)) == expected


def test_projections_stay_factored_and_the_module_comes_back():
    torch.manual_seed(0)
    model = Attention().double()
    blocks = []
    batch = (torch.randn(B, L, E, dtype=DOUBLE),)
    names = ["attention.in_proj_weight", "attention.out_proj.weight"]
    Hooked().compute(model, model_state(model, None, "cpu"), Readout(), batch, names, blocks.append)
    assert sorted(block.name for block in blocks) == names
    assert all(isinstance(block, OuterBlock) for block in blocks)
    assert "forward" not in vars(model.attention)
    assert torch.backends.mha.get_fastpath_enabled()
