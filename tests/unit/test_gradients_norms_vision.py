"""Norms, scales and blocks of vision models: small classes that compute what timm's and torchvision's of the same names do."""

import functools
from dataclasses import dataclass
from types import FunctionType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trak.gradients import Auto, Hooked, Reference, check_first_batch, model_state
from trak.gradients.layers import RULES
from trak.testing.gradients import collect, snapshot
from trak.testing.models import Readout

DOUBLE = torch.float64


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small take longer in two
    yield
    torch.set_num_threads(threads)


def written_in(place):
    """The class, its forward as if it stood in another file."""

    def moved(kind):
        own = kind.forward
        forward = FunctionType(
            own.__code__,
            {**own.__globals__, "__name__": place},
            own.__name__,
            own.__defaults__,
            own.__closure__,
        )
        forward.__qualname__ = f"{kind.__name__}.forward"
        kind.forward = forward
        return kind

    return moved


@written_in("timm.layers.norm")
class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


@written_in("timm.layers.norm")
class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


@written_in("torchvision.models.convnext")
class LayerNorm2dOfTorchvision(nn.LayerNorm):
    def forward(self, x):
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


LayerNorm2dOfTorchvision.forward.__qualname__ = "LayerNorm2d.forward"


class LayerNorm2dNoBias(LayerNorm2d):
    """timm's MetaFormer: a subclass that leaves the forward alone."""

    def __init__(self, width):
        super().__init__(width, bias=False)


@written_in("timm.layers.norm")
class GroupNorm1(nn.GroupNorm):
    def forward(self, x):
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class _RMS(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.normalized_shape, self.eps = (width,), 1e-3
        self.weight = nn.Parameter(torch.ones(width))


@written_in("timm.layers.norm")
class RmsNorm(_RMS):
    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


@written_in("timm.layers.norm")
class RmsNorm2d(_RMS):
    def forward(self, x):
        x = x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + self.eps)
        return x * self.weight.reshape(1, -1, 1, 1)


class _Act:
    """What timm's norms with an activation have besides."""

    def __init__(self, *args, act=None, drop=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.drop = drop or nn.Identity()
        self.act = act or nn.SiLU(inplace=True)


@written_in("timm.layers.norm_act")
class BatchNormAct2d(_Act, nn.BatchNorm2d):
    def forward(self, x):
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return self.act(self.drop(x))


@written_in("timm.layers.norm_act")
class GroupNormAct(_Act, nn.GroupNorm):
    def forward(self, x):
        return self.act(self.drop(F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)))


@written_in("timm.layers.norm_act")
class LayerNormAct(_Act, nn.LayerNorm):
    def forward(self, x):
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return self.act(self.drop(x))


@written_in("timm.layers.norm_act")
class LayerNormAct2d(_Act, nn.LayerNorm):
    def forward(self, x):
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return self.act(self.drop(x.permute(0, 3, 1, 2)))


@written_in("timm.layers.norm_act")
class RmsNormAct2d(_Act, _RMS):
    def forward(self, x):
        x = x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + self.eps) * self.weight.reshape(1, -1, 1, 1)
        return self.act(self.drop(x))


@written_in("timm.layers.grn")
class GlobalResponseNorm(nn.Module):
    def __init__(self, width, channels_last=True):
        super().__init__()
        self.eps = 1e-3
        self.spatial_dim, self.channel_dim = ((1, 2), -1) if channels_last else ((2, 3), 1)
        self.wb_shape = (1, 1, 1, -1) if channels_last else (1, -1, 1, 1)
        self.weight, self.bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        norm = x.norm(p=2, dim=self.spatial_dim, keepdim=True)
        x_n = norm / (norm.mean(dim=self.channel_dim, keepdim=True) + self.eps)
        return x + torch.addcmul(self.bias.view(self.wb_shape), self.weight.view(self.wb_shape), x * x_n)


@written_in("timm.layers.layer_scale")
class LayerScale(nn.Module):
    def __init__(self, *shape, inplace=False):
        super().__init__()
        self.inplace, self.gamma = inplace, nn.Parameter(torch.ones(*shape))

    def forward(self, x):
        return x.mul_(self.gamma) if self.inplace else x * self.gamma


@written_in("timm.layers.layer_scale")
class LayerScale2d(LayerScale):
    def forward(self, x):
        gamma = self.gamma.view(1, -1, 1, 1)
        return x.mul_(gamma) if self.inplace else x * gamma


@written_in("timm.models.fastvit")
class LayerScale2dOfFastViT(LayerScale):
    def forward(self, x):
        return x.mul_(self.gamma) if self.inplace else x * self.gamma


