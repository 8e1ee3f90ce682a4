"""Hugging Face models, tiny and random."""

import pytest
import torch

from trak.errors import GradientError
from trak.gradients import Auto, Functional, Hooked, Reference, check_first_batch, model_state
from trak.testing import hugging_face
from trak.testing.gradients import collect
from trak.testing.hugging_face import LAYERS, TOKENS, clip
from trak.testing.models import Readout

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small take longer in two
    yield
    torch.set_num_threads(threads)


def bert():
    return hugging_face.bert(layers=2)


def gpt2():
    return hugging_face.gpt2(layers=2, use_cache=False)


def llama():
    return hugging_face.llama(use_cache=False)


def build(make):
    torch.manual_seed(0)
    model = make().double()
    batch = {"input_ids": torch.randint(3, 19, (3, 6)), "attention_mask": torch.ones(3, 6, dtype=torch.long)}
    batch["attention_mask"][1, 4:] = 0
    return model, batch


@pytest.mark.parametrize("make", [bert, gpt2, llama])
def test_all_sources_agree(make):
    model, batch = build(make)
    sources = [Hooked(), Functional()]
    if make is bert:  # looks whether the mask hides anything, a branch on values that vmap cannot take
        with pytest.raises(GradientError, match="vmap"):
            collect(sources.pop(), model, batch)
    outputs, wanted = collect(Reference(), model, batch)
    for gradients in sources:
        got_outputs, got = collect(gradients, model, batch)
        torch.testing.assert_close(got_outputs.f, outputs.f, rtol=1e-5, atol=1e-6)
        for name, values in wanted.items():
            # Llama computes its norms and rotations in float32 whatever its weights are in.
            atol = (1e-5 if make is llama else 1e-9) * max(float(values.abs().max()), 1e-3)
            torch.testing.assert_close(
                got[name], values, rtol=1e-5, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize("make", [bert, gpt2, llama])
def test_hooks_are_chosen_and_pass_the_check(make):
    model, batch = build(make)
    names = [name for name, _ in model.named_parameters()]
    assert (
        check_first_batch(Auto(), model, model_state(model, None, "cpu"), Readout(), batch, names) == Hooked()
    )


T5_BIAS = "SelfAttention.relative_attention_bias.weight"


def seq2seq(attention):
    return hugging_face.t5(layers=2, attention=attention, use_cache=False)


def vit(attention):
    config = transformers.ViTConfig(
        num_hidden_layers=2, image_size=8, patch_size=4, attn_implementation=attention, **LAYERS
    )
    return transformers.ViTForImageClassification(config)


def mixtral(attention):
    return hugging_face.mixtral(layers=2, attention=attention, use_cache=False)


def with_attention(make):
    def build(attention):
        model = make()
        model.set_attn_implementation(attention)
        return model

    return build


# Model, what goes by a way of its own: modules with a local pass, and expanded parameters.
TABLE = {
    "bert": (with_attention(bert), [], []),
    "gpt2": (with_attention(gpt2), [], []),
    "llama": (with_attention(llama), [], []),
    "t5": (
        seq2seq,
        ["encoder.block.0.layer.0.SelfAttention", "decoder.block.0.layer.0.SelfAttention"],
        [],
    ),
    "vit": (vit, [], ["vit.embeddings.cls_token", "vit.embeddings.position_embeddings"]),
    "clip": (lambda attention: clip(attention=attention), ["", "vision_model.embeddings"], []),
    "mixtral": (
        mixtral,
        ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"],
        [],
    ),
}


class Any(Readout):
    """A smooth function of the logits, or of both embeddings."""

    def output(self, model, batch):
        out = model(**batch)
        values = getattr(out, "logits", None)
        if values is None:
            values = torch.cat([out.image_embeds, out.text_embeds], 1)
        values = values.flatten(1)
        return values.tanh() @ torch.arange(1, values.shape[1] + 1).to(values.dtype).sin()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", TABLE)
def test_which_way_each_model_takes(name, attention):
    make, modules, expanded = TABLE[name]
    model, batch = build(lambda: make(attention))
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    if name == "vit":
        batch = {"pixel_values": images}
    if name == "clip":
        batch["input_ids"][:, -1] = TOKENS["eos_token_id"]
        batch["pixel_values"] = images
    if name == "t5":
        batch["decoder_input_ids"] = torch.randint(3, 19, (3, 5))
    names = [name for name, _ in model.named_parameters()]
    state = model_state(model, None, "cpu")
    source = check_first_batch(Auto(), model, state, Any(), batch, names)
    assert isinstance(source, Hooked)
    assert sorted(local.module for local in source.local) == sorted(modules)
    assert list(source.expanded) == expanded
    got, wanted = (collect(g, model, batch, task=Any())[1] for g in (source, Reference()))
    for parameter, values in wanted.items():
        # Llama and its kin compute their norms and rotations in float32 whatever their weights are in.
        tolerance = 1e-5 if name in ("llama", "mixtral", "t5", "clip") else 1e-8
        atol = tolerance * max(float(values.abs().max()), 1e-3)
        torch.testing.assert_close(
            got[parameter], values, rtol=1e-5, atol=atol, msg=lambda m, name=parameter: f"{name}: {m}"
        )


def test_position_tables_without_batch_dimension_have_a_local_pass():
    """T5 looks up a table of relative positions for all examples at once."""
    model, batch = build(lambda: hugging_face.t5().encoder)
    del batch["attention_mask"]

    class Encoded(Readout):
        def output(self, model, batch):
            return model(**batch).last_hidden_state.flatten(1).tanh().sum(1)

    names = [name for name, _ in model.named_parameters() if "relative_attention_bias" not in name]
    state = model_state(model, None, "cpu")
    assert check_first_batch(Auto(), model, state, Encoded(), batch, names) == Hooked()
    every = [name for name, _ in model.named_parameters()]
    source = check_first_batch(Auto(), model, state, Encoded(), batch, every)
    assert [local.parameters for local in source.local] == [(f"block.0.layer.0.{T5_BIAS}",)]
