"""Projection kernels alone, against their floors: ratios, measured side by side.

    python benchmarks/projection.py [--batch-size 64] [--dim 2048] [--entries 65536] [--rounds 7] [--only sparse]
                                    [--device cpu] [--threads 1] [--out benchmarks/results/projection.json]

Dense kinds are compared with a matrix product over a float32 matrix that is there already, in slices that fit a
cache; `Sparse` with one copy of the gradients, and with `scatter_add_` of them to places of their own. Every round
measures all cases in turn, so that drift of the machine falls on all alike, and medians are reported. With one thread
on a CPU, time is the process's own: other load does not count, though it still takes caches.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from records import RESULTS, conditions, read_record, write_record

import trak
from trak.allocator import keep_freed_memory
from trak.blocks import DenseBlock
from trak.projection import tiles
from trak.projection.kernels.dispatch import choose_kernel
from trak.projection.kernels.entries import NORMALS, SIGNS

SLICE = 8192


def contenders(values, dim, device, only):
    """Name to a function that projects all gradients once; the floors come first."""
    if only != "sparse":
        yield "matrix product", _product(values, dim, device)
    if only != "dense":
        copied = torch.empty_like(values)
        yield "copy", lambda: copied.copy_(values)
        yield "scattered one by one", _scatter(values, dim, device)
    block = DenseBlock("w", values.shape[1:], values)
    for projection, kernel in (
        (trak.Rademacher(dim), None),
        (trak.Rademacher(dim), "tables"),
        (trak.Rademacher(dim), "matmul"),
        (trak.Rademacher(dim, cache_bytes=0), None),
        (trak.Gaussian(dim, cache_bytes=4 << 30), None),
        (trak.Sparse(dim), None),
    ):
        if only != ("dense" if projection.kind == "sparse" else "sparse"):
            yield _name(projection, kernel, dim, device), _project(projection, kernel, block, device)


def _product(values, dim, device):
    """With a matrix that is there already."""
    matrix = torch.randn(min(SLICE, values.shape[1]), dim, device=device)
    out = torch.zeros(len(values), dim, device=device)

    def run():
        for start in range(0, values.shape[1], SLICE):
            part = values[:, start : start + SLICE]
            out.addmm_(part, matrix[: part.shape[1]])

    return run


def _scatter(values, dim, device):
    """A count sketch: a place for each entry, whose sign is one of two sums."""
    places = torch.randint(2 * dim, values.shape[1:], device=device).expand(values.shape)
    out = torch.zeros(len(values), dim, device=device)

    def run():
        sums = torch.zeros(len(values), 2 * dim, device=device).scatter_add_(1, places, values)
        out.add_(sums[:, :dim]).sub_(sums[:, dim:])

    return run


def _name(projection, kernel, dim, device):
    drawn = ", drawn each time" if getattr(projection, "cache_bytes", 1) == 0 else ""
    if projection.kind == "sparse":
        return "Sparse"
    entries = SIGNS if projection.kind == "rademacher" else NORMALS
    chosen = kernel or choose_kernel(torch.device(device), torch.float32, entries, dim)
    return f"{type(projection).__name__}, {chosen}{drawn}"


def _project(projection, kernel, block, device):
    state = projection.init({"w": block.shape}, device=device)
    out = state.zeros(block.batch_size)
    chosen = tiles.choose_kernel

    def run():
        tiles.choose_kernel = (lambda *args: kernel) if kernel else chosen
        try:
            projection.add(state, block, out)
        finally:
            tiles.choose_kernel = chosen

    return run


def measure(function, clock, device) -> float:
    start = clock()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--entries", type=int, default=65536)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=("dense", "sparse"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "projection.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as while batches follow one another
    clock = time.process_time if options.device == "cpu" and options.threads == 1 else time.perf_counter
    values = torch.randn(options.batch_size, options.entries, device=options.device)
    functions = dict(contenders(values, options.dim, options.device, options.only))
    seconds = {name: [] for name in functions}
    for function in functions.values():
        measure(function, clock, options.device)
    for _ in range(options.rounds):
        for name, function in functions.items():
            seconds[name].append(measure(function, clock, options.device))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        floor = medians["copy" if name in ("Sparse", "copy", "scattered one by one") else "matrix product"]
        number = 1e9 * median / values.numel()
        print(
            f"{name:40s} {1000 * median:10.2f} ms {number:8.2f} ns a number {median / floor:8.2f} x its floor"
        )
    record = {
        **conditions(options.threads),
        "device": options.device if options.device == "cpu" else torch.cuda.get_device_name(),
        "clock": clock.__name__,
        "batch_size": options.batch_size,
        "dim": options.dim,
        "entries": options.entries,
        "rounds": options.rounds,
        "median_seconds": medians,
        "least_seconds": {name: min(values) for name, values in seconds.items()},
    }
    name = f"{record['machine']}, {record['device']}, {record['threads']} threads, {options.batch_size} examples, {options.entries} entries"
    write_record(options.out, read_record(options.out) | {name: record})
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