LayerScale2dOfFastViT.forward.__qualname__ = "LayerScale2d.forward"


@written_in("timm.models.metaformer")
class Scale(nn.Module):
    def __init__(self, width, use_nchw=True):
        super().__init__()
        self.shape = (width, 1, 1) if use_nchw else (width,)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.scale.view(self.shape)


@written_in("timm.layers.linear")
class Linear(nn.Linear):
    def forward(self, input):
        return F.linear(input, self.weight, self.bias)


@written_in("timm.layers.conv2d_same")
class Conv2dSame(nn.Conv2d):
    def forward(self, x):
        pads = []
        for size, k, s, d in zip(x.shape[-2:], self.kernel_size, self.stride, self.dilation):
            total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
            pads = [total // 2, total - total // 2, *pads]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


@written_in("timm.models.convnext")
class ConvNeXtBlock(nn.Module):
    def __init__(self, use_conv_mlp=False, scaled=True):
        super().__init__()
        self.use_conv_mlp = use_conv_mlp
        self.conv_dw = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.norm = LayerNorm2d(4) if use_conv_mlp else LayerNorm(4)
        layers = (nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1)) if use_conv_mlp else (Linear(4, 6), nn.Linear(6, 4))
        self.mlp = nn.Sequential(layers[0], nn.GELU(), layers[1])
        self.gamma = nn.Parameter(torch.ones(4)) if scaled else None
        self.drop_path = self.shortcut = nn.Identity()

    def forward(self, x):
        shortcut = x
        x = self.conv_dw(x)
        x = self.mlp(self.norm(x if self.use_conv_mlp else x.permute(0, 2, 3, 1)))
        x = x if self.use_conv_mlp else x.permute(0, 3, 1, 2)
        if self.gamma is not None:
            x = x.mul(self.gamma.reshape(1, -1, 1, 1))
        return self.drop_path(x) + self.shortcut(shortcut)


@written_in("torchvision.models.convnext")
class CNBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), LayerNorm2d(4), nn.GELU())
        self.layer_scale = nn.Parameter(torch.ones(4, 1, 1))
        self.stochastic_depth = nn.Identity()

    def forward(self, input):
        result = self.stochastic_depth(self.layer_scale * self.block(input))
        result += input
        return result


@written_in("timm.models.inception_next")
class MetaNeXtBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.token_mixer = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.norm, self.mlp = nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 4, 1), nn.GELU())
        self.gamma, self.drop_path = nn.Parameter(torch.ones(4)), nn.Identity()

    def forward(self, x):
        branch = self.mlp(self.norm(self.token_mixer(x)))
        return self.drop_path(branch.mul(self.gamma.reshape(1, -1, 1, 1))) + x


class Attention(nn.Module):
    """Stands for one that may be given a bias."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, shared_rel_pos_bias=None):
        return self.layer(x if shared_rel_pos_bias is None else x + shared_rel_pos_bias).tanh()


class _Twofold(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2, self.attn = LayerNorm(4), LayerNorm(4), Attention()
        self.mlp = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))
        self.drop_path = self.drop_path1 = self.drop_path2 = nn.Identity()
        self.gamma_1, self.gamma_2 = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))


@written_in("timm.models.beit")
class Block(_Twofold):
    def forward(self, x, shared_rel_pos_bias=None):
        x = x + self.drop_path1(
            self.gamma_1 * self.attn(self.norm1(x), shared_rel_pos_bias=shared_rel_pos_bias)
        )
        return x + self.drop_path2(self.gamma_2 * self.mlp(self.norm2(x)))


@written_in("timm.models.cait")
class LayerScaleBlock(_Twofold):
    def forward(self, x):
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x)))
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))


class FromFirst(nn.Module):
    """Stands for one that gives a single token."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x).tanh().mean(1, keepdim=True)


@written_in("timm.models.cait")
class LayerScaleBlockClassAttn(_Twofold):
    def __init__(self):
        super().__init__()
        self.attn = FromFirst()

    def forward(self, x, x_cls):
        u = torch.cat((x_cls, x), dim=1)
        x_cls = x_cls + self.drop_path(self.gamma_1 * self.attn(self.norm1(u)))
        return x_cls + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x_cls)))


