"""Which parameters are attributed, and how a checkpoint is fitted to a model."""

import pytest
import torch
from torch import nn

from trak.errors import CheckpointError, ParameterError
from trak.gradients import model_state, select_parameters
from trak.testing.models import ResNet, TiedLanguageModel


def mlp():
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))


def test_by_default_those_that_require_gradients():
    model = mlp()
    model[0].requires_grad_(False)
    assert select_parameters(model) == {"2.weight": (1, 3), "2.bias": (1,)}


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ("2.weight", ["2.weight"]),
        ("*.bias", ["0.bias", "2.bias"]),
        ("*", ["0.weight", "0.bias", "2.weight", "2.bias"]),
        (["2.bias", "0.*"], ["0.weight", "0.bias", "2.bias"]),
        (("0.bias", "*.bias"), ["0.bias", "2.bias"]),
        (lambda name, parameter: parameter.ndim == 2, ["0.weight", "2.weight"]),
    ],
)
def test_names_patterns_and_functions_in_the_models_order(parameters, expected):
    assert list(select_parameters(mlp().requires_grad_(False), parameters)) == expected


def test_tied_parameters_count_once_under_their_first_name():
    model = TiedLanguageModel()
    assert list(select_parameters(model, "head.weight")) == ["tokens.weight"]
    assert list(select_parameters(model, ["head.*", "tokens.*"])) == ["tokens.weight"]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ("head.wieght", r"no parameter.*'head.wieght'.*Did you mean 'head.weight'"),
        ("head", r"It is a module: write 'head\.\*'"),
        ("zzz", r"The model has \d+ parameters: 'tokens.weight'"),
        (["mix.*", "nope.*"], r"'nope\.\*'"),
        ([], "empty list"),
        (lambda name, parameter: False, "chose none"),
    ],
)
def test_selections_that_match_nothing(parameters, message):
    with pytest.raises(ParameterError, match=message):
        select_parameters(TiedLanguageModel(), parameters)


def test_models_without_anything_to_select():
    with pytest.raises(ParameterError, match="has no parameters"):
        select_parameters(nn.ReLU())
    with pytest.raises(ParameterError, match=r"no parameter requires gradients.*parameters='\*'"):
        select_parameters(mlp().requires_grad_(False))


def test_complex_parameters_are_not_left_out_silently():
    model = mlp()
    model.kernel = nn.Parameter(torch.ones(2, dtype=torch.cfloat))
    for parameters in (None, "*"):
        with pytest.raises(ParameterError, match=r"are complex, first 'kernel'.*view_as_complex"):
            select_parameters(model, parameters)
    assert len(select_parameters(model, lambda name, parameter: parameter.is_floating_point())) == 4


def test_integers_have_no_gradients():
    model = mlp()
    model[0].weight = nn.Parameter(torch.ones(3, 2, dtype=torch.int8), requires_grad=False)
    assert list(select_parameters(model, "*.weight")) == ["2.weight"]
    with pytest.raises(ParameterError, match=r"'0.weight' holds torch.int8"):
        select_parameters(model, "0.weight")
    with pytest.raises(ParameterError, match="floating-point"):
        select_parameters(model, "0.w*")


def same(state, wanted):
    return state.keys() == wanted.keys() and all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_state_of_the_model_itself():
    model = ResNet()
    state = model_state(model, None, "cpu")
    assert same(state, {name: tensor.detach() for name, tensor in model.state_dict().items()})
    assert not any(tensor.requires_grad for tensor in state.values())
    assert state["head.weight"].data_ptr() == model.head.weight.data_ptr()
    assert state["body.1.running_mean"].data_ptr() != model.body[1].running_mean.data_ptr()


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name,
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: name.replace("body.", "body._orig_mod."),
    ],
)
def test_wrappers_prefixes_are_looked_through(rename):
    model, trained = ResNet(), ResNet()
    checkpoint = {rename(name): tensor for name, tensor in trained.state_dict().items()}
    assert same(model_state(model, checkpoint, "cpu"), model_state(trained, None, "cpu"))


