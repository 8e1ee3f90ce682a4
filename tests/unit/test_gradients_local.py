"""Parameters that no layer rule covers: local passes, expanded parameters, and how the check finds them."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trak.errors import GradientError, UnsupportedLayerError
from trak.gradients import Auto, Functional, Hooked, Reference, check_first_batch, model_state
from trak.gradients.local import Local
from trak.testing.cases import FOUND_CASES, LOCAL_CASES
from trak.testing.gradients import collect, snapshot
from trak.testing.models import Experts, Int8Linear, LoRALinear, Readout, ReadsSideEffect, Scaled

DOUBLE = torch.float64


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small take longer in two
    yield
    torch.set_num_threads(threads)


def names_of(model):
    return [name for name, _ in model.named_parameters()]


def chosen(model, batch, names=None):
    names = names or names_of(model)
    return check_first_batch(Auto(), model, model_state(model, None, "cpu"), Readout(), batch, names)


def assert_right(source, model, batch, names=None):
    got, wanted = collect(source, model, batch, names)[1], collect(Reference(), model, batch, names)[1]
    for name, values in wanted.items():
        torch.testing.assert_close(
            got[name], values, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("case", LOCAL_CASES + FOUND_CASES, ids=lambda case: case.name)
def test_one_slow_module_does_not_slow_the_model(case):
    """The check settles on hooks, and what it found on one batch serves batches of other sizes and contents."""
    model, batch = case.build(batch_size=4)
    before = snapshot(model)
    source = chosen(model, batch)
    assert isinstance(source, Hooked)
    assert source != Hooked()
    for batch_size in (1, 2, 3, 5):
        _, other = case.build(batch_size=batch_size, seed=batch_size)
        assert_right(source, model, other)
    assert snapshot(model) == before


@pytest.mark.parametrize("case", LOCAL_CASES, ids=lambda case: case.name)
def test_only_what_needs_it_is_local(case):
    model, batch = case.build(batch_size=3)
    source = chosen(model, batch)
    elsewhere = {name for local in source.local for name in local.parameters} | set(source.expanded)
    strict = set(Hooked().covers(model, names_of(model)))
    assert elsewhere == strict | {name for name in elsewhere if name.endswith("out_proj.bias")}


def test_local_passes_are_asked_for_or_chosen_by_auto():
    """`Hooked()` itself stays strict: it says that it is fast, and keeps to it."""
    case = LOCAL_CASES[0]
    model, batch = case.build()
    with pytest.raises(UnsupportedLayerError):
        collect(Hooked(), model, batch)


def test_class_tokens_are_expanded():
    case = next(case for case in LOCAL_CASES if case.name == "class token and positions")
    model, batch = case.build()
    assert chosen(model, batch) == Hooked(expanded=("token", "positions"))


def test_expansion_that_the_forward_pass_cannot_take_gives_way():
    class Bilinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.row, self.layer = nn.Parameter(torch.zeros(1, 4)), nn.Linear(4, 4)

        def forward(self, x):
            # Averages over the rows of the parameter: with copies, the same outputs and other gradients.
            return (x @ self.row.T).mean(1, keepdim=True) * x

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Bilinear(), nn.Linear(4, 2)).double()
    nn.init.normal_(model[1].row)
    batch = (torch.randn(3, 4, dtype=DOUBLE),)
    source = chosen(model, batch)
    assert source.local == (Local("1", (("1.row", "1.row"),)),)
    assert_right(source, model, batch)


def test_experts_have_their_rows_sorted_and_take_their_siblings_along():
    """Also experts that the first batch never sends a token to."""
    model = unbalanced(Experts())
    batch = (torch.randn(3, 5, 4, dtype=DOUBLE).clamp(-0.5, 0.5),)
    source = chosen(model, batch)
    assert source == Hooked(routed=tuple(name for name in names_of(model) if ".experts." in name))
    assert_right(source, model, batch)
    assert_right(source, model, (3 * torch.randn(4, 5, 4, dtype=DOUBLE),))


def test_experts_without_rules_go_one_example_at_a_time_and_take_their_siblings_along():
    """Also experts that the first batch never sends a token to."""

    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return (x @ self.weight).sin()

    class RawExperts(Experts):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(Raw() for _ in range(6))

    model = unbalanced(RawExperts())
    batch = (torch.randn(3, 5, 4, dtype=DOUBLE).clamp(-0.5, 0.5),)
    source = chosen(model, batch)
    assert [(local.module, local.one_by_one) for local in source.local] == [("1", True)]
    assert sorted(source.local[0].parameters) == sorted(n for n in names_of(model) if ".experts." in n)
    assert_right(source, model, batch)
    assert_right(source, model, (3 * torch.randn(4, 5, 4, dtype=DOUBLE),))


def unbalanced(experts):
    """Two experts have nearly all tokens, three have none of small ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), experts, nn.Linear(4, 2)).double()
    nn.init.zeros_(experts.router.weight)
    with torch.no_grad():
        experts.router.bias.copy_(torch.tensor([9.0, 8.0, 0.0, 0.0, 0.0, 0.0]))
        experts.router.weight[2, 0] = 30.0
    return model


