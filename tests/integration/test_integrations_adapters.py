"""PEFT adapters as they are: attributed through, saved, and read back; quantised bases; CLIP and image models of other libraries."""

import copy
import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trak
from trak.integrations.trajectory import read_trajectory
from trak.testing import hugging_face
from trak.testing.gradients import collect

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
# As a user has them: attention of the library's own choice.
bert, gpt2, t5 = (
    partial(make, vocabulary=40, attention=None, **options)
    for make, options in (
        (hugging_face.bert, {"layers": 2}),
        (hugging_face.gpt2, {"layers": 2, "use_cache": False}),
        (hugging_face.t5, {"use_cache": False}),
    )
)


def batch_for(task, size=6):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 40, (size, 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    labels = {"text_classification": torch.arange(size) % 2, "causal_lm": ids, "seq2seq_lm": ids[:, :4]}[task]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def adapted(make, config, seed=0):
    """With adapters that do something: they begin as zero."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(make(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.3)
    return model


LORA = {
    "bert": (bert, "text_classification", {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}),
    "gpt2": (
        gpt2,
        "causal_lm",
        {"task_type": "CAUSAL_LM", "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    ),
    "t5": (t5, "seq2seq_lm", {"task_type": "SEQ_2_SEQ_LM", "target_modules": ["q", "v"]}),
}


def lora(name, **options):
    make, task, settings = LORA[name]
    return make, task, peft.LoraConfig(r=2, **settings, **options)


def attribute(model, task, **options):
    data = batch_for(task)
    targets = {key: value[:2] for key, value in data.items()}
    settings = {"projection": trak.Identity(), "damping": 1.0, "device": "cpu", "batch_size": 4, **options}
    return trak.attribute(model, data, targets, task=task, **settings).scores.tensor()


@pytest.mark.parametrize("name", LORA)
def test_low_rank_adapters_of_real_models(name):
    """Only the adapter is attributed through (and the classifier's head, which is trained along), by layer rules alone."""
    make, task, config = lora(name, lora_dropout=0.1)
    model = adapted(make, config).double()
    names = list(trak.gradients.select_parameters(model))
    assert all("lora_" in name or "modules_to_save" in name for name in names) and len(names) >= 8
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = attribute(model, task, gradients="hooked")
    wanted = attribute(model, task, gradients="reference")
    tolerance = 1e-5 if name == "t5" else 1e-9  # T5 computes its norms in float32
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


KINDS = {
    "DoRA": lambda: peft.LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=["query", "output.dense"], use_dora=True
    ),
    "embedding": lambda: peft.LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=["query", "word_embeddings"]
    ),
    "IA3": lambda: peft.IA3Config(
        task_type="SEQ_CLS", target_modules=["value", "output.dense"], feedforward_modules=["output.dense"]
    ),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_adapters(kind):
    model = adapted(bert, KINDS[kind]()).double()
    found, wanted = (
        attribute(model, "text_classification"),
        attribute(model, "text_classification", gradients="reference"),
    )
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


def test_prompts_are_taken_one_example_at_a_time(caplog):
    """A table looked up for the whole batch at once: no layer rule, and the model looks at values of its mask."""
    model = adapted(bert, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)).double()
    found = attribute(model, "text_classification")
    assert "Reference is slower" in caplog.text
    wanted = attribute(model, "text_classification", gradients="reference")
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