@written_in("timm.models.eva")
class EvaBlock(_Twofold):
    def __init__(self, scaled=True):
        super().__init__()
        self.attn = Rotated()
        if not scaled:
            self.gamma_1 = self.gamma_2 = None

    def forward(self, x, rope=None, attn_mask=None, is_causal=False):
        x_attn = self.attn(self.norm1(x), rope=rope, attn_mask=attn_mask, is_causal=is_causal)
        x = x + self.drop_path1(x_attn if self.gamma_1 is None else self.gamma_1 * x_attn)
        x_mlp = self.mlp(self.norm2(x))
        return x + self.drop_path2(x_mlp if self.gamma_2 is None else self.gamma_2 * x_mlp)


class Rotated(nn.Module):
    """Stands for attention with rotary positions and a mask."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, rope=None, attn_mask=None, is_causal=False):
        x = x if rope is None else x * rope
        return self.layer(x if attn_mask is None else x + attn_mask).tanh().cumsum(1 if is_causal else -1)


class Called(nn.Module):
    """A block with further arguments."""

    def __init__(self, block, call):
        super().__init__()
        self.block, self.call = block, call

    def forward(self, x):
        return self.call(self.block, x)


def on_images(*layers, twice=False):
    """Between layers that have rules."""
    first, last = nn.Conv2d(2, 4, 2), nn.Conv2d(4, 2, 2)
    return lambda: nn.Sequential(first, *(layer for make in layers for layer in [make()] * (1 + twice)), last)


def on_vectors(make):
    return lambda: nn.Sequential(nn.Linear(2, 4), nn.Tanh(), make(), nn.Linear(4, 3))


class LastToFirst(nn.Module):
    """A layer of channels that come last, for images."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


IMAGES = {
    "LayerNorm2d": on_images(lambda: LayerNorm2d(4, eps=1e-3)),
    "LayerNorm2d, no bias": on_images(lambda: LayerNorm2dNoBias(4)),
    "LayerNorm2d, torchvision": on_images(lambda: LayerNorm2dOfTorchvision(4)),
    "LayerNorm, channels last": on_images(lambda: LastToFirst(LayerNorm(4))),
    "GroupNorm1": on_images(lambda: GroupNorm1(1, 4)),
    "RmsNorm2d": on_images(lambda: RmsNorm2d(4)),
    "BatchNormAct2d": on_images(lambda: BatchNormAct2d(4, eps=1e-2)),
    "BatchNormAct2d, no activation": on_images(lambda: BatchNormAct2d(4, act=nn.Identity())),
    "BatchNormAct2d, learned activation": on_images(lambda: BatchNormAct2d(4, act=nn.PReLU(4))),
    "BatchNormAct2d, ReLU in place": on_images(lambda: BatchNormAct2d(4, act=nn.ReLU(inplace=True))),
    "BatchNormAct2d, drop": on_images(lambda: BatchNormAct2d(4, drop=nn.AvgPool2d(2, 1, 1))),
    "BatchNormAct2d, used twice": on_images(lambda: BatchNormAct2d(4), twice=True),
    "GroupNormAct": on_images(lambda: GroupNormAct(2, 4)),
    "LayerNormAct2d": on_images(lambda: LayerNormAct2d(4)),
    "RmsNormAct2d": on_images(lambda: RmsNormAct2d(4)),
    "GlobalResponseNorm": on_images(lambda: LastToFirst(GlobalResponseNorm(4))),
    "GlobalResponseNorm, channels first": on_images(lambda: GlobalResponseNorm(4, channels_last=False)),
    "LayerScale2d": on_images(lambda: LayerScale2d(4)),
    "LayerScale2d, of images": on_images(lambda: LayerScale2dOfFastViT(4, 1, 1)),
    "Scale": on_images(lambda: Scale(4)),
    "Scale, channels last": on_images(lambda: LastToFirst(Scale(4, use_nchw=False))),
    "LayerScale, channels last": on_images(lambda: LastToFirst(LayerScale(4))),
    "Conv2dSame": on_images(lambda: Conv2dSame(4, 4, 3, 2)),
    "Conv2dSame, oblong": on_images(lambda: Conv2dSame(4, 4, (2, 3), (3, 1), dilation=(1, 2), groups=2)),
    "ConvNeXtBlock": on_images(ConvNeXtBlock, ConvNeXtBlock),
    "ConvNeXtBlock, convolutions": on_images(lambda: ConvNeXtBlock(use_conv_mlp=True)),
    "ConvNeXtBlock, no scale": on_images(lambda: ConvNeXtBlock(scaled=False)),
    "CNBlock": on_images(CNBlock, CNBlock),
    "MetaNeXtBlock": on_images(MetaNeXtBlock),
}
VECTORS = {
    "LayerNorm": on_vectors(lambda: LayerNorm(4)),
    "LayerNormAct": on_vectors(lambda: LayerNormAct(4)),
    "RmsNorm": on_vectors(lambda: RmsNorm(4)),
    "LayerScale": on_vectors(lambda: LayerScale(4)),
    "Linear": on_vectors(lambda: Linear(4, 4)),
    "beit.Block": on_vectors(Block),
    "cait.LayerScaleBlock": on_vectors(LayerScaleBlock),
    "cait.LayerScaleBlockClassAttn": on_vectors(
        lambda: Called(LayerScaleBlockClassAttn(), lambda block, x: block(x[:, 1:], x[:, :1]))
    ),
    "eva.EvaBlock": on_vectors(EvaBlock),
    "eva.EvaBlock, arguments": on_vectors(
        lambda: Called(EvaBlock(), lambda block, x: block(x, 2.0, attn_mask=0.5, is_causal=True))
    ),
    "eva.EvaBlock, no scales": on_vectors(lambda: EvaBlock(scaled=False)),
    "beit.Block, bias": on_vectors(
        lambda: Called(Block(), lambda block, x: block(x, shared_rel_pos_bias=0.5))
    ),
}
CASES = IMAGES | VECTORS


