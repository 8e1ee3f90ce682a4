"""Featurizing against one plain forward and backward pass over the same batch: ratios, measured side by side.

    python benchmarks/featurize.py [--dim 2048] [--rounds 5] [--threads 1] [--cases resnet,bert-128] [--autocast bfloat16]

Every round measures all contenders in turn, so that drift of the machine falls on all alike; medians of ratios are reported. The floor is
the plain pass: 1.0 means that attribution costs as much as training for one epoch. Rademacher has a larger batch, and counts for each
example. With one thread, time is the process's own: other load does not count, though it still takes caches. Cases and contenders that are
run are put beside those that the file has from before.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from cases import CASES
from records import RESULTS, clock_for, record_cases
from torch import nn
from torch.nn import functional as F

import trak
from trak.allocator import keep_freed_memory
from trak.blocks import Block
from trak.gradients import model_state, select_parameters
from trak.projection import Moments, joined
from trak.testing.models import ResNet


class Encoder(nn.Module):
    """A small transformer encoder classifier with layers that have rules."""

    def __init__(self, vocabulary: int = 1000, width: int = 128, depth: int = 4, heads: int = 4):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.heads = heads
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "norm2": nn.LayerNorm(width),
                    "up": nn.Linear(width, 4 * width),
                    "down": nn.Linear(4 * width, width),
                }
            )
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 2)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            q, k, v = (
                part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for part in layer["qkv"](layer["norm1"](x)).chunk(3, -1)
            )
            attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + layer["out"](attended)
            x = x + layer["down"](F.gelu(layer["up"](layer["norm2"](x))))
        return self.head(x.mean(1))


class Layers(nn.Module):
    """`nn.TransformerEncoder` over patches of 32 × 32 images: attention is `nn.MultiheadAttention`, as in torchvision's ViT."""

    def __init__(self, width: int = 256, depth: int = 4, heads: int = 4):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        return self.head(self.layers(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


class Peered:
    """A case of the peers' benchmark: model, batch, the loss of each example."""

    def __init__(self, name: str):
        self.case = CASES[name]

    def __call__(self):
        batch = self.case.data(self.case.batch_size)
        return self.case.model(), batch, self.case.losses


def own(build, *, images=None, tokens=None, batch_size=64):
    """(model, batch, losses) of a classifier."""

    def make():
        torch.manual_seed(0)
        labels = torch.randint(2, (batch_size,))
        inputs = torch.randn(batch_size, 3, 32, 32) if images else torch.randint(1000, (batch_size, tokens))
        losses = lambda logits, labels: F.cross_entropy(logits, labels, reduction="none")  # noqa: E731
        return build().eval(), (inputs, labels), losses

    return make


LARGER = {"Rademacher": 4}
"""Times the batch, for what draws its signs once for every batch: as the peers' benchmark has it."""

MODELS = {
    "resnet": own(lambda: ResNet(widths=(32, 64), blocks=2), images=True),
    "resnet9-small": Peered("resnet9-small"),
    "resnet9": Peered("resnet9"),
    "transformer-128": own(Encoder, tokens=64),
    "transformer-256": own(lambda: Encoder(width=256), tokens=64, batch_size=32),
    "transformer-512": own(lambda: Encoder(width=512), tokens=64, batch_size=16),
    "encoder-layers": own(Layers, images=True, batch_size=32),
    "vit": Peered("vit"),
    "bert-128": Peered("bert-128"),
    "bert-512": Peered("bert-512"),
    "gpt2-128": Peered("gpt2-128"),
    "gpt2-512": Peered("gpt2-512"),
}
"""Name to what makes (model, batch, losses). Transformers are named by their width, the peers' cases by their tokens."""


class UnderAutocast(nn.Module):
    """A model under autocast; logits in float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, inputs):
        with torch.autocast("cpu", dtype=self.dtype):
            return self.model(inputs).float()


def plain_pass(model, batch, losses=lambda logits, labels: F.cross_entropy(logits, labels, reduction="none")):
    losses(model(batch[0]), batch[1]).mean().backward()
    model.zero_grad(set_to_none=True)


class Features:
    """What featurizing a model takes, without a store."""

    def __init__(self, model, batch, losses=None):
        self.model, self.batch = model, batch
        # Classifiers have the margin of the correct class; language models the log-likelihood, whose cost is the loss's.
        self.task = trak.ImageClassification()
        if batch[1].ndim > 1:
            self.task = trak.CustomTask(
                lambda model, batch: -losses(model(batch[0]), batch[1]),
                weight=torch.ones_like,
                name="likelihood",
            )
        self.shapes = select_parameters(model, None)
        self.names = list(self.shapes)
        self.state = model_state(model, None, "cpu")
        self.hooked = trak.Auto().candidates(model, self.names)[0]

    def compute(self, batch, take, gradients=None):
        """Gradients of the batch, block by block."""
        (gradients or self.hooked).compute(self.model, self.state, self.task, batch, self.names, take)

    def blocks(self, batch) -> dict[str, Block]:
        """One block for a parameter."""
        found: dict[str, list[Block]] = {}
        self.compute(batch, lambda block: found.setdefault(block.name, []).append(block))
        return {name: joined(several) for name, several in found.items()}

    def moments(self, projection) -> Moments:
        """Empty sums for a fitted projection."""
        options = projection.factor_options
        return Moments.zeros(self.shapes, options, device=torch.device("cpu"), dtype=torch.float32)

    def leading(self, projection, squares):
        """The matrix of a fitted projection, as it comes out of a store."""
        kept = projection.to_keep(self.shapes, squares.factors())
        return kept, projection.init(self.shapes, factors=projection.from_kept(self.shapes, kept))

    def fitted(self, projection):
        """The matrix of a projection that is fitted to this batch alone."""
        moments, weights_B = self.moments(projection), torch.ones(len(self.batch[1]))
        moments.add(self.blocks(self.batch), weights_B)
        squares = moments.turned()
        squares.add(self.blocks(self.batch), weights_B)
        return self.leading(projection, squares)[1]

    def featurizing(self, projection, drawn, batch):
        """What featurizes a batch once."""

        def featurize():
            out = drawn.zeros(len(batch[1]))
            self.compute(batch, lambda block: projection.add(drawn, block, out))

        return featurize


def contenders(model, batch, dim, losses=None):
    """Name to what makes a function that featurizes the batch once."""
    case = Features(model, batch, losses)

    def projected(projection, draw=lambda projection: projection.init(case.shapes), batch=batch):
        return lambda: case.featurizing(projection, draw(projection), batch)

    def gradients(source, take):
        return lambda: lambda: case.compute(batch, take, source)

    return {
        "factors": gradients(case.hooked, lambda block: None),
        "gradients": gradients(case.hooked, lambda block: block.dense()),
        "functional": gradients(trak.Functional(), lambda block: None),
        "Kronecker": projected(trak.Kronecker(dim)),
        "Eigenbasis": projected(trak.Eigenbasis(dim), case.fitted),
        "Sparse": projected(trak.Sparse(dim)),
        "Rademacher": projected(
            trak.Rademacher(dim), batch=tuple(torch.cat([part] * LARGER["Rademacher"]) for part in batch)
        ),
    }


def measure(function, clock) -> float:
    start = clock()
    function()
    return clock() - start


def run_case(model, batch, losses, dim, rounds, clock, only=None, autocast=None):
    """(median seconds of the plain pass, median ratios, least seconds of each), for as many examples as the batch has.

    With `autocast`, a dtype, all of it is in that, the plain pass too, and that in float32 is a contender.
    """
    in_float32 = lambda: plain_pass(model, batch, losses)  # noqa: E731
    run = model if autocast is None else UnderAutocast(model, autocast)
    floor = lambda: plain_pass(run, batch, losses)  # noqa: E731
    others = {
        name: make()
        for name, make in contenders(run, batch, dim, losses).items()
        # Under vmap norms refuse half precision.
        if (only is None or name in only) and (autocast is None or name != "functional")
    }
    if autocast is not None:
        others["float32"] = in_float32
    for function in (floor, *others.values()):
        function()
    ratios, least = {name: [] for name in others}, {name: [] for name in others}
    seconds = []
    for _ in range(rounds):
        for name, function in others.items():
            base = measure(floor, clock)
            seconds.append(base)
            least[name].append(measure(function, clock) / LARGER.get(name, 1))
            ratios[name].append(least[name][-1] / base)
    return (
        statistics.median(seconds),
        {name: statistics.median(values) for name, values in ratios.items()},
        {"plain": min(seconds)} | {name: min(values) for name, values in least.items()},
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", default=",".join(MODELS), help="names, with commas")
    parser.add_argument(
        "--contenders",
        default=None,
        help="factors, gradients, functional, Kronecker, Eigenbasis, Sparse, Rademacher",
    )
    parser.add_argument(
        "--autocast", choices=["bfloat16"], help="all of it under autocast, the plain pass too"
    )
    parser.add_argument(
        "--out", type=Path, help="benchmarks/results/featurize.json, or featurize-bfloat16.json"
    )
    options = parser.parse_args()
    autocast = options.autocast and getattr(torch, options.autocast)
    out = options.out or RESULTS / f"featurize{f'-{options.autocast}' if autocast else ''}.json"
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as while batches follow one another; the plain pass has it, too
    clock = clock_for(options.threads)
    only = options.contenders and options.contenders.split(",")

    def run(name: str, known: dict) -> dict:
        model, batch, losses = MODELS[name]()
        parameters = sum(p.numel() for p in model.parameters())
        seconds, ratios, least = run_case(
            model, batch, losses, options.dim, options.rounds, clock, only, autocast
        )
        per_example = 1000 * seconds / len(batch[1])
        print(f"\n{name}: {parameters:,} parameters, plain pass {per_example:.2f} ms per example")
        for contender, ratio in ratios.items():
            print(f"  {contender:12s} {ratio:6.2f} x", flush=True)
        return {
            "parameters": parameters,
            "batch_size": len(batch[1]),
            "shape": list(batch[0].shape[1:]),
            "plain_pass_seconds": seconds,
            "ratios": known.get("ratios", {}) | ratios,
            "least_seconds": known.get("least_seconds", {}) | least,
            "rounds": options.rounds,
        }

    facts = {"clock": clock.__name__, "dim": options.dim, "autocast": options.autocast}
    record_cases(out, options.cases.split(","), MODELS, run, options.threads, **facts)


if __name__ == "__main__":
    main()
