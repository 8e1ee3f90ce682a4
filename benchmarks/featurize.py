"""Featurizing against one plain forward and backward pass over the same batch: ratios, measured side by side.

    python benchmarks/featurize.py [--batch-size 64] [--dim 2048] [--rounds 7] [--out benchmarks/results]

Every round measures all cases in turn, so that drift of the machine falls on all alike; medians of ratios are reported. The floor is
the plain pass: 1.0 means that attribution costs as much as training for one epoch.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from datetime import date
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import trak
from trak.gradients import model_state, select_parameters
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


def cases(batch_size: int):
    """(name, model, batch)."""
    torch.manual_seed(0)
    labels = torch.randint(2, (batch_size,))
    yield "resnet", ResNet(widths=(32, 64), blocks=2), (torch.randn(batch_size, 3, 32, 32), labels)
    yield "transformer, 64 tokens", Encoder(), (torch.randint(1000, (batch_size, 64)), labels)


def plain_pass(model, batch):
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    model.zero_grad(set_to_none=True)


def contenders(model, batch, dim):
    """Name to a function that featurizes the batch once."""
    task = trak.ImageClassification()
    shapes = select_parameters(model, None)
    names = list(shapes)
    state = model_state(model, None, "cpu")
    hooked, functional = trak.Hooked(), trak.Functional()

    def with_projection(gradients, projection):
        drawn = projection.init(shapes)

        def featurize():
            out = drawn.zeros(len(batch[1]))
            gradients.compute(
                model, state, task, batch, names, lambda block: projection.add(drawn, block, out)
            )

        return featurize

    def only(gradients, consume):
        return lambda: gradients.compute(model, state, task, batch, names, consume)

    yield "hooked, factors only", only(hooked, lambda block: None)
    yield "hooked, full gradients", only(hooked, lambda block: block.dense())
    yield "functional (torch.func)", only(functional, lambda block: None)
    yield f"hooked + Kronecker({dim})", with_projection(hooked, trak.Kronecker(dim))
    yield f"hooked + Sparse({dim})", with_projection(hooked, trak.Sparse(dim))
    yield f"hooked + Rademacher({dim})", with_projection(hooked, trak.Rademacher(dim))


def measure(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def run_case(model, batch, dim, rounds):
    model.eval()
    floor = lambda: plain_pass(model, batch)  # noqa: E731
    others = dict(contenders(model, batch, dim))
    for function in (floor, *others.values()):
        function()
    ratios = {name: [] for name in others}
    seconds = []
    for _ in range(rounds):
        for name, function in others.items():
            base = measure(floor)
            seconds.append(base)
            ratios[name].append(measure(function) / base)
    return statistics.median(seconds), {name: statistics.median(values) for name, values in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    results = {}
    for name, model, batch in cases(options.batch_size):
        parameters = sum(p.numel() for p in model.parameters())
        seconds, ratios = run_case(model, batch, options.dim, options.rounds)
        results[name] = {"parameters": parameters, "plain_pass_seconds": seconds, "ratios": ratios}
        print(
            f"\n{name}: {parameters:,} parameters, plain pass {1000 * seconds / options.batch_size:.2f} ms per example"
        )
        for contender, ratio in ratios.items():
            print(f"  {contender:32s} {ratio:6.2f} x")
    record = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "trak": trak.__version__,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "batch_size": options.batch_size,
        "rounds": options.rounds,
        "results": results,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"featurize-cpu-{record['date']}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