def build(name, size=3):
    torch.manual_seed(0)
    model = CASES[name]()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    for key, buffer in model.named_buffers():
        if key.endswith(("running_mean", "running_var")):
            nn.init.uniform_(buffer, 0.5, 1.5)
    inputs = torch.randn(size, 2, 6, 5) if name in IMAGES else torch.randn(size, 5, 2)
    return model.double().eval(), (inputs.double(),)


def assert_right(got, wanted):
    for name, values in wanted.items():
        torch.testing.assert_close(
            got[name],
            values,
            rtol=1e-10,
            atol=1e-10 * float(values.abs().max()),
            msg=lambda m, name=name: f"{name}: {m}",
        )


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_one_example_at_a_time(name, size):
    model, batch = build(name, size)
    before = snapshot(model)
    outputs, wanted = collect(Reference(), model, batch)
    got_outputs, got = collect(Hooked(), model, batch)
    assert_right({"f": got_outputs.f, **got}, {"f": outputs.f, **wanted})
    assert snapshot(model) == before


@pytest.mark.parametrize("name", CASES)
def test_hooks_are_chosen_and_pass_the_check(name):
    model, batch = build(name)
    names = [name for name, _ in model.named_parameters()]
    assert (
        check_first_batch(Auto(), model, model_state(model, None, "cpu"), Readout(), batch, names) == Hooked()
    )


@pytest.mark.parametrize("name", ["BatchNormAct2d", "LayerNorm2d", "ConvNeXtBlock", "cait.LayerScaleBlock"])
def test_each_parameter_alone(name):
    model, batch = build(name)
    every = collect(Hooked(), model, batch)[1]
    for parameter in every:
        assert_right(collect(Hooked(), model, batch, [parameter])[1], {parameter: every[parameter]})


