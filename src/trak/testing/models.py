"""Tiny models for tests: the ways models use layers, and models that cannot be attributed."""

from __future__ import annotations

from collections.abc import Mapping
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
