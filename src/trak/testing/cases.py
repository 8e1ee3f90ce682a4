"""Cases for tests of per-example gradients: a model and its inputs for every kind of layer and every way of using it.

for case in CASES:
    model, batch = case.build()
    ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trak.testing.models import (
    Attention,
    ClassToken,
    Experts,
    FoldedFrames,
    HandwrittenRMSNorm,
    ReadsSideEffect,
    Recurrent,
    ResNet,
    Scaled,
    TiedLanguageModel,
    TiedToRaw,
    TimeFirstAttention,
    Twice,
    Vectors,
    WeightUsedTwice,
    _Bilinear,
)


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
"""Models whose way the first-batch check finds, sorted rows or local passes: rules or vmap do not show beforehand that they will not do."""

CASES: tuple[Case, ...] = LAYER_CASES + MODEL_CASES
