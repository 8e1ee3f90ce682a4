"""Tiny models for tests: every kind of layer, the ways models use them, and models that cannot be attributed.

for case in CASES:
    model, batch = case.build()
    ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trak.tasks.base import Task


@dataclass(frozen=True)
class Readout(Task):
    """f = a fixed smooth function of all of a model's outputs: no output has a constant or zero gradient."""

    def output(self, model: nn.Module, batch: Any) -> Tensor:
        """Σ_j sin(1 + j) tanh(y_j): [B]. Mappings are passed as keyword arguments.

        `.logits` is read where there is one.
        """
        outputs = model(**batch) if isinstance(batch, Mapping) else model(batch[0])
        values = getattr(outputs, "logits", outputs).flatten(1)
        weights = torch.arange(1, values.shape[1] + 1, device=values.device).to(values.dtype).sin()
        return values.tanh() @ weights


@dataclass(frozen=True)
class Case:
    """A model and its inputs.

    Attributes:
        name: for test ids.
        model: builds it.
        inputs: builds inputs for that many examples.
        hooked: whether layer rules cover all its parameters, and give the right gradients.
    """

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    hooked: bool = True

    def build(
        self, *, batch_size: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0
    ) -> tuple[nn.Module, tuple[Tensor]]:
        """(model, batch): random weights, running statistics and inputs, the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.model()
            inputs = self.inputs(batch_size)
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.5)
            for name, buffer in model.named_buffers():
                if name.endswith(("running_mean", "running_var")):
                    nn.init.uniform_(buffer, 0.5, 1.5)
        return model.to(dtype), (inputs.to(dtype) if inputs.is_floating_point() else inputs,)


class Twice(nn.Module):
    """The same two layers, applied in turn a few times, with residual connections."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.norm = nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, 5] -> [B, T, 5]."""
        for _ in range(3):
            x = x + self.layer(self.norm(x)).sin()
        return x


class TiedLanguageModel(nn.Module):
    """Token and position embeddings, attention written by hand, and a head that shares the tokens' table.

    positions: "batch" looks positions up for [1, T] indices as Hugging Face models do, "flat" for [T].
    """

    def __init__(
        self, *, positions: str = "batch", vocabulary: int = 11, width: int = 8, length: int = 6
    ) -> None:
        super().__init__()
        self.positions = positions
        self.tokens = nn.Embedding(vocabulary, width, padding_idx=0)
        self.places = nn.Embedding(length, width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.mix = nn.Linear(width, width)
        self.grow = nn.Linear(width, 2 * width)
        self.shrink = nn.Linear(2 * width, width)
        self.final = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, indices: Tensor) -> Tensor:
        """[B, T] indices -> [B, T, vocabulary]."""
        places = torch.arange(indices.shape[1], device=indices.device)
        x = self.tokens(indices) + self.places(places if self.positions == "flat" else places.unsqueeze(0))
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + self.mix(weights @ v)
        x = x + self.shrink(F.gelu(self.grow(self.norm(x))))
        return self.head(self.final(x))


class ResidualBlock(nn.Module):
    """Two convolutions with batch norms, ReLU in place, and a shortcut that changes shape where it must."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H / stride, W / stride]."""
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y))
        y += self.shortcut(x)
        return F.relu(y, inplace=True)


class ResNet(nn.Module):
    """A small residual network for RGB images.

    Args:
        widths: channels of each stage; every stage after the first halves the image.
        blocks: residual blocks per stage.
        classes: number of outputs.
    """

    def __init__(self, widths: tuple[int, ...] = (4, 6), blocks: int = 1, classes: int = 5) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, widths[0], 3, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        ]
        before = widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                layers.append(ResidualBlock(before, width, 2 if stage > 0 and block == 0 else 1))
                before = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, classes]."""
        return self.head(self.body(x).mean((2, 3)))


class FoldedFrames(nn.Module):
    """Frames of a film are folded into the batch dimension for a few layers, and averaged after."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, 2, H, W] -> [B, 4]."""
        images = self.norm(self.conv(x.flatten(0, 1))).relu()
        return self.head(images.mean((2, 3)).tanh()).unflatten(0, x.shape[:2]).mean(1)


