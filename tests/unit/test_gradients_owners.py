"""Rows of several examples in any order: whose is which, and what layer rules make of them."""

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trak.errors import GradientError, NonFiniteError
from trak.gradients import Auto, Hooked, Reference, check_first_batch, model_state, owners
from trak.gradients.base import BlamedError
from trak.gradients.layers.rows import SortedRows
from trak.testing.gradients import collect
from trak.testing.models import Experts, Readout, Scaled

DOUBLE = torch.float64
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small take longer in two
    yield
    torch.set_num_threads(threads)


def names_of(model):
    return [name for name, _ in model.named_parameters()]


def experts_of(model):
    return tuple(name for name in names_of(model) if ".experts." in name)


def mixture(middle=None, dtype=DOUBLE):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), middle or Experts(), nn.Linear(4, 3)).to(dtype)


def tokens(batch_size, dtype=DOUBLE, seed=1, count=5):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch_size, count, 4, generator=generator, dtype=DOUBLE).to(dtype),)


def assert_right(source, model, batch, rtol=1e-9):
    got, wanted = collect(source, model, batch)[1], collect(Reference(), model, batch)[1]
    largest = max(float(values.abs().max()) for values in wanted.values())
    for name, values in wanted.items():
        torch.testing.assert_close(
            got[name], values, rtol=rtol, atol=rtol * largest, msg=lambda m, name=name: f"{name}: {m}"
        )


def check(source, model, batch):
    return check_first_batch(
        source, model, model_state(model, None, "cpu"), Readout(), batch, names_of(model)
    )


# ------------------------------------------------------------------------------------------------------------ whole gradients


@pytest.mark.parametrize("batch_size", [1, 2, 3, 65])
def test_experts_have_the_gradients_of_one_example_at_a_time(batch_size):
    """65 examples have two digits."""
    model = mixture()
    source = check(Auto(), model, tokens(4))
    assert source == Hooked(routed=experts_of(model))
    assert_right(source, model, tokens(batch_size, count=3, seed=batch_size))


@pytest.mark.parametrize("sent", ["all to two", "by example", "one token"])
def test_any_way_to_send_tokens(sent):
    """All tokens of all examples to the same experts, those of whole examples to one, one token to an expert alone."""

    class Sent(Experts):
        def forward(self, x):
            out, large = super().forward(x).flatten(0, 1), x.flatten(0, 1)[:, 1].abs() > 1.0
            return out.index_add(0, large.nonzero()[:, 0], self.experts[5](x.flatten(0, 1)[large])).view_as(x)

    model, (inputs,) = mixture(Sent()), tokens(4)
    model[0], router = nn.Identity(), model[2].router
    inputs = inputs.clamp(-1.0, 1.0)
    with torch.no_grad():
        router.weight.zero_()
        router.bias.copy_(torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0, -2.0]))
        if sent == "by example":
            router.weight[2, 0], router.weight[3, 0] = 50.0, -50.0
            inputs[:2, :, 0], inputs[2:, :, 0] = 1.0, -1.0
        if sent == "one token":
            model[1] = nn.Identity()
            inputs[2, 1, 1] = 3.0
    source = Hooked(routed=experts_of(model))
    assert_right(source, model, (inputs,))
    assert check(source, model, (inputs,)) == source


def test_equal_tokens_of_different_examples_are_kept_apart():
    """Which cannot be done by looking at the tokens: their gradients differ by another token of the example."""

    class ScaledByAll(nn.Module):
        def forward(self, x):
            return x * x.sum(1, keepdim=True)

    model = nn.Sequential(*mixture()[:3], ScaledByAll(), nn.Linear(4, 3)).double()
    inputs = tokens(1)[0].expand(3, -1, -1).clone()
    inputs[:, 4] = tokens(3)[0][:, 4]
    assert_right(Hooked(routed=experts_of(model)), model, (inputs,))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_powers_of_two_cost_no_digits(dtype, rtol):
    model, batch = mixture(dtype=dtype), tokens(9, dtype)
    assert_right(Hooked(routed=experts_of(model)), model, batch, rtol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype):
    """Twenty examples have two digits where gradients are in float16, which holds fewer powers of two."""

    class Autocast(Readout):
        def output(self, model, batch):
            with torch.autocast("cpu", dtype=dtype):
                return super().output(model, batch).float()

    model, batch = mixture(dtype=torch.float32), tokens(20, torch.float32)
    source = Hooked(routed=experts_of(model))
    got, wanted = (collect(each, model, batch, task=Autocast())[1] for each in (source, Reference()))
    for name in source.routed:
        assert (got[name] - wanted[name]).norm() <= 0.02 * wanted[name].norm()


def test_every_kind_of_layer_and_repeated_calls():
    """Norms, embeddings and convolutions within experts; one expert is called twice in a pass."""

    class Pieces(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.LayerNorm(4), nn.Conv1d(1, 2, 2)
            self.table, self.last = nn.Embedding(3, 4), nn.Linear(6, 4)

        def forward(self, x):
            normed = self.norm(x) + self.table((x.sum(-1) > 0).long())
            return self.last(self.conv(normed[:, None]).flatten(1).sin())

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.experts = nn.Linear(4, 4), nn.ModuleList([Pieces(), Pieces()])

        def forward(self, x):
            rows = self.first(x).flatten(0, 1)
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(len(rows)))
            # Not of the batch's neighbours: rows of an example go where its own tokens say.
            positive = (rows[:, 0] > 0).nonzero()[:, 0]
            out = torch.zeros_like(rows).index_add(0, order, self.experts[0](rows[order]))
            return out.index_add(0, positive, self.experts[1](self.experts[0](rows[positive]))).view_as(x)

    torch.manual_seed(0)
    model = Model().double()
    assert_right(Hooked(routed=tuple(n for n in names_of(model) if "experts" in n)), model, tokens(4))


