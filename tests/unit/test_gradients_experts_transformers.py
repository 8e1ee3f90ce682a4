"""Experts of Hugging Face's mixtures, whose matrices are slices of one parameter."""

import pytest
import torch
from torch import nn

from trak.errors import GradientError
from trak.gradients import Auto, Hooked, Reference, check_first_batch, model_state
from trak.gradients.layers.experts_transformers import (
    TransformersExpertsRule,
    expert_projections,
    experts_in_steps,
    forward_of_experts,
)
from trak.testing import hugging_face
from trak.testing.gradients import collect, snapshot
from trak.testing.models import Readout

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.integrations.moe")
DOUBLE = torch.float64
WIDTHS = {"hidden_size": 8, "intermediate_size": 4, "moe_intermediate_size": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "Mixtral": ("mixtral", "MixtralExperts", "MixtralConfig", {"num_local_experts": 4}),
    "Qwen": ("qwen3_moe", "Qwen3MoeExperts", "Qwen3MoeConfig", {"num_experts": 4}),
    "DeepSeek": ("deepseek_v3", "DeepseekV3Experts", "DeepseekV3Config", {"n_routed_experts": 4}),
    "gpt-oss, biased and transposed": ("gpt_oss", "GptOssExperts", "GptOssConfig", {"num_local_experts": 4}),
    "Nemotron, without gate": (
        "nemotron_h",
        "NemotronHExperts",
        "NemotronHConfig",
        {"n_routed_experts": 4, "moe_latent_size": None},
    ),
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small take longer in two
    yield
    torch.set_num_threads(threads)


def experts(family, implementation="eager"):
    module, kind, config, options = FAMILIES[family]
    room = pytest.importorskip(f"transformers.models.{module}.modeling_{module}")
    settings = getattr(transformers, config)(**WIDTHS, **options)
    settings._experts_implementation = implementation
    torch.manual_seed(0)
    made = getattr(room, kind)(settings)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4)
    return made.double()


class Mixture(nn.Module):
    """Routes each token to two experts by a layer of its own."""

    def __init__(self, inner):
        super().__init__()
        self.first, self.router, self.inner = nn.Linear(4, 8), nn.Linear(8, 4), inner

    def forward(self, x):
        hidden = self.first(x).flatten(0, 1)
        weights, chosen = self.router(hidden).softmax(-1).topk(2, dim=-1)
        return self.inner(hidden, chosen, weights).unflatten(0, x.shape[:2])


def mixture(family, implementation="eager"):
    return Mixture(experts(family, implementation)).double()


def batch_of(size, seed=0):
    return (torch.randn(size, 5, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)),)


def assert_right(source, model, batch):
    got, wanted = collect(source, model, batch)[1], collect(Reference(), model, batch)[1]
    for name, values in wanted.items():
        torch.testing.assert_close(
            got[name], values, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_forward_in_steps_is_the_librarys(family):
    module = experts(family)
    assert experts_in_steps(module)
    assert TransformersExpertsRule().covers(module) == {name for name, _ in module.named_parameters()}
    hidden, weights = torch.randn(7, 8, dtype=DOUBLE), torch.rand(7, 2, dtype=DOUBLE)
    chosen = torch.tensor([[0, 1], [1, 0], [0, 3], [3, 1], [0, 1], [1, 0], [3, 0]])  # none for expert 2
    in_steps = forward_of_experts(module, expert_projections(module))
    torch.testing.assert_close(in_steps(hidden, chosen, weights), module(hidden, chosen, weights))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_one_example_at_a_time(family):
    model = mixture(family)
    before = snapshot(model)
    names = [name for name, _ in model.named_parameters()]
    source = check_first_batch(Auto(), model, model_state(model, None, "cpu"), Readout(), batch_of(4), names)
    assert source == Hooked()
    for size in (1, 2, 5):
        assert_right(source, model, batch_of(size, seed=size))
    assert snapshot(model) == before


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_whatever_way_the_library_takes(implementation):
    model = mixture("Mixtral", implementation).float()
    names = [name for name, _ in model.named_parameters()]
    batch = (batch_of(4)[0].float(),)
    state = model_state(model, None, "cpu")
    assert check_first_batch(Auto(), model, state, Readout(), batch, names) == Hooked()


def test_a_subset_of_the_parameters():
    model = mixture("gpt-oss, biased and transposed")
    every = collect(Hooked(), model, batch_of(3))[1]
    for name in ("inner.down_proj", "inner.gate_up_proj_bias"):
        some = collect(Hooked(), model, batch_of(3), [name])[1]
        torch.testing.assert_close(some, {name: every[name]})


def test_rows_that_are_not_the_examples_in_order_are_sorted():
    """Tokens position by position; then also which expert each was sent to is sorted."""

    class TimeFirst(Mixture):
        def forward(self, x):
            return super().forward(x.transpose(0, 1)).transpose(0, 1)

    model = TimeFirst(experts("gpt-oss, biased and transposed")).double()
    names = [name for name, _ in model.named_parameters()]
    source = check_first_batch(Auto(), model, model_state(model, None, "cpu"), Readout(), batch_of(4), names)
    assert source == Hooked(routed=tuple(names))
    assert_right(source, model, batch_of(3))


def test_wrong_experts_do_not_pass_the_check(monkeypatch):
    model = mixture("Mixtral")
    names, state = [name for name, _ in model.named_parameters()], model_state(model, None, "cpu")
    right = TransformersExpertsRule.blocks

    def wrong(self, call):
        (expert_n,) = call.others
        object.__setattr__(call, "others", ((expert_n + 1) % 4,))
        return right(self, call)

    monkeypatch.setattr(TransformersExpertsRule, "blocks", wrong)
    with pytest.raises(GradientError, match=r"not what autograd gives; worst for parameter 'inner"):
        check_first_batch(Hooked(), model, state, Readout(), batch_of(4), names)


def test_changed_experts_are_left_to_passes_of_their_own():
    module = experts("Mixtral")
    module.config._experts_implementation = "somebody's"
    assert not experts_in_steps(module)

    class Changed(type(module)):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return 2 * super().forward(hidden_states, top_k_index, top_k_weights)

    module = experts("Mixtral")
    module.__class__ = Changed
    assert not experts_in_steps(module)
    assert TransformersExpertsRule().covers(nn.Linear(2, 2)) == frozenset()


def test_a_whole_language_model():
    model = hugging_face.mixtral(layers=2, use_cache=False).double()
    tokens = {"input_ids": torch.randint(3, 19, (3, 6), generator=torch.Generator().manual_seed(0))}
    names = [name for name, _ in model.named_parameters()]
    source = check_first_batch(Auto(), model, model_state(model, None, "cpu"), Readout(), tokens, names)
    experts = {name for name in names if ".experts." in name}
    assert experts
    assert experts.isdisjoint(name for local in source.local for name in local.parameters)