@pytest.mark.parametrize(
    "name", ["BatchNormAct2d", "LayerNormAct2d", "LayerNorm2d", "LayerScale2d", "CNBlock"]
)
def test_channels_last_in_memory_and_several_images_per_example(name):
    class Frames(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            frames = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
            return self.inner(frames).unflatten(0, x.shape[:2])

    model, (images,) = build(name, 6)
    model, batch = Frames(model), (images.unflatten(0, (3, 2)),)
    assert_right(collect(Hooked(), model, batch)[1], collect(Reference(), model, batch)[1])


def test_frozen_layers_below():
    """The norm's input then requires no gradient."""
    model, batch = build("BatchNormAct2d")
    names = [name for name, _ in model.named_parameters() if not name.startswith("0.")]
    wanted = collect(Reference(), model, batch, names)[1]
    assert_right(collect(Hooked(), model.requires_grad_(False), batch, names)[1], wanted)


def test_users_hooks_are_called_on_what_is_computed_in_steps():
    model, batch = build("BatchNormAct2d")
    model[1].register_forward_hook(lambda module, args, output: 2 * output)
    model[1].act.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    outputs, wanted = collect(Reference(), model, batch)
    got_outputs, got = collect(Hooked(), model, batch)
    assert_right({"f": got_outputs.f, **got}, {"f": outputs.f, **wanted})


@dataclass(frozen=True)
class Half(Readout):
    def output(self, model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().output(model, batch).float()


@pytest.mark.parametrize(
    "name",
    ["BatchNormAct2d", "GroupNormAct", "LayerNormAct2d", "LayerNorm2d", "RmsNormAct2d", "ConvNeXtBlock"],
)
def test_under_autocast(name):
    model, (images,) = build(name)
    model, batch = model.float(), (images.float(),)
    outputs, wanted = collect(Reference(), model, batch, task=Half())
    got_outputs, got = collect(Hooked(), model, batch, task=Half())
    torch.testing.assert_close(got_outputs.f, outputs.f, rtol=3e-2, atol=3e-2)
    flat, expected = (torch.cat([found[name].flatten(1) for name in wanted], 1) for found in (got, wanted))
    assert flat.dtype == torch.float32
    assert float((flat - expected).norm() / expected.norm()) < 3e-2


def covered(module):
    return frozenset().union(*(rule.covers(module) for rule in RULES))


def test_what_is_covered():
    assert covered(BatchNormAct2d(4)) == {"weight", "bias"}
    assert covered(BatchNormAct2d(4, act=nn.PReLU())) == {"weight", "bias"}
    assert covered(LayerNorm2dNoBias(4)) == {"weight"}
    assert covered(BatchNormAct2d(4, affine=False)) == frozenset()
    assert covered(LayerScale2d(4)) == {"gamma"}
    assert covered(_Twofold()) == frozenset()


def twice(kind):
    """A subclass that computes something else."""

    class Changed(kind):
        def forward(self, x):
            return 2 * super().forward(x)

    return Changed


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (LayerNorm2d, (4,)),
        (BatchNormAct2d, (4,)),
        (GlobalResponseNorm, (4,)),
        (LayerScale, (4,)),
        (Linear, (4, 4)),
        (Conv2dSame, (4, 4, 3)),
        (ConvNeXtBlock, ()),
    ],
)
def test_another_forward_is_left_to_a_pass_of_its_own(kind, arguments):
    assert covered(kind(*arguments))
    assert not covered(twice(kind)(*arguments))

    patched = kind(*arguments)
    patched.forward = lambda x: x
    assert not covered(patched)

    class Decorated(kind):
        forward = functools.wraps(kind.forward)(lambda self, x: 3 * kind.forward(self, x))

    assert not covered(Decorated(*arguments))

    class Elsewhere(kind):
        forward = FunctionType(
            kind.forward.__code__, {"__name__": "mine"}, "forward", None, kind.forward.__closure__
        )

    Elsewhere.forward.__qualname__ = kind.forward.__qualname__
    assert not covered(Elsewhere(*arguments))


def test_changed_subclasses_still_get_the_right_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 2), twice(BatchNormAct2d)(4), nn.Conv2d(4, 2, 2)).double().eval()
    batch = (torch.randn(3, 2, 5, 5, dtype=DOUBLE),)
    names = [name for name, _ in model.named_parameters()]
    source = check_first_batch(Auto(), model, model_state(model, None, "cpu"), Readout(), batch, names)
    assert [local.module for local in source.local] == ["1"]
    assert_right(collect(source, model, batch)[1], collect(Reference(), model, batch)[1])


def test_what_only_looks_alike():
    in_place = LayerScale(4, inplace=True)
    assert not covered(in_place)  # its input is gone when the backward pass comes by
    fast = LayerNorm2d(4)
    fast._fast_norm = True
    assert not covered(fast)
    without_statistics = BatchNormAct2d(4, track_running_stats=False)
    assert not covered(without_statistics)
    without_drop = BatchNormAct2d(4)
    del without_drop.drop
    assert not covered(without_drop)
    half = LayerScaleBlock()
    half.gamma_2 = None
    assert covered(half).isdisjoint({"gamma_1", "gamma_2"})
    without_shortcut = ConvNeXtBlock()
    del without_shortcut.shortcut
    assert "gamma" not in covered(without_shortcut)


def test_a_rule_that_is_wrong_does_not_pass_the_check(monkeypatch):
    """Should a library change what a class computes, the first batch shows it and a local pass follows."""
    model, batch = build("LayerScale2d")
    names, state = [name for name, _ in model.named_parameters()], model_state(model, None, "cpu")
    changed = FunctionType(
        (lambda self, x: x * self.gamma.view(1, -1, 1, 1).exp()).__code__,
        LayerScale2d.forward.__globals__,
        "forward",
    )
    changed.__qualname__ = "LayerScale2d.forward"
    monkeypatch.setattr(LayerScale2d, "forward", changed)
    assert covered(model[1]) == {"gamma"}
    source = check_first_batch(Auto(), model, state, Readout(), batch, names)
    assert source.local
    assert_right(collect(source, model, batch)[1], collect(Reference(), model, batch)[1])