class TestSavedAdapters:
    """Folders as peft and its trainers write them."""

    @pytest.mark.parametrize(
        "name", ["bert", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "t5"))]
    )
    def test_reading_one_gives_the_model_it_was_saved_from(self, name, tmp_path):
        make, task, config = lora(name)
        base = make()
        model, other = (adapted(lambda: copy.deepcopy(base), config, seed=seed) for seed in (1, 2))
        model.save_pretrained(tmp_path)
        before = trak.checkpoint_hash(trak.load_checkpoint(other))
        state = trak.load_checkpoint(tmp_path, model=other)
        own = dict(model.named_parameters())
        assert set(state) >= set(own)
        for parameter, value in own.items():
            torch.testing.assert_close(state[parameter], value.detach(), rtol=0, atol=0)
        # The base is the model's own memory, and nothing in the model has changed.
        frozen = next(key for key, value in other.named_parameters() if not value.requires_grad)
        assert state[frozen].data_ptr() == dict(other.named_parameters())[frozen].data_ptr()
        assert trak.checkpoint_hash(trak.load_checkpoint(other)) == before
        found = attribute(other, task, checkpoints=[lambda: trak.load_checkpoint(tmp_path, model=other)])
        torch.testing.assert_close(found, attribute(model, task))

    def test_a_run_of_them(self, tmp_path):
        make, task, config = lora("bert")
        base = make()
        models = [adapted(lambda: copy.deepcopy(base), config, seed=seed) for seed in (1, 2)]
        for step, model in zip((500, 1000), models):
            model.save_pretrained(tmp_path / f"checkpoint-{step}")
            torch.save({"lr": 0.1}, tmp_path / f"checkpoint-{step}" / "optimizer.pt")
        found = attribute(models[0], task, checkpoints=trak.list_checkpoints(tmp_path, model=models[0]))
        wanted = attribute(models[0], task, checkpoints=[dict(model.state_dict()) for model in models])
        torch.testing.assert_close(found, wanted)

    @pytest.mark.parametrize("kind", ["prefix", "IA3"])
    def test_other_kinds(self, kind, tmp_path):
        base = bert()
        model, other = (adapted(lambda: copy.deepcopy(base), KINDS[kind](), seed=seed) for seed in (1, 2))
        model.save_pretrained(tmp_path)
        state, own = trak.load_checkpoint(tmp_path, model=other), dict(model.named_parameters())
        for name, parameter in own.items():
            torch.testing.assert_close(state[name], parameter.detach(), rtol=0, atol=0)

    def test_another_scale_is_another_adapter(self, tmp_path):
        make, _, config = lora("bert")
        adapted(make, config).save_pretrained(tmp_path)
        other = adapted(make, lora("bert", lora_alpha=16)[2])
        with pytest.raises(trak.CheckpointError, match="lora_alpha 8 there and 16 in the model"):
            trak.load_checkpoint(tmp_path, model=other)

    def test_other_tensors(self, tmp_path):
        make, _, config = lora("bert")
        adapted(make, config).save_pretrained(tmp_path)
        other = adapted(make, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
        with pytest.raises(
            trak.CheckpointError, match=r"tensors are not in the model's adapter, first '.*value.*lora_A"
        ):
            trak.load_checkpoint(tmp_path, model=other)

    def test_a_model_without_adapter(self, tmp_path):
        make, _, config = lora("bert")
        adapted(make, config).save_pretrained(tmp_path)
        with pytest.raises(
            trak.CheckpointError,
            match="BertForSequenceClassification has none: pass the model with its adapter",
        ):
            trak.load_checkpoint(tmp_path, model=make())

    def test_several_active_adapters(self, tmp_path):
        make, _, config = lora("gpt2")
        model = adapted(make, config)
        model.save_pretrained(tmp_path)
        model.add_adapter("second", config)
        model.base_model.set_adapter(["default", "second"])
        with pytest.raises(trak.CheckpointError, match=r"call model\.set_adapter"):
            trak.load_checkpoint(tmp_path, model=model)
        model.set_adapter("second")
        state = trak.load_checkpoint(tmp_path, model=model)
        own = model.state_dict()
        one, two = (
            f"base_model.model.transformer.h.0.attn.c_attn.lora_A.{which}.weight"
            for which in ("default", "second")
        )
        assert torch.equal(state[two], own[one]) and not torch.equal(own[two], own[one])


def test_the_callback_keeps_trainable_parameters_alone(tmp_path):
    datasets = pytest.importorskip("datasets")
    from trak.integrations.transformers import CheckpointCallback, trainer_rows

    make, task, config = lora("gpt2")
    model = adapted(make, config)
    start = copy.deepcopy(model)
    data = datasets.Dataset.from_dict({key: value.tolist() for key, value in batch_for(task).items()})
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"), num_train_epochs=2, learning_rate=0.1, save_strategy="epoch", report_to=[], use_cpu=True,
        disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False, per_device_train_batch_size=3,
    )  # fmt: skip
    callback = CheckpointCallback(tmp_path / "run", trainable_only=True)
    trainer = transformers.Trainer(
        model=model,
        args=args,
        train_dataset=data,
        data_collator=transformers.default_data_collator,
        callbacks=[callback],
    )
    trainer.train()
    run = read_trajectory(tmp_path / "run", model=start)
    stored = trak.load_checkpoint(tmp_path / "run" / "step-00000004.safetensors")
    assert sorted(stored) == sorted(key for key, value in model.named_parameters() if value.requires_grad)
    assert trak.checkpoint_hash(run.checkpoints[-1]()) == trak.checkpoint_hash(dict(_canonical(model)))
    theirs = trak.list_checkpoints(tmp_path / "out", model=start)
    assert [trak.checkpoint_hash(own()) for own in run.checkpoints] == [
        trak.checkpoint_hash(other()) for other in theirs
    ]
    targets = trainer_rows(trainer, data.select(range(2)))
    settings = {
        "task": task,
        "checkpoints": run.checkpoints,
        "projection": trak.Identity(),
        "damping": 1.0,
        "device": "cpu",
    }
    found = trak.attribute(start, trainer_rows(trainer), targets, **settings).scores.tensor()
    wanted = trak.attribute(
        start, trainer_rows(trainer), targets, gradients="reference", **settings
    ).scores.tensor()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def _canonical(model):
    yield from model.named_parameters()
    saved = set(model.state_dict())
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


