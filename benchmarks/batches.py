"""The functional path against plain `torch.func`, batches by tokens against batches by number, and loading beside computing.

    python benchmarks/batches.py [--rounds 7] [--threads 1]

functional: a network whose parameters no layer rule covers; `vmap(grad(f))` over the whole batch, written down plainly, is the best that torch.func
does on it. Medians of ratios, interleaved. ragged: sequences of 8 to 256 tokens through a small transformer, in the order given and 32 at a
time, and by a budget of as many tokens as the former batches have on average. loading: examples that take a moment to load, without and with a
thread that loads ahead; wall-clock time.
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
from featurize import Encoder
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import trak
from trak.datasets import DatasetRows, prefetched, token_budget_rows
from trak.gradients import model_state, select_parameters

TASK = trak.ImageClassification()


class Gated(nn.Module):
    """Weights that are gated by themselves: used by no layer that has a rule."""

    def __init__(self, width: int = 256, depth: int = 4):
        super().__init__()
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(width, width) / width**0.5) for _ in range(depth)
        )
        self.out = nn.Parameter(torch.randn(width, 2) / width**0.5)

    def forward(self, x):
        for weight in self.weights:
            x = torch.tanh(x @ (weight * torch.sigmoid(weight)))
        return (x @ self.out).mean(1)


def functional(rounds: int, clock) -> dict:
    """Ratios to plain vmap(grad)."""
    torch.manual_seed(0)
    model, batch = Gated().eval(), (torch.randn(32, 32, 256), torch.randint(2, (32,)))
    names = list(select_parameters(model, None))
    state = model_state(model, None, "cpu")
    own = {name: state[name].detach() for name in names}

    def f(parameters, inputs, label):
        logits = functional_call(model, parameters, (inputs[None],))
        return TASK.output(lambda _: logits, (inputs[None], label[None]))[0]

    plain = vmap(grad(f), in_dims=(None, 0, 0))

    def by_vmap():
        with sdpa_kernel(SDPBackend.MATH):
            plain(own, *batch)

    def ours(source):
        return lambda: source.compute(model, state, TASK, batch, names, lambda block: None)

    functions = {
        "vmap(grad)": by_vmap,
        "Functional()": ours(trak.Functional()),
        "Functional(chunk_size=32)": ours(trak.Functional(chunk_size=32)),
        "Functional(chunk_size=8)": ours(trak.Functional(chunk_size=8)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            start = clock()
            function()
            seconds[name].append(clock() - start)
    floor = seconds["vmap(grad)"]
    return {
        "seconds": statistics.median(floor),
        "ratios": {
            name: statistics.median(one / other for one, other in zip(values, floor))
            for name, values in seconds.items()
        },
    }


class Sequences:
    """Token sequences of unequal length; `wait` seconds to load each."""

    def __init__(self, count: int, wait: float = 0.0):
        generator = torch.Generator().manual_seed(0)
        self.lengths = (
            (8 * 2 ** (5 * torch.rand(count, generator=generator) ** 1.5)).long().clamp(8, 256).tolist()
        )
        self.rows = [torch.randint(1, 1000, (length,), generator=generator) for length in self.lengths]
        self.wait = wait

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        time.sleep(self.wait)
        return self.rows[row], row % 2


def collate(examples):
    """Padded to the longest."""
    ids = nn.utils.rnn.pad_sequence([ids for ids, _ in examples], batch_first=True)
    return ids, torch.tensor([label for _, label in examples])


def featurizer(model):
    """What to do with a source of rows: project every batch, throw it away; returns the tokens with padding."""
    shapes = select_parameters(model, None)
    state, projection = model_state(model, None, "cpu"), trak.Kronecker(512)
    drawn = projection.init(shapes)

    def run(source) -> int:
        tokens = 0
        for _, batch in source.batches():
            out = drawn.zeros(len(batch[1]))
            trak.Hooked().compute(
                model,
                state,
                TASK,
                batch,
                list(shapes),
                lambda block, out=out: projection.add(drawn, block, out),
            )
            tokens += batch[0].numel()
        return tokens

    return run


def ragged(rounds: int, clock) -> dict:
    """Batches by number and by tokens."""
    torch.manual_seed(0)
    run, data = featurizer(Encoder(width=64, depth=2).eval()), Sequences(512)
    by_number = DatasetRows(data, 32, collate)
    padded = run(by_number)
    budget = padded // (len(data) // 32)
    by_tokens = token_budget_rows(data, data.lengths, budget, collate=collate)
    again, seconds = run(by_tokens), {"by number": [], "by tokens": []}
    for _ in range(rounds):
        for name, source in (("by number", by_number), ("by tokens", by_tokens)):
            start = clock()
            run(source)
            seconds[name].append(clock() - start)
    return {
        "sequences": len(data),
        "tokens": sum(data.lengths),
        "token_budget": budget,
        "tokens_with_padding": {"by number": padded, "by tokens": again},
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratio": statistics.median(b / a for a, b in zip(seconds["by number"], seconds["by tokens"])),
    }


def loading(rounds: int) -> dict:
    """Wall-clock seconds without and with reading ahead; loading takes about as long as computing."""
    torch.manual_seed(0)
    run = featurizer(Encoder(width=64, depth=2).eval())
    start = time.perf_counter()
    run(DatasetRows(Sequences(128), 16, collate))
    data = Sequences(128, wait=(time.perf_counter() - start) / 128)
    plain = DatasetRows(data, 16, collate)
    seconds = {"one after the other": [], "prefetched": []}
    for _ in range(rounds):
        for name, source in (("one after the other", plain), ("prefetched", prefetched(plain))):
            start = time.perf_counter()
            run(source)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "median_seconds": medians,
        "loading_seconds": 128 * data.wait,
        "ratio": statistics.median(
            b / a for a, b in zip(seconds["one after the other"], seconds["prefetched"])
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "batches.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    record = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "trak": trak.__version__,
        "machine": platform.processor() or platform.machine(),
        "threads": options.threads,
        "clock": clock.__name__,
        "functional": functional(options.rounds, clock),
        "ragged": ragged(options.rounds, clock),
        "loading": loading(options.rounds),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
