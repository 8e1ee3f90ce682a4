"""Properties of per-example gradients over random models, shapes and batch sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trak.gradients import Auto, Functional, Hooked, Reference, check_first_batch, model_state
from trak.testing.cases import CASES
from trak.testing.gradients import collect, snapshot
from trak.testing.models import Readout

DOUBLE = torch.float64


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small take longer in two
    yield
    torch.set_num_threads(threads)


@st.composite
def convolutions(draw):
    """(layer, input shape [C, H, W]) with any geometry that has at least one output position."""
    groups = draw(st.integers(1, 3))
    inputs, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    kernel, stride, dilation, padding = (
        draw(st.tuples(st.integers(low, high), st.integers(low, high)))
        for low, high in ((1, 3), (1, 3), (1, 2), (0, 2))
    )
    mode = draw(st.sampled_from(["zeros", "circular", "replicate"]))
    size = [draw(st.integers(max((k - 1) * d + 1, 2), 8)) for k, d in zip(kernel, dilation)]
    layer = nn.Conv2d(
        inputs,
        outputs,
        kernel,
        stride,
        padding,
        dilation,
        groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
    )
    return layer.to(DOUBLE), (inputs, *size)


@settings(max_examples=40)
@given(convolutions(), st.integers(1, 4))
def test_convolutions_of_any_geometry(drawn, batch_size):
    layer, shape = drawn
    batch = (torch.randn(batch_size, *shape, dtype=DOUBLE),)
    got, wanted = collect(Hooked(), layer, batch)[1], collect(Reference(), layer, batch)[1]
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


LAYERS = {
    "linear": lambda width: nn.Linear(width, width),
    "norm": lambda width: nn.LayerNorm(width),
    "rms": lambda width: nn.RMSNorm(width),
    "linear, relu": lambda width: nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True)),
    "gelu": lambda width: nn.GELU(),
    "frozen": lambda width: nn.Linear(width, width, bias=False).requires_grad_(False),
}


@settings(max_examples=20)
@given(
    st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=6),
    st.integers(1, 4),
    st.lists(st.integers(1, 3), max_size=2),
    st.data(),
)
def test_stacks_of_layers_and_any_subset_of_parameters(kinds, batch_size, middle, data):
    model = nn.Sequential(nn.Linear(3, 3), *(LAYERS[kind](3) for kind in kinds), nn.Linear(3, 2)).to(DOUBLE)
    names = [name for name, _ in model.named_parameters()]
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    batch = (torch.randn(batch_size, *middle, 3, dtype=DOUBLE),)
    wanted = collect(Reference(), model, batch, chosen)[1]
    for gradients in (Hooked(), Functional(chunk_size=2)):
        torch.testing.assert_close(collect(gradients, model, batch, chosen)[1], wanted, rtol=1e-9, atol=1e-11)


class Attended(nn.Module):
    """Attention over whatever lies between batch and features."""

    def __init__(self, **settings):
        super().__init__()
        self.attention = nn.MultiheadAttention(3, 1, **settings)

    def forward(self, x):
        tokens = x.reshape(x.shape[0], -1, 3)
        tokens = tokens if self.attention.batch_first else tokens.transpose(0, 1)
        out, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        out = out if self.attention.batch_first else out.transpose(0, 1)
        return out.reshape(x.shape)


class Folded(nn.Module):
    """A learned shift, given all positions as rows of the batch."""

    def __init__(self):
        super().__init__()
        self.shift = Shifted()

    def forward(self, x):
        return self.shift(x.reshape(-1, 3)).reshape(x.shape).tanh()


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return x * self.shift.cos() + self.shift


class TwiceShifted(nn.Module):
    """One module that is called twice, with a module of its kind inside."""

    def __init__(self):
        super().__init__()
        self.outer, self.inner = nn.Parameter(torch.zeros(3)), Shifted()

    def forward(self, x):
        return self.inner(x * self.outer) + self.inner(x).sin()


OTHERS = {
    "linear": lambda: nn.Linear(3, 3),
    "attention": lambda: Attended(batch_first=True),
    "attention, time first": Attended,
    "attention without a rule": lambda: Attended(add_zero_attn=True),
    "shifted": Shifted,
    "folded": Folded,
    "twice": TwiceShifted,
    "prelu": nn.PReLU,
}


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.sampled_from(sorted(OTHERS)), min_size=1, max_size=4),
    st.integers(2, 4),
    st.integers(1, 4),
    st.lists(st.integers(1, 4), max_size=2),
)
def test_modules_with_and_without_rules(kinds, checked_size, batch_size, middle):
    """What the check settles on is right for batches of other sizes, also where sizes coincide."""
    torch.manual_seed(len(kinds))
    model = nn.Sequential(nn.Linear(3, 3), *(OTHERS[kind]() for kind in kinds), nn.Linear(3, 2)).to(DOUBLE)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    names = [name for name, _ in model.named_parameters()]
    state = model_state(model, None, "cpu")
    first = (torch.randn(checked_size, *middle, 3, dtype=DOUBLE),)
    source = check_first_batch(Auto(), model, state, Readout(), first, names)
    assert isinstance(source, Hooked)
    batch = (torch.randn(batch_size, *middle, 3, dtype=DOUBLE),)
    got, wanted = collect(source, model, batch)[1], collect(Reference(), model, batch)[1]
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "gradients", [Hooked(), Functional(), Reference(), Auto()], ids=lambda g: type(g).__name__
)
@settings(max_examples=6)
@given(case=st.sampled_from([case for case in CASES if case.hooked]), data=st.data())
def test_the_model_comes_back_untouched(gradients, case, data):
    model, batch = case.build(batch_size=2)
    for module in model.modules():
        module.training = data.draw(st.booleans())
    for parameter in model.parameters():
        parameter.requires_grad_(data.draw(st.booleans()))
        parameter.grad = torch.ones_like(parameter) if data.draw(st.booleans()) else None
    before, random_before = snapshot(model), torch.get_rng_state()
    collect(gradients, model, batch)
    names = [name for name, _ in model.named_parameters()]
    check_first_batch(gradients, model, model_state(model, None, "cpu"), Readout(), batch, names)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), random_before)
