"""Image models of timm, torchvision and Hugging Face whose norms and scales have rules."""

import pytest
import torch
from torch import nn

import trak
from trak.gradients import Auto, Hooked, Reference, check_first_batch, model_state
from trak.testing.gradients import collect

DOUBLE = torch.float64


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small take longer in two
    yield
    torch.set_num_threads(threads)


def assert_no_local_pass_and_right(model, batch, names):
    task, state = trak.ImageClassification(), model_state(model, None, "cpu")
    source = check_first_batch(Auto(), model, state, task, batch, names)
    assert isinstance(source, Hooked)
    assert source.local == ()
    got, wanted = (collect(g, model, batch, names, task=task)[1] for g in (source, Reference()))
    scale = max(float(values.abs().max()) for values in wanted.values())
    for name, values in wanted.items():
        atol = 1e-9 * max(float(values.abs().max()), 1e-6 * scale)
        torch.testing.assert_close(
            got[name], values, rtol=1e-7, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


def transformers_model(kind):
    transformers = pytest.importorskip("transformers")
    small = {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    if kind == "dinov2":
        return transformers.Dinov2ForImageClassification(
            transformers.Dinov2Config(**small, layerscale_value=0.5)
        )
    sizes = {"hidden_sizes": [4, 8], "depths": [1, 2], "num_stages": 2, "patch_size": 2}
    family = {"convnext": "ConvNext", "convnextv2": "ConvNextV2"}[kind]
    scale = {"layer_scale_init_value": 0.5} if kind == "convnext" else {}
    config = getattr(transformers, f"{family}Config")(**sizes, **scale)
    return getattr(transformers, f"{family}ForImageClassification")(config)


@pytest.mark.parametrize("kind", ["dinov2", "convnext", "convnextv2"])
def test_image_models_of_hugging_face(kind):
    torch.manual_seed(0)
    model = transformers_model(kind).double().eval()
    batch = {"pixel_values": torch.randn(3, 3, 8, 8, dtype=DOUBLE), "labels": torch.tensor([0, 1, 1])}
    names = [name for name, _ in model.named_parameters() if "mask_token" not in name]
    assert_no_local_pass_and_right(model, batch, names)


VISION = {
    "efficientnet_b0": ("timm", {}),
    "tf_efficientnet_lite0": ("timm", {}),
    "mobilenetv3_small_050": ("timm", {}),
    "regnetz_005": ("timm", {}),
    "resnetv2_18": ("timm", {}),
    "resnetv2_50d_gn": ("timm", {}),
    "convnext_atto": ("timm", {}),
    "convnext_atto_rms": ("timm", {}),
    "convnextv2_atto": ("timm", {}),
    "inception_next_atto": ("timm", {}),
    "poolformer_s12": ("timm", {}),
    "deit3_small_patch16_224": ("timm", {"img_size": 32, "depth": 2}),
    "cait_xxs24_224": ("timm", {"img_size": 32, "depth": 2}),
    "vit_small_patch14_dinov2": ("timm", {"img_size": 28, "depth": 2}),
    "vit_small_patch16_dinov3": ("timm", {"img_size": 32, "depth": 2}),
    "convnext_tiny": ("torchvision", {}),
}


@pytest.mark.parametrize("name", VISION)
@pytest.mark.filterwarnings("default")
def test_models_of_timm_and_torchvision_need_no_local_pass(name):
    library, options = VISION[name]
    package = pytest.importorskip(library, reason=f"needs {library}: make test-wide")
    create = package.create_model if library == "timm" else getattr(package.models, name)
    torch.manual_seed(0)
    model = (
        (create(name, num_classes=3, **options) if library == "timm" else create(num_classes=3))
        .double()
        .eval()
    )
    for parameter in model.parameters():
        if parameter.ndim == 1:
            # Layer scales begin near zero, and with them all that their blocks do.
            nn.init.normal_(parameter, 0.7, std=0.3)
    side = options.get("img_size", 32)
    batch = (torch.randn(2, 3, side, side, dtype=DOUBLE), torch.tensor([0, 1]))
    assert_no_local_pass_and_right(model, batch, list(trak.gradients.select_parameters(model)))
