"""The functional path against plain `torch.func`, batches by tokens against batches by number, and loading beside computing.

    python benchmarks/batches.py [--rounds 7] [--threads 1] [--parts functional,ragged,loading]

functional: `trak.Functional()` against `vmap(grad(f))`, written down plainly, over the whole batch and in chunks, of which the fastest is the
floor; networks of which no layer rule covers all, a ResNet and a transformer. Medians of ratios, interleaved; freed memory is kept by the process,
since pages that the system hands out anew take some calls half as long again, whichever function it is. ragged: sequences of 8 to 256
tokens through a small transformer, in the order given and 32 at a time, and by a budget of as many tokens as the former batches have on
average. loading: examples that take a moment to load, without and with a thread that loads ahead; wall-clock time.
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
from cases import CASES
from featurize import Encoder
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import trak
from trak.allocator import keep_freed_memory
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


class Gained(nn.Module):
    """Convolutions with a learned gain on their outputs, used twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, 2, 1)
        self.last, self.head = nn.Conv2d(32, 32, 3, 2, 1), nn.Linear(32, 2)
        self.gain = nn.Parameter(torch.ones(32, 1, 1))

    def forward(self, x):
        x = F.relu(self.down(F.relu(self.stem(x)))) * self.gain
        return self.head(F.relu(self.last(x) * self.gain).mean((2, 3)))


class Recurrent(nn.Module):
    """A gated recurrent unit, step by step."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.embed, self.cell = nn.Embedding(500, width), nn.GRUCell(width, width)
        self.head = nn.Linear(width, 2)

    def forward(self, ids):
        x = self.embed(ids)
        state = torch.zeros_like(x[:, 0])
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state)


def _of(inputs):
    return lambda size: (inputs(size), torch.randint(2, (size,)))


FUNCTIONAL = {
    "weights gated by themselves": (Gated, _of(lambda size: torch.randn(size, 32, 256))),
    "convolutions with a gain": (Gained, _of(lambda size: torch.randn(size, 3, 32, 32))),
    "recurrent, 32 tokens": (Recurrent, _of(lambda size: torch.randint(500, (size, 32)))),
    "ResNet-9": (CASES["resnet9-small"].model, CASES["resnet9-small"].data),
    "BERT, 128 tokens": (CASES["bert-128"].model, CASES["bert-128"].data),
}
"""Title to what makes the model, and what makes a batch of so many examples."""
SIZES = (8, 32)


def functional(rounds: int, clock) -> list[dict]:
    """Every network at every batch size."""
    if not keep_freed_memory():
        print("this C library gives freed memory back: expect noise")
    torch.manual_seed(0)
    found = []
    for title, (build, data) in FUNCTIONAL.items():
        model = build().eval()
        for size in SIZES:
            found.append(
                {"title": title, "batch_size": size, **against_vmap(model, data(size), rounds, clock)}
            )
            print(found[-1], flush=True)
    return found


def against_vmap(model, batch, rounds: int, clock) -> dict:
    """Seconds of the fastest plain vmap(grad), and ratios to it."""
    names, size = list(select_parameters(model, None)), len(batch[1])
    state = model_state(model, None, "cpu")
    own = {name: state[name].detach() for name in names}
    rest = {name: tensor for name, tensor in state.items() if name not in own}

    def f(parameters, inputs, label):
        logits = functional_call(model, (parameters, rest), (inputs[None],))
        return TASK.output(lambda _: logits, (inputs[None], label[None]))[0]

    def by_vmap(chunk):
        plain = vmap(grad(f), in_dims=(None, 0, 0), chunk_size=chunk)

        def run():
            with sdpa_kernel(SDPBackend.MATH):
                plain(own, *batch)

        return run

    def ours(source):
        return lambda: source.compute(model, state, TASK, batch, names, lambda block: None)

    chunks = [None, *(chunk for chunk in (4, 8, 16) if chunk < size)]
    functions = {f"vmap(grad), {chunk or 'whole'}": by_vmap(chunk) for chunk in chunks}
    plain = list(functions)
    functions |= {
        "Functional()": ours(trak.Functional()),
        f"Functional(chunk_size={size // 4})": ours(trak.Functional(chunk_size=size // 4)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for turn in range(rounds):
        # Another one first each time: the first finds other caches.
        order = list(functions)[turn % len(functions) :] + list(functions)[: turn % len(functions)]
        for name in order:
            start = clock()
            functions[name]()
            seconds[name].append(clock() - start)
    floor = min(plain, key=lambda name: statistics.median(seconds[name]))
    return {
        "floor": floor,
        "seconds": statistics.median(seconds[floor]),
        "ratios": {
            name: statistics.median(one / other for one, other in zip(values, seconds[floor]))
            for name, values in seconds.items()
        },
        "least": {name: min(values) for name, values in seconds.items()},
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
    parser.add_argument(
        "--parts", default="functional,ragged,loading", help="others stay as they were recorded"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "batches.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    parts = {
        "functional": lambda: functional(options.rounds, clock),
        "ragged": lambda: ragged(options.rounds, clock),
        "loading": lambda: loading(options.rounds),
    }
    record = json.loads(options.out.read_text()) if options.out.exists() else {}
    record |= {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "trak": trak.__version__,
        "machine": platform.processor() or platform.machine(),
        "threads": options.threads,
        "clock": clock.__name__,
    }
    for name in options.parts.split(","):
        record[name] = parts[name]()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps({name: record[name] for name in options.parts.split(",")}, indent=2))


if __name__ == "__main__":
    main()
