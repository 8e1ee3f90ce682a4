"""Models and data of the peer benchmarks: the same numbers, by seed, in every environment. Needs torch alone.

Shape legend: B examples, T tokens, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvBlock(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, padding: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class ResNet9(nn.Module):
    """TRAK's CIFAR network: 2,273,856 parameters at width 64, 142,992 (that of examples/cifar2.py) at 16."""

    def __init__(self, width: int = 64):
        super().__init__()
        w = width
        self.stem = ConvBlock(3, w)
        self.down = ConvBlock(w, 2 * w, 5, 2, 2)
        self.res1 = nn.Sequential(ConvBlock(2 * w, 2 * w), ConvBlock(2 * w, 2 * w))
        self.widen = ConvBlock(2 * w, 4 * w)
        self.res2 = nn.Sequential(ConvBlock(4 * w, 4 * w), ConvBlock(4 * w, 4 * w))
        self.narrow = ConvBlock(4 * w, 2 * w, padding=0)
        self.head = nn.Linear(2 * w, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.stem(x))
        x = x + self.res1(x)
        x = F.max_pool2d(self.widen(x), 2)
        x = x + self.res2(x)
        x = F.adaptive_max_pool2d(self.narrow(x), 1).flatten(1)
        return self.head(x) * 0.2