def test_wrapped_models_take_bare_checkpoints():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = ResNet()

    trained = ResNet()
    state = model_state(Wrapper(), trained.state_dict(), "cpu")
    assert torch.equal(state["module.head.weight"], trained.head.weight)


def test_a_real_submodule_called_module_keeps_its_name():
    class Real(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.other = nn.Linear(2, 2), nn.Linear(2, 2)

    trained = Real()
    assert same(model_state(Real(), trained.state_dict(), "cpu"), model_state(trained, None, "cpu"))


@pytest.mark.parametrize("left_out", ["tokens.weight", "head.weight"])
def test_tied_tensors_may_lack_one_of_their_names(left_out):
    trained = TiedLanguageModel()
    checkpoint = {name: tensor for name, tensor in trained.state_dict().items() if name != left_out}
    assert same(model_state(TiedLanguageModel(), checkpoint, "cpu"), model_state(trained, None, "cpu"))


def test_tied_tensors_must_be_the_same():
    checkpoint = TiedLanguageModel().state_dict()
    checkpoint["head.weight"] = checkpoint["head.weight"] + 1
    with pytest.raises(CheckpointError, match=r"different values.*untied"):
        model_state(TiedLanguageModel(), checkpoint, "cpu")


def test_unsaved_buffers_come_from_the_model():
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.ones(2), persistent=False)
    saved = nn.Linear(2, 2).state_dict()
    assert torch.equal(model_state(model, saved, "cpu")["mask"], torch.ones(2))
    # Some files hold buffers that later versions of a model no longer save.
    assert torch.equal(model_state(model, {**saved, "mask": torch.zeros(2)}, "cpu")["mask"], torch.ones(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("2.bias"), r"1 tensors are missing from the checkpoint, first '2.bias'"),
        (
            lambda s: s.update({"2.biass": s.pop("2.bias")}),
            r"'2.bias' \(close to '2.biass'\).*unknown to the model",
        ),
        (lambda s: s.update(extra=torch.ones(1)), r"1 tensors are unknown to the model, first 'extra'"),
        (lambda s: s.update({"0.weight": torch.ones(4, 2)}), r"'0.weight' has shape \[4, 2\].*\[3, 2\]"),
        (lambda s: s.update(epoch=3), r"'epoch' holds int.*state dict inside"),
    ],
)
def test_checkpoints_that_do_not_fit(change, message):
    checkpoint = dict(mlp().state_dict())
    change(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        model_state(mlp(), checkpoint, "cpu")


def test_dtypes_follow_the_model_or_the_request():
    model = ResNet()
    half = {name: t.half() if t.is_floating_point() else t for name, t in model.state_dict().items()}
    assert model_state(model, half, "cpu")["head.weight"].dtype == torch.float32
    state = model_state(model, None, "cpu", torch.float64)
    assert state["head.weight"].dtype == state["body.1.running_mean"].dtype == torch.float64
    assert state["body.1.num_batches_tracked"].dtype == torch.int64


def test_models_without_values_need_a_complete_checkpoint():
    with torch.device("meta"):
        model = mlp()
    trained = mlp()
    assert same(model_state(model, trained.state_dict(), "cpu"), model_state(trained, None, "cpu"))
    with pytest.raises(CheckpointError, match="meta device"):
        model_state(model, None, "cpu")


def test_weights_that_the_forward_pass_rescales_are_copied():
    model = nn.Sequential(nn.Embedding(5, 3, max_norm=0.1), nn.Linear(3, 2))
    state = model_state(model, None, "cpu")
    assert state["0.weight"].data_ptr() != model[0].weight.data_ptr()
    assert state["1.weight"].data_ptr() == model[1].weight.data_ptr()


def test_lazy_modules_are_refused():
    with pytest.raises(ParameterError, match=r"no shape yet, first '0.weight'"):
        select_parameters(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)))
