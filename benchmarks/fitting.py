"""What fitting an eigenbasis costs: its two passes over the sample against plain passes, the seconds between them, and bytes that are kept.

    python benchmarks/fitting.py [--dim 4096] [--batches 3] [--threads 1] [--cases resnet9,bert-128] [--out benchmarks/results/fitting.json]

For each case a sample of a few batches is fitted to as `trak.Eigenbasis` does it, and featurized after: every batch is timed beside a plain
forward and backward pass over the same examples, and medians of the ratios are reported. Weights are random, so what is chosen is not what
a trained model would have; the passes cost nearly the same. With one thread, time is the process's own. Cases that are run are put
beside those that the file has from before.
"""

from __future__ import annotations

import argparse
import runpy
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from featurize import MODELS, Features, plain_pass
from records import RESULTS, clock_for, record_cases
from torch import Tensor, nn
from torch.nn import functional as F

import trak

ROOT = Path(__file__).resolve().parents[1]


class Bottleneck(nn.Module):
    """1 × 1, 3 × 3 and 1 × 1 convolutions with a quarter of the channels in the middle, and a shortcut that changes shape."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        middle = outputs // 4
        self.body = nn.Sequential(
            nn.Conv2d(inputs, middle, 1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(),
            nn.Conv2d(middle, middle, 3, 2, 1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(),
            nn.Conv2d(middle, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def bottlenecks() -> nn.Module:
    """The first block of each of ResNet-50's last three stages: 8 million parameters, up to 2,048 channels."""
    stem = nn.Sequential(nn.Conv2d(3, 256, 7, 2, 3, bias=False), nn.BatchNorm2d(256), nn.ReLU())
    blocks = nn.Sequential(Bottleneck(256, 512), Bottleneck(512, 1024), Bottleneck(1024, 2048))
    return nn.Sequential(
        stem, nn.MaxPool2d(3, 2, 1), blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 2)
    )


def images(build: Callable[[], nn.Module], *, size: int, batch_size: int) -> Callable:
    """What makes (model, batch, losses) of a classifier of square images."""

    def make():
        torch.manual_seed(0)
        batch = torch.randn(batch_size, 3, size, size), torch.randint(2, (batch_size,))
        return (
            build().eval(),
            batch,
            lambda logits, labels: F.cross_entropy(logits, labels, reduction="none"),
        )

    return make


def resnet18() -> nn.Module:
    return runpy.run_path(str(ROOT / "examples" / "resnet18.py"))["ResNet18"](num_classes=2)


NAMES = (
    "resnet",
    "resnet9-small",
    "resnet9",
    "vit",
    "bert-128",
    "gpt2-128",
    "transformer-256",
    "transformer-512",
)
CASES = {name: MODELS[name] for name in NAMES} | {
    "resnet18-64": images(resnet18, size=64, batch_size=8),
    "bottlenecks-64": images(bottlenecks, size=64, batch_size=8),
}


def draw(batch: tuple[Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor]:
    """Another batch like this one."""
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = batch
    if inputs.is_floating_point():
        drawn = torch.randn(inputs.shape, generator=generator)
    else:
        drawn = torch.randint(int(inputs.max()) + 1, inputs.shape, generator=generator)
    if labels is inputs:
        return drawn, drawn
    return drawn, torch.randint(2, labels.shape, generator=generator)


class Case(Features):
    """One model, and everything that is timed on a batch of its examples."""

    def __init__(self, make: Callable, clock: Callable[[], float]) -> None:
        model, batch, self.losses = make()
        super().__init__(model, batch, self.losses)
        self.clock = clock

    def seconds(self, function: Callable, *args) -> float:
        start = self.clock()
        function(*args)
        return self.clock() - start

    def ratios(self, batches, **passes: Callable) -> dict[str, float]:
        """Medians over the batches of what each pass takes, in plain passes over the same batch, after one pass each that is not counted."""
        plain = lambda batch: plain_pass(self.model, batch, self.losses)  # noqa: E731
        found: dict[str, list[float]] = {name: [] for name in passes}
        self.plain_seconds = []
        plain(batches[0])
        for batch in batches:
            for name, run in passes.items():
                base = self.seconds(plain, batch)
                self.plain_seconds.append(base)
                found[name].append(self.seconds(run, batch) / base)
        return {name: statistics.median(values) for name, values in found.items()}


def run_case(make: Callable, dim: int, count: int, clock: Callable[[], float]) -> dict:
    case = Case(make, clock)
    batches = [draw(case.batch, seed) for seed in range(1, count + 1)]
    weights_B = torch.ones(len(case.batch[0]))
    projection, sparse = trak.Eigenbasis(dim), trak.Sparse(dim)

    def add(sums):
        return lambda batch: sums.add(case.blocks(batch), weights_B)

    moments = case.moments(projection)
    add(case.moments(projection))(case.batch)
    ratios = case.ratios(batches, moments=add(moments))
    start = clock()
    squares = moments.turned()
    turned_seconds = clock() - start
    # What is done once and not for every batch stays out: a batch of no weight.
    squares.add(case.blocks(case.batch), 0 * weights_B)
    ratios |= case.ratios(batches, squares=add(squares))
    start = clock()
    kept, leading = case.leading(projection, squares)
    init_seconds = clock() - start

    def featurize(kind, matrix):
        case.featurizing(kind, matrix, case.batch)()
        return lambda batch: case.featurizing(kind, matrix, batch)()

    ratios |= case.ratios(
        batches,
        Eigenbasis=featurize(projection, leading),
        Sparse=featurize(sparse, sparse.init(case.shapes)),
    )
    return {
        "parameters": sum(parameter.numel() for parameter in case.model.parameters()),
        "batch_size": len(weights_B),
        "rows": count * len(weights_B),
        "shape": list(case.batch[0].shape[1:]),
        "plain_pass_seconds": statistics.median(case.plain_seconds),
        "ratios": ratios,
        "fixed_seconds": {"eigenvectors": turned_seconds, "choosing": init_seconds},
        "bytes": {
            "model": total_bytes(dict(case.model.named_parameters())),
            "moments": sum(
                total_bytes({str(i): side for i, side in enumerate(sides) if side is not None})
                for sides in moments.sides.values()
            ),
            "kept": total_bytes(kept),
        },
    }


def total_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def show(name: str, found: dict) -> None:
    per_example = 1000 * found["plain_pass_seconds"] / found["batch_size"]
    print(f"\n{name}: {found['parameters']:,} parameters, plain pass {per_example:.2f} ms per example")
    for what, ratio in found["ratios"].items():
        print(f"  {what:12s} {ratio:6.2f} x")
    for what, seconds in found["fixed_seconds"].items():
        print(f"  {what:12s} {seconds:6.2f} s")
    for what, count in found["bytes"].items():
        print(f"  {what:12s} {count / 2**20:8.1f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", default=",".join(CASES), help="names, with commas")
    parser.add_argument("--out", type=Path, default=RESULTS / "fitting.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = clock_for(options.threads)

    def run(name: str, _: dict) -> dict:
        found = run_case(CASES[name], options.dim, options.batches, clock)
        show(name, found)
        return found | {"batches": options.batches}

    facts = {"clock": clock.__name__, "dim": options.dim}
    record_cases(options.out, options.cases.split(","), CASES, run, options.threads, **facts)


if __name__ == "__main__":
    main()