class Attention(nn.Module):
    """Multi-head self-attention with one linear layer for queries, keys and values."""

    def __init__(self, width: int, heads: int, causal: bool = False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        queries, keys, values = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.c_attn(x_BTC).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=self.causal)
        return self.c_proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers."""

    def __init__(self, width: int, approximate: str = "none"):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate))


class Layer(nn.Module):
    """A transformer layer, normalised before (ViT, GPT-2) or after (BERT) each half."""

    def __init__(self, width: int, heads: int, *, norm_first: bool, causal: bool = False, gelu: str = "none"):
        super().__init__()
        self.norm_first = norm_first
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, causal)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, gelu)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_first:
            x = x + self.attn(self.ln_1(x))
            return x + self.mlp(self.ln_2(x))
        x = self.ln_1(x + self.attn(x))
        return self.ln_2(x + self.mlp(x))


class ViT(nn.Module):
    """Vision transformer for 32 × 32 images: 4 × 4 patches, a class token."""

    def __init__(self, width: int = 128, depth: int = 4, heads: int = 4, classes: int = 10):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 65, width))
        self.h = nn.ModuleList(Layer(width, heads, norm_first=True) for _ in range(depth))
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(patches), -1, -1), patches], 1) + self.position
        for layer in self.h:
            x = layer(x)
        return self.head(self.ln_f(x)[:, 0])


class Bert(nn.Module):
    """BERT's encoder with its pooler and a classifier: 109 million parameters at width 768, depth 12, 30,522 words."""

    def __init__(
        self, vocabulary: int, width: int, depth: int, heads: int, positions: int = 512, classes: int = 2
    ):
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width)
        self.norm = nn.LayerNorm(width)
        self.h = nn.ModuleList(Layer(width, heads, norm_first=False) for _ in range(depth))
        self.pooler = nn.Linear(width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        where = torch.arange(ids.shape[1], device=ids.device)
        x = self.norm(self.words(ids) + self.positions(where).expand(len(ids), -1, -1))
        for layer in self.h:
            x = layer(x)
        return self.head(torch.tanh(self.pooler(x[:, 0])))


class GPT2(nn.Module):
    """GPT-2, the output layer tied to the embedding: 124 million parameters at width 768, depth 12, 50,257 words."""

    def __init__(self, vocabulary: int, width: int, depth: int, heads: int, positions: int = 512):
        super().__init__()
        self.shape = {
            "vocab_size": vocabulary,
            "n_embd": width,
            "n_layer": depth,
            "n_head": heads,
            "n_positions": positions,
        }
        self.wte = nn.Embedding(vocabulary, width)
        self.wpe = nn.Embedding(positions, width)
        self.h = nn.ModuleList(
            Layer(width, heads, norm_first=True, causal=True, gelu="tanh") for _ in range(depth)
        )
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        for table in (self.wte, self.wpe):
            nn.init.normal_(table.weight, std=0.02)
        self.lm_head.weight = self.wte.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        where = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.wte(input_ids) + self.wpe(where).expand(len(input_ids), -1, -1)
        for layer in self.h:
            x = layer(x)
        return self.lm_head(self.ln_f(x))


@dataclass(frozen=True)
class Case:
    """One model with its data.

    Attributes:
        name: for the command line and the results.
        title: for the page.
        build: makes the model.
        kind: "image", "text" (classification of token ids) or "lm" (next token).
        rows: examples of a round, for contenders whose cost is proportional to them.
        batch_size: of those.
        dense_rows: examples of a round, in one batch, for contenders that draw a dense projection matrix for every batch.
        tokens: sequence length; None for images.
        vocabulary: V; None for images.
        gpu: whether it is left out without a GPU.
    """

    name: str
    title: str
    build: Callable[[], nn.Module]
    kind: str
    rows: int
    batch_size: int
    dense_rows: int
    tokens: int | None = None
    vocabulary: int | None = None
    gpu: bool = False

    def model(self) -> nn.Module:
        """The model in eval mode, with weights drawn from seed 0."""
        torch.manual_seed(0)
        model = self.build().eval()
        # Norms as after training: an untrained batch norm would let activations vanish.
        generator = torch.Generator().manual_seed(1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
        return model

    def data(self, rows: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels: ([B, 3, 32, 32] or [B, T], [B]); for language models the labels are the tokens themselves, [B, T]."""
        generator = torch.Generator().manual_seed(2)
        if self.kind == "image":
            return torch.randn(rows, 3, 32, 32, generator=generator), torch.randint(
                2, (rows,), generator=generator
            )
        ids = torch.randint(self.vocabulary, (rows, self.tokens), generator=generator)
        return ids, ids if self.kind == "lm" else torch.randint(2, (rows,), generator=generator)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each example, [B]; for language models the sum over the T − 1 tokens that have one before them."""
        if self.kind != "lm":
            return F.cross_entropy(logits, labels, reduction="none")
        tokens = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
        return tokens.sum(1)


def _bert(vocabulary: int, width: int, depth: int, heads: int) -> Callable[[], nn.Module]:
    return lambda: Bert(vocabulary, width, depth, heads)


def _gpt2(vocabulary: int, width: int, depth: int, heads: int) -> Callable[[], nn.Module]:
    return lambda: GPT2(vocabulary, width, depth, heads)


def _text(
    name: str, title: str, build: Callable[[], nn.Module], rows: tuple[int, int, int], **others
) -> Case:
    return Case(name, title, build, "text", *rows, **others)


def _lm(name: str, title: str, build: Callable[[], nn.Module], rows: tuple[int, int, int], **others) -> Case:
    return Case(name, title, build, "lm", *rows, **others)


NARROW = (4096, 128, 4, 4)
"""Words, width, depth and heads of the transformers that two cores can measure."""
BERT_BASE = (30522, 768, 12, 12)
GPT2_SMALL = (50257, 768, 12, 12)


def _cases() -> tuple[Case, ...]:
    bert, gpt2 = _bert(*NARROW), _gpt2(*NARROW)
    bert_base, gpt2_small = _bert(*BERT_BASE), _gpt2(*GPT2_SMALL)
    narrow, base = {"vocabulary": NARROW[0]}, {"vocabulary": BERT_BASE[0], "gpu": True}
    small = {"vocabulary": GPT2_SMALL[0], "gpu": True}
    return (
        Case("resnet9-small", "ResNet-9, a quarter of its width", lambda: ResNet9(16), "image", 64, 64, 256),
        Case("resnet9", "ResNet-9", ResNet9, "image", 16, 16, 64),
        Case("vit", "ViT, width 128, depth 4", ViT, "image", 64, 32, 128),
        _text("bert-128", "BERT, width 128, depth 4", bert, (32, 16, 64), tokens=128, **narrow),
        _text("bert-512", "BERT, width 128, depth 4", bert, (8, 8, 32), tokens=512, **narrow),
        _lm("gpt2-128", "GPT-2, width 128, depth 4", gpt2, (16, 16, 32), tokens=128, **narrow),
        _lm("gpt2-512", "GPT-2, width 128, depth 4", gpt2, (4, 4, 16), tokens=512, **narrow),
        _text("bert-base-128", "BERT base", bert_base, (64, 32, 32), tokens=128, **base),
        _text("bert-base-512", "BERT base", bert_base, (16, 8, 8), tokens=512, **base),
        _lm("gpt2-small-128", "GPT-2", gpt2_small, (32, 16, 16), tokens=128, **small),
        _lm("gpt2-small-512", "GPT-2", gpt2_small, (8, 4, 4), tokens=512, **small),
    )


CASES: dict[str, Case] = {case.name: case for case in _cases()}


def matrix_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear and convolutional layers by name, without an output layer that shares its weight with an embedding."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and id(module.weight) not in tables
    }


def side(dim: int, caps: Sequence[int]) -> int:
    """The p for which Σ min(p, cap)² over the layers is nearest to `dim`: factored projections keep p² numbers of each layer.

    Args:
        dim: K.
        caps: the largest p of each layer; `dim` where a peer has no such limit.
    """
    return min(range(1, dim + 1), key=lambda p: abs(sum(min(p, cap) ** 2 for cap in caps) - dim))