def test_time_before_the_examples():
    """Layers that are given [T, B, features]: positions are rows."""

    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 2))

        def forward(self, x):
            return self.layers(x.transpose(0, 1)).cumsum(0).transpose(0, 1)

    torch.manual_seed(0)
    model = TimeFirst().double()
    source = check(Auto(), model, tokens(4))
    assert source == Hooked(routed=tuple(names_of(model)))
    for batch_size in (1, 4, 5):  # five as positions
        assert_right(source, model, tokens(batch_size))


def test_beside_local_passes():
    """Whose gradients are those of the ordinary backward pass, not of that with factors."""
    model = nn.Sequential(Scaled(), *mixture(), Scaled()).double()
    for scaled in (model[0], model[-1]):
        nn.init.normal_(scaled.scale)
    model[-1] = nn.Sequential(nn.Linear(3, 4), model[-1])
    source = check(Auto(), model.double(), tokens(4))
    assert source.local
    assert source.routed == tuple(name for name in names_of(model) if ".experts." in name)
    assert_right(source, model, tokens(5))


# ----------------------------------------------------------------------------------------------------------------- what is wrong


def test_wrong_owners_do_not_pass_the_check(monkeypatch):
    model = mixture()
    source, right = Hooked(routed=experts_of(model)), SortedRows.by
    assert check(source, model, tokens(4)) == source
    monkeypatch.setattr(
        owners.SortedRows, "by", staticmethod(lambda owner_n, size: right((owner_n + 1) % size, size))
    )
    with pytest.raises(
        GradientError, match=r"the gradient of example 0 from Hooked is not what autograd gives"
    ):
        check(source, model, tokens(4))


def test_rows_of_several_examples_are_refused():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(5, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.out(x + self.table(torch.arange(x.shape[1])))

    model = Positions().double()
    with pytest.raises(
        BlamedError, match=r"5 of 5 rows of the input of layer 'table' \(Embedding\), \[5\]"
    ) as caught:
        collect(Hooked(routed=("table.weight",)), model, tokens(3))
    assert caught.value.parameters == ("table.weight",)


def test_infinite_gradients_say_so():
    model = mixture()
    inputs = tokens(3)[0]
    inputs[1, 2] = torch.inf
    with pytest.raises(NonFiniteError, match=r"'2.experts.\d.\d' \(Linear\) is NaN or infinite"):
        collect(Hooked(routed=experts_of(model)), model, (inputs,))


def test_inputs_that_are_overwritten_are_noticed():
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            rows = x.flatten(0, 1).clone()
            out = self.layer(rows)
            rows.zero_()
            return out.view_as(x)

    model = nn.Sequential(Overwriting(), nn.Linear(4, 2)).double()
    with pytest.raises(GradientError, match=r"'0.layer' \(Linear\) was modified in place"):
        collect(Hooked(routed=("0.layer.weight",)), model, tokens(3))


# --------------------------------------------------------------------------------------------------------------------- the parts


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 5000), st.sampled_from([8, 64]))
def test_numbers_of_examples_differ_in_a_digit(size, most):
    base, digits = owners.number_system(size, most)
    assert 2 <= base <= most
    assert base**digits >= size
    assert most ** (digits - 1) < size


def test_multiples_are_found_and_others_are_not():
    plain = torch.tensor(
        [[1.0, -3.0], [0.5, 0.25], [0.0, 0.0], [1e-9, 1e-9], [2.0, 1.0], [1.0, 1.0], [3.0, 1.0]]
    )
    scaled = torch.tensor(
        [[8.0, -24.0], [0.5, 0.25], [0.0, 0.0], [3e-9, 1e-9], [4.0, 3.0], [16.0, 16.0], [1.5, 0.5]]
    )
    digits, fits = owners.digits_of(plain, scaled, 4)
    assert fits.tolist() == [True, True, True, True, False, False, False]
    assert digits.tolist() == [3, 0, 0, -1, -1, -1, -1]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(-1, 4), min_size=1, max_size=12))
def test_sorted_rows_keep_their_order_within_groups(groups):
    group_n = torch.tensor(groups)
    values = torch.arange(1, len(groups) + 1)
    out = SortedRows.by(group_n, 5)(values).reshape(5, -1)
    for group in range(5):
        own = values[group_n == group].tolist()
        assert out[group].tolist() == own + [0] * (out.shape[1] - len(own))


def test_the_page_has_the_recorded_prices():
    record = json.loads((ROOT / "benchmarks" / "results" / "experts.json").read_text())["results"]
    modules, mixtral = (record[name]["ratios"] for name in ("experts as modules", "Mixtral"))
    before = "one example after another"
    said = (
        f"take {modules['rules']:.1f} plain passes, and of a small Mixtral {mixtral['rules']:.1f} "
        f"(`benchmarks/experts.py`; {modules[before]:.1f} and {mixtral[before]:.1f} with"
    )
    page = (ROOT / "docs" / "limitations.md").read_text(encoding="utf-8")
    assert said in re.sub(r"\s+", " ", page)
