"""What hooks refuse, and how they find out which rows belong to which example."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import trak
from trak.errors import GradientError, UnsupportedLayerError
from trak.gradients import Hooked, Reference, check_first_batch, model_state
from trak.testing.gradients import collect
from trak.testing.models import OverwrittenInput, TiedLanguageModel

DOUBLE = torch.float64


def names_of(model):
    return [name for name, _ in model.named_parameters()]


def uncovered(model):
    return Hooked().covers(model, names_of(model))


def test_everything_covered_is_an_empty_list():
    assert uncovered(TiedLanguageModel()) == []


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def patched():
    layer = nn.Linear(2, 2)
    layer.forward = lambda x: F.linear(x, 2 * layer.weight)
    return layer


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (Doubled(2, 2), ["weight", "bias"]),
        (patched(), ["weight", "bias"]),
        (nn.Embedding(3, 2, max_norm=1.0), ["weight"]),
        (nn.Embedding(3, 2, scale_grad_by_freq=True), ["weight"]),
        (nn.BatchNorm1d(2, track_running_stats=False), ["weight", "bias"]),
        (parametrizations.weight_norm(nn.Linear(2, 2, bias=False)), None),
        (prune.identity(nn.Linear(2, 2), "weight"), ["weight_orig"]),
        (nn.LSTM(2, 2), None),
        (nn.Bilinear(2, 2, 2), ["weight", "bias"]),
        (nn.Sequential(nn.Linear(2, 2), nn.ConvTranspose1d(2, 2, 1, bias=False)), ["1.weight"]),
        (nn.MultiheadAttention(4, 2, kdim=3), None),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_no_rule_covers(model, names):
    expected = names_of(model) if names is None else names
    assert sorted(uncovered(model)) == sorted(expected)


def test_error_names_parameter_class_and_ways_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.ConvTranspose1d(2, 2, 1))
    with pytest.raises(
        UnsupportedLayerError, match=r"'1.weight' of ConvTranspose1d.*Functional.*parameters="
    ):
        collect(Hooked(), model, (torch.randn(2, 2),))


def test_parameter_tied_to_an_unknown_module_is_uncovered():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Bilinear(2, 2, 2, bias=False))
    model[1].weight = model[0].weight
    assert uncovered(model) == ["0.weight"]


def test_overwritten_input_is_refused():
    with pytest.raises(GradientError, match=r"'second'.*modified in place"):
        collect(Hooked(), OverwrittenInput(), (torch.randn(2, 4),))


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


def test_another_leading_dimension_is_refused():
    message = r"'layer' \(Linear\) is given \[5, 2, 3\] in a batch of 2.*Functional"
    with pytest.raises(GradientError, match=message):
        collect(Hooked(), TimeFirst(), (torch.randn(2, 5, 3),))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("positions", ["flat", "batch"])
def test_positions_are_shared_whatever_their_number(length, batch_size, positions):
    """Also where there are as many positions as examples, or a multiple: sizes must not decide."""
    torch.manual_seed(1)
    model = TiedLanguageModel(positions=positions, length=6).double()
    batch = (torch.randint(11, (batch_size, length)),)
    _, got = collect(Hooked(), model, batch)
    _, wanted = collect(Reference(), model, batch)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def test_indices_from_columns_of_the_batch_are_per_example():
    class Recommender(nn.Module):
        def __init__(self):
            super().__init__()
            self.users, self.items = nn.Embedding(4, 3), nn.Embedding(5, 3)

        def forward(self, x):
            return self.users(x[:, 0]) * self.items(x[:, 1])

    model = Recommender().double()
    batch = (torch.tensor([[0, 1], [3, 4], [3, 1]]),)
    torch.testing.assert_close(collect(Hooked(), model, batch)[1], collect(Reference(), model, batch)[1])


class Prototypes(nn.Module):
    """A learned vector without a batch dimension passes through layers and meets the batch after."""

    def __init__(self, *, squeeze=False):
        super().__init__()
        self.squeeze = squeeze
        self.register_buffer("seed", torch.linspace(-1, 1, 3).unsqueeze(0))
        self.shared, self.own = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x):
        shared = self.shared(self.seed).tanh()
        if self.squeeze:
            shared = shared.view(4)
        return self.own(x) * shared


def test_inputs_that_serve_all_examples():
    model, batch = Prototypes().double(), (torch.randn(3, 4, dtype=DOUBLE),)
    torch.testing.assert_close(collect(Hooked(), model, batch)[1], collect(Reference(), model, batch)[1])


def test_a_model_that_cannot_take_expanded_inputs_says_so():
    model, batch = Prototypes(squeeze=True), (torch.randn(3, 4),)
    with pytest.raises(GradientError, match=r"'shared'.*expanded.*Functional"):
        collect(Hooked(), model, batch)


def test_layer_called_by_keyword():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.places, self.layer = nn.Embedding(4, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(input=x + self.places(input=torch.arange(2).unsqueeze(0)))

    model, batch = Keywords().double(), (torch.randn(3, 2, 3, dtype=DOUBLE),)
    torch.testing.assert_close(collect(Hooked(), model, batch)[1], collect(Reference(), model, batch)[1])


def test_users_hooks_stay_and_are_seen_through():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double()
    model[0].register_forward_hook(lambda module, inputs, output: output.sin())
    model[1].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    batch = (torch.randn(2, 3, dtype=DOUBLE),)
    torch.testing.assert_close(collect(Hooked(), model, batch)[1], collect(Reference(), model, batch)[1])
    assert [len(model[0]._forward_hooks), len(model[1]._forward_pre_hooks)] == [1, 1]


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.middle, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            inner = lambda x: self.middle(x).tanh()  # noqa: E731
            return self.last(checkpoint(inner, self.first(x), use_reentrant=reentrant))

    model, batch = Checkpointed().double(), (torch.randn(2, 3, dtype=DOUBLE),)
    if reentrant:
        with pytest.raises(RuntimeError, match="use_reentrant"):
            collect(Hooked(), model, batch)
        return
    torch.testing.assert_close(collect(Hooked(), model, batch)[1], collect(Reference(), model, batch)[1])


def test_errors_of_the_consumer_arrive_and_leave_no_hooks():
    model, batch = nn.Linear(3, 2), (torch.randn(2, 3),)

    class StopItError(Exception):
        pass

    def consume(block):
        raise StopItError(block.name)

    from trak.gradients import model_state
    from trak.testing.models import Readout

    with pytest.raises(StopItError, match="weight"):
        Hooked().compute(model, model_state(model, None, "cpu"), Readout(), batch, ["weight"], consume)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert isinstance(model.weight, nn.Parameter)


def test_transformer_encoder_layers_are_not_skipped_in_eval_mode():
    model = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).double()
    batch = (torch.randn(3, 5, 4, dtype=DOUBLE),)
    names = ["linear1.weight", "linear2.bias", "norm1.weight"]
    got, wanted = collect(Hooked(), model, batch, names)[1], collect(Reference(), model, batch, names)[1]
    torch.testing.assert_close(got, wanted)
    assert all(values.abs().max() > 0 for values in got.values())
    assert torch.backends.mha.get_fastpath_enabled()


def test_recurrent_networks_use_the_state_they_are_lent():
    from trak.gradients import model_state
    from trak.testing.models import Readout

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(3, 4, batch_first=True)

        def forward(self, x):
            return self.rnn(x)[0]

    model, other = Last().double(), Last().double()
    batch = (torch.randn(2, 5, 3, dtype=DOUBLE),)
    state = model_state(model, other.state_dict(), "cpu")
    outputs = Reference().compute(model, state, Readout(), batch, list(state), lambda block: None)
    torch.testing.assert_close(outputs.f, Readout().output(other, batch).detach())


def test_sparse_embeddings_are_hooked_as_others_are():
    model, batch = nn.Embedding(7, 4, sparse=True).double(), (torch.randint(7, (3, 5)),)
    torch.testing.assert_close(collect(Hooked(), model, batch)[1], collect(Reference(), model, batch)[1])


def test_a_tasks_complaint_about_expanded_inputs_is_no_last_word():
    # Indices computed in the forward pass look like positions that serve all examples.
    class Computed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(9, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.out(self.table(x[:, 0] + 1))

    model = Computed().double()
    batch = (torch.randint(8, (5, 2)), torch.randint(3, (5,)))
    names = [name for name, _ in model.named_parameters()]
    state = model_state(model, None, "cpu")
    chosen = check_first_batch(trak.Auto(), model, state, trak.ImageClassification(), batch, names)
    # They are one per example: which is whose a second backward pass tells.
    assert chosen == Hooked(routed=("table.weight",))


def test_activation_checkpointing_of_the_first_layer_says_so():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.last(checkpoint(lambda x: self.first(x).tanh(), x, use_reentrant=False))

    with pytest.raises(GradientError, match="activation checkpointing"):
        collect(Hooked(), Checkpointed(), (torch.randn(2, 3),))


def test_autocast_inside_the_model():
    class Autocast(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.last(self.first(x).tanh()).float()

    model, batch = Autocast(), (torch.randn(4, 3),)
    got, wanted = collect(Hooked(), model, batch)[1], collect(Reference(), model, batch)[1]
    torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05)