class _Dequantised(torch.autograd.Function):
    """As kernels for quantised weights have it: a gradient of the inputs, and none of anything else."""

    @staticmethod
    def forward(ctx, inputs: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        assert not weight.requires_grad and not weight.is_floating_point()
        ctx.save_for_backward(weight, scale)
        return inputs @ (weight.to(inputs.dtype) * scale.to(inputs.dtype)[:, None]).T

    @staticmethod
    def backward(ctx, gradient: Tensor):
        weight, scale = ctx.saved_tensors
        return gradient @ (weight.to(gradient.dtype) * scale.to(gradient.dtype)[:, None]), None, None


class QuantisedLinear(nn.Linear):
    """Stands in for 8-bit layers: whole numbers in the place of the weight, and state beside it under names that begin with its own."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__(source.in_features, source.out_features, bias=False)
        scale = source.weight.detach().abs().amax(1) / 127
        weight = (source.weight.detach() / scale[:, None]).round().to(torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return _Dequantised.apply(inputs, self.weight, self.scale)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight.scale"] = self.scale


def quantised(model):
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and name in ("query", "key", "value"):
                setattr(module, name, QuantisedLinear(child))
    return model


@pytest.mark.parametrize(
    "targets", [["query", "value"], ["output.dense"]], ids=["on quantised layers", "above them"]
)
def test_adapters_on_a_quantised_base(targets, tmp_path):
    """Gradients flow through the quantised layers and are never asked of them."""
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=targets)
    model = adapted(lambda: quantised(bert()), config)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.double()
    names = list(trak.gradients.select_parameters(model))
    assert not any(name.endswith("base_layer.weight") for name in names)
    found = attribute(model, "text_classification", gradients="hooked")
    torch.testing.assert_close(
        found, attribute(model, "text_classification", gradients="reference"), rtol=1e-9, atol=1e-10
    )
    model.save_pretrained(tmp_path)
    again = attribute(
        model, "text_classification", checkpoints=[lambda: trak.load_checkpoint(tmp_path, model=model)]
    )
    torch.testing.assert_close(found, again)


class OpenClip(nn.Module):
    """The signature of open_clip's models: images and texts in, features of any length out, and the scale's logarithm."""

    def __init__(self):
        super().__init__()
        self.visual = nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), nn.Flatten(), nn.GELU(), nn.Linear(16, 5))
        self.token_embedding = nn.Embedding(20, 6)
        self.ln_final = nn.LayerNorm(6)
        self.text_projection = nn.Parameter(torch.randn(6, 5))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, image, normalize: bool = False):
        features = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text, normalize: bool = False):
        hidden = self.ln_final(self.token_embedding(text))
        # The features of a text are those at its end, the token with the highest number.
        features = hidden[torch.arange(len(text)), text.argmax(-1)] @ self.text_projection
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, image=None, text=None):
        return (
            self.encode_image(image, normalize=True),
            self.encode_text(text, normalize=True),
            self.logit_scale.exp(),
        )


def open_clip_model():
    try:
        import open_clip
    except ImportError:
        return OpenClip(), 8, 20
    vision = {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1}
    return open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text), 16, 64


def test_open_clip_pairs_from_end_to_end():
    torch.manual_seed(0)
    model, side, vocabulary = open_clip_model()
    model = model.double()
    pairs = (torch.randn(8, 3, side, side, dtype=torch.float64), torch.randint(1, vocabulary, (8, 8)))
    task = trak.ContrastivePairs(pairs, encoder="open_clip", num_negatives=6)
    settings = {"task": task, "damping": 1.0, "device": "cpu"}
    found = {
        gradients: trak.attribute(
            model, pairs, tuple(part[:2] for part in pairs), gradients=gradients, **settings
        ).scores.tensor()
        for gradients in ("auto", "reference")
    }
    torch.testing.assert_close(found["auto"], found["reference"], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("library", "make"),
    [
        ("timm", lambda timm: timm.create_model("resnet10t", num_classes=3)),
        ("timm", lambda timm: timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=3, depth=2)),
        ("timm", lambda timm: timm.create_model("levit_128s", img_size=64, num_classes=3)),
        ("timm", lambda timm: timm.create_model("xcit_nano_12_p16_224", num_classes=3)),
        ("timm", lambda timm: timm.create_model("efficientvit_b0", num_classes=3)),
        ("torchvision", lambda torchvision: torchvision.models.resnet18(num_classes=3)),
        ("torchvision", lambda torchvision: torchvision.models.shufflenet_v2_x0_5(num_classes=3)),
    ],
    ids=[
        "timm ResNet",
        "timm ViT",
        "timm LeViT",
        "timm XCiT",
        "timm EfficientViT",
        "torchvision ResNet",
        "torchvision ShuffleNet",
    ],
)
@pytest.mark.filterwarnings("default")
def test_image_models_of_other_libraries(library, make):
    torch.manual_seed(0)
    model = make(pytest.importorskip(library)).double().eval()
    batch = (torch.randn(3, 3, 64, 64, dtype=torch.float64), torch.tensor([0, 1, 2]))
    task = trak.ImageClassification()
    names = list(trak.gradients.select_parameters(model))
    state = trak.gradients.model_state(model, None, "cpu")
    source = trak.gradients.check_first_batch(trak.Auto(), model, state, task, batch, names)
    got, wanted = (collect(gradients, model, batch, task=task)[1] for gradients in (source, trak.Reference()))
    for name, values in wanted.items():
        torch.testing.assert_close(
            got[name], values, rtol=1e-7, atol=1e-9 * max(float(values.abs().max()), 1e-3)
        )


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
@pytest.mark.filterwarnings("default")
def test_adapters_on_weights_quantised_by_bitsandbytes(tmp_path, kind):
    layers = pytest.importorskip("bitsandbytes").nn
    torch.manual_seed(0)
    plain = hugging_face.llama(vocabulary=64)
    for name, module in list(plain.named_modules()):
        for key, layer in module.named_children():
            if isinstance(layer, torch.nn.Linear) and key != "lm_head":
                width = (layer.in_features, layer.out_features)
                if kind == "4bit":
                    new = layers.Linear4bit(*width, bias=False, quant_type="nf4", compute_dtype=torch.float32)
                    new.weight = layers.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
                else:
                    new = layers.Linear8bitLt(*width, bias=False, has_fp16_weights=False)
                    new.weight = layers.Int8Params(
                        layer.weight.data, requires_grad=False, has_fp16_weights=False
                    )
                setattr(plain.get_submodule(name), key, new)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(plain.to("cpu"), config).eval()
    ids = torch.randint(0, 64, (6, 5))
    data = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    targets = {name: part[:2] for name, part in data.items()}
    torch.save(model.state_dict(), tmp_path / "model.pt")
    settings = {"task": "causal_lm", "device": "cpu", "damping": 1.0, "projection": trak.Identity()}
    found = [
        trak.attribute(
            model, data, targets, gradients=gradients, checkpoints=checkpoints, **settings
        ).scores.tensor()
        for gradients, checkpoints in (("auto", None), ("reference", None), ("auto", [tmp_path / "model.pt"]))
    ]
    tolerance = {"rtol": 1e-3, "atol": 1e-5} if kind == "4bit" else {"rtol": 2e-2, "atol": 1e-3}
    torch.testing.assert_close(found[0], found[1], **tolerance)
    torch.testing.assert_close(found[0], found[2])


def test_the_saved_config_is_read(tmp_path):
    make, _, config = lora("bert")
    model = adapted(make, config)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2
    (tmp_path / "adapter_config.json").write_text("no JSON")
    with pytest.raises(trak.CheckpointError, match="no adapter's config"):
        trak.load_checkpoint(tmp_path, model=model)