class HandwrittenRMSNorm(nn.Module):
    """A root-mean-square norm as model files write it.

    offset: 0 as in Llama, 1 as in Gemma.
    """

    def __init__(self, width: int, *, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return (self.offset + self.weight) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Attention(nn.Module):
    """`nn.MultiheadAttention`, which is one function to torch."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, 6] -> [B, T, 2]."""
        return self.head(self.attention(x, x, x, need_weights=False)[0])


class TimeFirstAttention(nn.Module):
    """`nn.MultiheadAttention` across two sequences with time before batch, a key mask and a causal mask.

    settings: of the attention; it has a width of 4.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.inputs = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, **settings)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, 4] -> [B, T, 2]."""
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        hidden = x[..., 0] > 1
        memory = x.transpose(0, 1)
        queries = self.inputs(x).transpose(0, 1)
        out, _ = self.attention(queries, memory, memory, key_padding_mask=hidden, attn_mask=causal)
        return self.head(out.transpose(0, 1))


class ClassToken(nn.Module):
    """A token and a table of positions that the batch does not have, as in vision transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.positions = nn.Parameter(torch.zeros(1, 6, 4))
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 5, 4] -> [B, 6, 4]."""
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        return self.layer(x.tanh())


class Scaled(nn.Module):
    """A residual branch with a learned scale per channel, as in CaiT and ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[..., 4] -> [..., 4]."""
        return x + self.scale * self.layer(x).sin()


class _Bilinear(nn.Module):
    """Two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.pair, self.last = nn.Linear(4, 3), nn.Bilinear(3, 4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 4] -> [B, 2]."""
        return self.last(self.pair(self.first(x), input2=x))


class Recurrent(nn.Module):
    """A recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(4, 3, batch_first=True)
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, 4] -> [B, T, 4]."""
        return self.head(self.layer(x)[0])


class Vectors(nn.Module):
    """Parameters in a list, which is no module that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors = nn.ParameterList([torch.zeros(4) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        """[..., 4] -> [..., 4]."""
        scale, shift = self.vectors
        return x * scale + shift


class TiedToRaw(nn.Module):
    """One matrix, as a layer's weight and as a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(4, 4))
        self.layer = nn.Linear(4, 4)
        self.layer.weight = self.matrix

    def forward(self, x: Tensor) -> Tensor:
        """[..., 4] -> [..., 4]."""
        return self.layer(x).tanh() @ self.matrix


class Experts(nn.Module):
    """A mixture of experts: each sees the tokens that the router sends it, whosever they are."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 6)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4)) for _ in range(6)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, 4] -> [B, T, 4]."""
        tokens = x.flatten(0, 1)
        weights, chosen = self.router(tokens).softmax(-1).topk(2, dim=-1)
        out = tokens
        for index, expert in enumerate(self.experts):
            rows, places = torch.where(chosen == index)
            if len(rows):
                out = out.index_add(0, rows, expert(tokens[rows]) * weights[rows, places, None])
        return out.view_as(x)


class SideEffect(nn.Module):
    """Hands a part of its result on by an attribute, which no hook sees."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.total: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., 4] -> [..., 4]."""
        self.total = (x * self.scale).cos().sum(-1, keepdim=True)
        return x * self.scale


class ReadsSideEffect(nn.Module):
    """A model that reads what `SideEffect` left."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 4), SideEffect(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[..., 4] -> [..., 4]."""
        out = self.last(self.middle(self.first(x)))
        return out + self.middle.total


class LoRALinear(nn.Module):
    """A frozen layer with a trained correction of low rank, built as adapter libraries do.

    base: a Linear, or a quantised layer with `in_features` and `out_features`.
    """

    def __init__(self, base: Any, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_dropout = nn.ModuleDict({"default": nn.Dropout(0.1)})
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        dropped = self.lora_dropout["default"](x)
        return self.base_layer(x) + 2.0 * self.lora_B["default"](self.lora_A["default"](dropped))


class Int8Linear(nn.Module):
    """A layer with weights of 8 bits and a scale per row."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        values = torch.arange(in_features * out_features).reshape(out_features, in_features) % 17 - 8
        self.weight = nn.Parameter(values.to(torch.int8), requires_grad=False)
        self.scale: Tensor
        self.register_buffer("scale", torch.full((out_features, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return F.linear(x, self.weight.to(x.dtype) * self.scale)


class WeightUsedTwice(nn.Module):
    """A layer's weight is used outside the layer too, where no hook sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 4] -> [B, 4]."""
        return F.linear(self.layer(x).tanh(), self.layer.weight)


class AlwaysDropout(nn.Module):
    """Dropout that does not know of eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 4] -> [B, 4]."""
        return F.dropout(self.layer(x), 0.5)


class OverwrittenInput(nn.Module):
    """The input of a layer is overwritten after the layer has read it: ordinary training fails too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 4] -> [B, 4]."""
        hidden = self.first(x)
        out = self.second(hidden)
        hidden.mul_(2.0)
        return out + hidden


def _images(*shape: int) -> Callable[[int], Tensor]:
    return lambda batch_size: torch.randn(batch_size, *shape)


def _indices(high: int, *shape: int) -> Callable[[int], Tensor]:
    return lambda batch_size: torch.randint(high, (batch_size, *shape))


def _layer(name: str, layer: Callable[[], nn.Module], *shape: int, hooked: bool = True) -> Case:
    return Case(name, layer, _images(*shape), hooked)


LAYER_CASES: tuple[Case, ...] = (
    _layer("linear", lambda: nn.Linear(4, 3), 4),
    _layer("linear without bias", lambda: nn.Linear(4, 3, bias=False), 4),
    _layer("linear over positions", lambda: nn.Linear(4, 3), 5, 4),
    _layer("linear over two middle dimensions", lambda: nn.Linear(4, 3), 2, 3, 4),
    _layer("conv1d", lambda: nn.Conv1d(3, 4, 3), 3, 9),
    _layer("conv1d stride, padding, dilation", lambda: nn.Conv1d(3, 4, 3, 2, padding=2, dilation=2), 3, 11),
    _layer("conv1d same, even kernel", lambda: nn.Conv1d(2, 3, 4, padding="same", dilation=2), 2, 8),
    _layer("conv2d", lambda: nn.Conv2d(3, 4, 3, padding=1), 3, 6, 5),
    _layer("conv2d without bias", lambda: nn.Conv2d(3, 4, 3, bias=False), 3, 6, 5),
    _layer("conv2d 1x1", lambda: nn.Conv2d(3, 4, 1), 3, 4, 4),
    _layer("conv2d stride leaves a rest", lambda: nn.Conv2d(3, 4, 3, 2), 3, 8, 6),
    _layer(
        "conv2d oblong", lambda: nn.Conv2d(2, 3, (3, 2), (2, 1), padding=(0, 1), dilation=(1, 2)), 2, 9, 7
    ),
    _layer("conv2d groups", lambda: nn.Conv2d(4, 6, 3, groups=2), 4, 6, 6),
    _layer("conv2d depthwise", lambda: nn.Conv2d(4, 8, 3, groups=4, dilation=2), 4, 7, 7),
    _layer("conv2d valid", lambda: nn.Conv2d(3, 4, 3, padding="valid"), 3, 5, 5),
    _layer("conv2d same", lambda: nn.Conv2d(3, 4, (3, 2), padding="same", dilation=(1, 2)), 3, 6, 6),
    _layer("conv2d reflect", lambda: nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="reflect"), 3, 6, 6),
    _layer("conv2d circular", lambda: nn.Conv2d(3, 4, 3, padding="same", padding_mode="circular"), 3, 6, 6),
    _layer(
        "conv2d replicate, groups",
        lambda: nn.Conv2d(4, 4, 3, 2, 1, groups=2, padding_mode="replicate"),
        4,
        6,
        6,
    ),
    _layer("conv3d", lambda: nn.Conv3d(2, 4, (2, 3, 2), (1, 2, 1), padding=1, groups=2), 2, 3, 5, 4),
    Case("embedding", lambda: nn.Embedding(7, 4), _indices(7, 5)),
    Case("embedding with padding", lambda: nn.Embedding(7, 4, padding_idx=2), _indices(7, 9)),
    Case("embedding of one index", lambda: nn.Embedding(7, 4), _indices(7)),
    Case("embedding of index tables", lambda: nn.Embedding(7, 4), _indices(7, 2, 3)),
    _layer("batch norm 1d", lambda: nn.BatchNorm1d(4), 4),
    _layer("batch norm 1d over positions", lambda: nn.BatchNorm1d(4), 4, 6),
    _layer("batch norm 2d", lambda: nn.BatchNorm2d(3, eps=1e-3), 3, 4, 5),
    _layer("batch norm 3d", lambda: nn.BatchNorm3d(3), 3, 2, 3, 4),
    _layer("layer norm", lambda: nn.LayerNorm(5, eps=1e-3), 4, 5),
    _layer("layer norm without bias", lambda: nn.LayerNorm(5, bias=False), 5),
    _layer("layer norm over two dimensions", lambda: nn.LayerNorm((3, 4)), 2, 3, 4),
    _layer("group norm", lambda: nn.GroupNorm(2, 6, eps=1e-3), 6, 3, 4),
    _layer("instance norm 1d", lambda: nn.InstanceNorm1d(3, affine=True), 3, 7),
    _layer(
        "instance norm 2d, tracked",
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        3,
        4,
        5,
    ),
    _layer("rms norm", lambda: nn.RMSNorm(5), 4, 5),
    _layer("rms norm with epsilon", lambda: nn.RMSNorm((2, 5), eps=1e-2), 3, 2, 5),
    _layer("handwritten rms norm", lambda: HandwrittenRMSNorm(5), 4, 5),
    _layer("handwritten rms norm with offset", lambda: HandwrittenRMSNorm(5, offset=1.0), 4, 5),
)
"""One layer each."""

MODEL_CASES: tuple[Case, ...] = (
    _layer(
        "relu in place after every layer",
        lambda: nn.Sequential(
            nn.Linear(4, 6),
            nn.ReLU(inplace=True),
            nn.LayerNorm(6),
            nn.ReLU(inplace=True),
            nn.Linear(6, 3),
            nn.SELU(inplace=True),
        ),
        5,
        4,
    ),
    _layer("a module used repeatedly", Twice, 4, 5),
    _layer("residual network", ResNet, 3, 8, 8),
    Case("tied language model", TiedLanguageModel, _indices(11, 6)),
    Case("tied language model, flat positions", lambda: TiedLanguageModel(positions="flat"), _indices(11, 6)),
    _layer("frames folded into the batch", FoldedFrames, 2, 2, 5, 5),
    _layer("multi-head attention", Attention, 4, 6),
    _layer("attention across sequences, time first", TimeFirstAttention, 5, 4),
    _layer(
        "transformer encoder",
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), 2, enable_nested_tensor=False
        ),
        3,
        4,
    ),
    _layer(
        "transposed convolution",
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ConvTranspose2d(3, 2, 3)),
        2,
        6,
        6,
        hooked=False,
    ),
    _layer("prelu", lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU(4)), 4),
    _layer("prelu of images", lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.PReLU(3)), 2, 4, 5),
    _layer("prelu with one slope", lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.PReLU()), 2, 4, 5),
    _layer("weight used outside its layer", WeightUsedTwice, 4, hooked=False),
)
"""Layers in company."""