def test_uses_outside_a_module_move_the_parameter_up(caplog):
    with caplog.at_level(logging.INFO, logger="trak"):
        source = chosen(ReadsSideEffect().double(), (torch.randn(3, 4, dtype=DOUBLE),))
    assert source.local == (Local("", (("middle.scale", "middle.scale"),)),)
    assert "'middle.scale'" in caplog.text


def test_when_the_whole_model_is_the_module_vmap_has_all_of_it():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.small = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 1)

        def forward(self, x):
            return self.small(x @ self.weight)

    assert chosen(Raw().double(), (torch.randn(3, 4, dtype=DOUBLE),)) == Functional()


@pytest.mark.parametrize("quantised", [False, True])
def test_low_rank_adapters_have_rules_whatever_they_sit_on(quantised):
    torch.manual_seed(0)
    base = Int8Linear(4, 5) if quantised else nn.Linear(4, 5)
    model = nn.Sequential(LoRALinear(base), nn.Tanh(), LoRALinear(nn.Linear(5, 3))).double()
    batch = (torch.randn(4, 2, 4, dtype=DOUBLE),)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name in names)
    source = chosen(model, batch, names)
    assert source == Hooked()
    assert_right(source, model, batch, names)


def test_a_subset_of_parameters_needs_only_its_own_passes():
    torch.manual_seed(0)
    model = nn.Sequential(Scaled(), Scaled(), nn.Linear(4, 2)).double()
    batch = (torch.randn(3, 4, dtype=DOUBLE),)
    assert chosen(model, batch, ["2.weight", "0.layer.weight"]) == Hooked()
    source = chosen(model, batch)
    assert_right(source, model, batch, ["1.scale", "2.weight"])


def test_inputs_overwritten_after_the_module_read_them():
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), Scaled()

        def forward(self, x):
            hidden = self.first(x)
            out = self.second(hidden.detach())
            hidden.mul_(2.0)
            return out + hidden

    model, batch = Overwriting().double(), (torch.randn(3, 4, dtype=DOUBLE),)
    local = Hooked(local=(Local("second", (("second.scale", "second.scale"),)),))
    with pytest.raises(GradientError, match=r"'second' \(Scaled\) has an input that is modified in place"):
        collect(local, model, batch, ["first.weight", "second.scale"])


def test_a_module_that_mixes_up_shapes_is_refused_with_the_shapes():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return (x * self.scale)[: x.shape[0] // 2 * 2]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat = Flat()

        def forward(self, x):
            return F.pad(self.flat(x), (0, 0, 0, x.shape[0] % 2), value=1.0)

    model, batch = Model().double(), (torch.randn(4, 3, dtype=DOUBLE),)
    local = Hooked(local=(Local("flat", (("flat.scale", "flat.scale"),)),))
    with pytest.raises(GradientError, match=r"'flat' \(Flat\) deals with .*\[\[4, 3\]\] for 4 examples"):
        collect(local, model, batch)


def test_layers_inside_a_local_module_keep_their_rules_and_users_hooks_run():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Scaled(), nn.Linear(4, 2)).double()
    model[1].register_forward_hook(lambda module, inputs, output: output.sin())
    model[1].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    model[1].layer.register_forward_hook(lambda module, inputs, output: output.cos())
    batch = (torch.randn(3, 4, dtype=DOUBLE),)
    source = chosen(model, batch)
    assert [local.parameters for local in source.local] == [("1.scale",)]
    assert_right(source, model, batch)
