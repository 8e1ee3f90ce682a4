"""How cost grows: with examples, with scores, with parameters.

    python benchmarks/growth.py [--parts featurize,attribute,score,parameters] [--threads 1]

featurize, attribute: N examples of a small network into a store on disk, each size in a process of its own, with its peak memory: by `TRAKer` with
Sparse(512), and as `attribute` does by default, which fits its projection first and solves after. Examples are made as they are asked for, so
that nothing grows but what the library keeps.
score: all scores of N rows for T targets, K = 512, features in memory, thrown away block by block.
parameters: one batch of networks and transformers from 10^5 to 10^8 parameters, in milliseconds per example: the plain pass, the factored
path (Kronecker), the full gradients (Sparse), the eigenbasis once it is fitted (up to 5 · 10^7, where it is the default) and, up to 10^6, dense
signs; K = 2,048; the least of --rounds. A path that needs more memory than
--memory-gib allows is left out.

Results go to benchmarks/results/growth.json; `benchmarks/performance_page.py` draws them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from featurize import LARGER, Encoder, contenders, plain_pass
from records import RESULTS, clock_for, conditions, read_record, write_record
from score import make_rows, make_scores, peak_kib
from torch import nn

import trak
from trak.projection.default import LARGE_MODEL

SIZES = (4_096, 16_384, 65_536)
EXAMPLES = (2_048, 8_192, 32_768)
TARGETS = (32, 128, 512)
BATCH = 128
WIDTHS = {
    "MLP": (160, 512, 1696, 2900, 7000),
    "transformer": ((64, 2), (128, 4), (256, 6), (384, 6), (768, 12)),
}


class Drawn:
    """Batches made from their position."""

    def __init__(self, num_rows: int):
        self.num_rows = num_rows

    def __iter__(self):
        for start in range(0, self.num_rows, BATCH):
            generator = torch.Generator().manual_seed(start)
            count = min(BATCH, self.num_rows - start)
            yield (
                torch.randn(count, 256, generator=generator),
                torch.randint(10, (count,), generator=generator),
            )


def mlp(width: int) -> nn.Module:
    """256 -> width -> width -> width -> 10."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(256, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
        *(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)),
    ).eval()


def by_traker(model: nn.Module, data: Drawn, folder: str) -> None:
    """Random columns, batch by batch."""
    settings = {"projector": trak.Sparse(512), "use_half_precision": True}
    traker = trak.TRAKer(model, "image_classification", data.num_rows, folder, device="cpu", **settings)
    traker.load_checkpoint(model.state_dict(), model_id=0)
    for batch in data:
        traker.featurize(batch, num_samples=len(batch[1]))


def by_default(model: nn.Module, data: Drawn, folder: str) -> None:
    """All that `trak.attribute` does before it scores."""
    method = trak.TRAK(model=model, task="image_classification", save_dir=folder, device="cpu")
    method.fit(data, [model.state_dict()])


def _featurize(run: Callable, num_rows: int, threads: int, answer) -> None:
    torch.set_num_threads(threads)
    model = mlp(128)
    with tempfile.TemporaryDirectory() as folder:
        warm = peak_kib()
        start, cpu = time.perf_counter(), time.process_time()
        run(model, Drawn(num_rows), folder)
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        answer.put((wall, cpu, warm, peak_kib()))


def featurizing(run: Callable, threads: int) -> list[dict]:
    """Seconds and peak memory over N."""
    context, out = multiprocessing.get_context("spawn"), []
    for num_rows in EXAMPLES:
        answers = context.Queue()
        child = context.Process(target=_featurize, args=(run, num_rows, threads, answers))
        child.start()
        wall, cpu, warm, peak = answers.get()
        child.join()
        out.append(
            {
                "rows": num_rows,
                "seconds": wall,
                "cpu_seconds": cpu,
                "peak_rss_mib": peak / 1024,
                "rss_before_mib": warm / 1024,
            }
        )
        print(run.__name__, out[-1], flush=True)
    return out


def scoring(clock) -> list[dict]:
    """Seconds over N·T: the least of three."""
    out = []
    for num_rows, num_targets in [
        *((n, TARGETS[1]) for n in SIZES),
        *((SIZES[1], t) for t in TARGETS if t != TARGETS[1]),
    ]:
        scores = make_scores(make_rows(None, num_rows, 512, "float32"), 512, num_targets)
        seconds = []
        for _ in range(3):
            start = clock()
            for _ in scores.blocks():
                pass
            seconds.append(clock() - start)
        out.append({"rows": num_rows, "targets": num_targets, "seconds": min(seconds)})
        print(out[-1], flush=True)
    return out


def parameters(rounds: int, memory_gib: float, clock, families: list[str], before: list[dict]) -> list[dict]:
    """Milliseconds per example over P; families that are not measured now stay as they were."""
    out = [one for one in before if one["family"] not in families]
    for family, widths in WIDTHS.items():
        if family not in families:
            continue
        for width in widths:
            model = mlp(width) if family == "MLP" else Encoder(width=width[0], depth=width[1]).eval()
            size = sum(p.numel() for p in model.parameters())
            batch_size = max(2, min(64, 64_000_000 // size))
            inputs = (
                torch.randn(batch_size, 256) if family == "MLP" else torch.randint(1000, (batch_size, 64))
            )
            batch = inputs, torch.randint(2, (batch_size,))
            paths = contenders(model, batch, 2048)
            chosen = {"plain": lambda m=model, b=batch: plain_pass(m, b), "Kronecker": paths["Kronecker"]()}
            # Far more than it takes: some models are left out for their time.
            if 3 * 4 * size * batch_size < memory_gib * 2**30:
                chosen["Sparse"] = paths["Sparse"]()
            if size <= LARGE_MODEL:
                chosen["Eigenbasis"] = paths["Eigenbasis"]()
            if size < 2_000_000:
                chosen["Rademacher"] = paths["Rademacher"]()
            for name, function in chosen.items():
                function()
                seconds = []
                for _ in range(rounds):
                    start = clock()
                    function()
                    seconds.append(clock() - start)
                examples = batch_size * LARGER.get(name, 1)
                ms = 1000 * min(seconds) / examples
                out.append(
                    {
                        "family": family,
                        "parameters": size,
                        "path": name,
                        "batch_size": examples,
                        "ms_per_example": ms,
                    }
                )
                print(out[-1], flush=True)
            del model, paths, chosen
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="featurize,attribute,score,parameters")
    parser.add_argument("--families", default=",".join(WIDTHS), help="of the part parameters")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-gib", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "growth.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = clock_for(options.threads)
    record = read_record(options.out) | conditions(options.threads) | {"clock": clock.__name__}
    steps = {
        "featurize": lambda: featurizing(by_traker, options.threads),
        "attribute": lambda: featurizing(by_default, options.threads),
        "score": lambda: scoring(clock),
        "parameters": lambda: parameters(
            options.rounds,
            options.memory_gib,
            clock,
            options.families.split(","),
            record.get("parameters", []),
        ),
    }
    for part in options.parts.split(","):
        record[part] = steps[part]()
        write_record(options.out, record)


if __name__ == "__main__":
    main()