def _within(middle: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Between two layers that have rules."""
    return lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), middle(), nn.Linear(4, 3))


LOCAL_CASES: tuple[Case, ...] = (
    _layer(
        "attention with a key of its own", lambda: TimeFirstAttention(add_bias_kv=True), 5, 4, hooked=False
    ),
    _layer(
        "attention with as many times as examples",
        lambda: TimeFirstAttention(kdim=4, vdim=4, add_zero_attn=True, bias=False),
        3,
        4,
        hooked=False,
    ),
    _layer("class token and positions", ClassToken, 5, 4, hooked=False),
    _layer("learned scales", lambda: nn.Sequential(Scaled(), Scaled(), nn.Linear(4, 2)), 3, 4, hooked=False),
    _layer("bilinear layer", lambda: _Bilinear(), 4, hooked=False),
    _layer("list of parameters", _within(Vectors), 3, 4, hooked=False),
    _layer("matrix tied to a layer's", _within(TiedToRaw), 4, hooked=False),
    _layer(
        "normalised weight",
        _within(lambda: nn.utils.parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="cayley")),
        4,
        hooked=False,
    ),
)
"""Layers without a rule, whose parameters are had by local passes or by expansion; rules have the others."""

FOUND_CASES: tuple[Case, ...] = (
    _layer("recurrent layer", _within(Recurrent), 5, 4, hooked=False),
    _layer("weight used twice within a module", _within(WeightUsedTwice), 4, hooked=False),
    _layer("experts", _within(Experts), 4, 4, hooked=False),
    _layer("an attribute handed on", ReadsSideEffect, 4, hooked=False),
)
"""Models whose local passes the first-batch check finds: rules or vmap do not show beforehand that they will not do."""

CASES: tuple[Case, ...] = LAYER_CASES + MODEL_CASES
