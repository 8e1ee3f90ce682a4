"""What `torch.compile` would gain: the plain pass, the pass under hooks and `vmap(grad(f))`, each as it is and compiled, measured in turn.

    python benchmarks/compile.py [--cases resnet9-small,bert-128] [--rounds 7] [--threads 1]

The plain pass is that of `torch.compile(model)`. Compiled code calls no hooks that write down gradients, so the pass under hooks is
written as a function: each layer's output gets a zero added, whose gradient is that of the output, and layers' inputs are returned
beside it. That function and `vmap(grad(f))` are traced into one graph of forward and backward pass, which is compiled for its shapes; their
numbers are compared with those of the functions as they were. Compiling is wall-clock time, since it starts other processes, everything else
with one thread the process's own. It pays after as many examples as its seconds are the seconds that it saves for each.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import date
from pathlib import Path

import torch
from cases import CASES, matrix_layers
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

import trak
from trak.gradients import Auto, model_state, select_parameters

TASK = trak.ImageClassification()


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    return TASK.output(lambda _: logits, (logits, labels))


def factors_function(model: nn.Module, inputs: Tensor) -> tuple[Callable, dict[str, Tensor]]:
    """(parameters, inputs, labels, zeros) -> layer: (its input, the gradient of Σ_b f(z_b) by its output), and the zeros."""
    layers = matrix_layers(model)

    def hooked(make: Callable[[str], Callable]) -> ExitStack:
        hooks = ExitStack()
        for name, module in layers.items():
            hooks.callback(module.register_forward_hook(make(name)).remove)
        return hooks

    shapes: dict[str, torch.Size] = {}

    def note(name):
        return lambda module, args, output: shapes.update({name: output.shape})

    with hooked(note), torch.no_grad():
        model(inputs)

    def f(zeros, parameters, inputs, labels):
        seen: dict[str, Tensor] = {}

        def add(name):
            def hook(module, args, output):
                seen[name] = args[0]
                return output + zeros[name]

            return hook

        with hooked(add):
            logits = functional_call(model, parameters, (inputs,))
        return margins(logits, labels).sum(), seen

    def run(parameters, inputs, labels, zeros):
        gradients, seen = grad(f, has_aux=True)(zeros, parameters, inputs, labels)
        return {name: (seen[name], gradients[name]) for name in layers}

    return run, {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}


def per_example_function(model: nn.Module) -> Callable:
    """(parameters, buffers, inputs, labels) -> parameter: its gradients [B, *shape]."""

    def f(parameters, buffers, inputs, label):
        return margins(functional_call(model, (parameters, buffers), (inputs[None],)), label[None])[0]

    def run(parameters, buffers, inputs, labels):
        with sdpa_kernel(SDPBackend.MATH):
            return vmap(grad(f), in_dims=(None, None, 0, 0))(parameters, buffers, inputs, labels)

    return run


def compiled(function: Callable, arguments: tuple) -> tuple[Callable[[], object], float, float]:
    """(the function compiled for these arguments, wall-clock seconds of it, largest relative error of a result)."""
    start = time.perf_counter()
    graph = make_fx(function)(*arguments)
    fast = torch.compile(graph, fullgraph=True)
    with torch.no_grad():
        got = fast(*arguments)
    seconds = time.perf_counter() - start
    pairs = zip(pytree.tree_leaves(got), pytree.tree_leaves(function(*arguments)), strict=True)
    error = max(float((one - other).norm() / other.norm().clamp_min(1e-30)) for one, other in pairs)

    def run():
        with torch.no_grad():
            return fast(*arguments)

    return run, seconds, error


def measure(case, rounds: int, clock) -> dict:
    """Seconds, ratios to the plain pass, seconds of compiling and errors."""
    torch.manual_seed(0)
    model, (inputs, labels) = case.model(), case.data(case.batch_size)
    names = list(select_parameters(model, None))
    state = model_state(model, None, "cpu")
    own = {name: state[name] for name in names}
    rest = {name: tensor for name, tensor in state.items() if name not in own}

    def plain(module):
        def run():
            case.losses(module(inputs), labels).mean().backward()
            model.zero_grad(set_to_none=True)

        return run

    hooked = Auto().candidates(model, names)[0]
    factors, zeros = factors_function(model, inputs)
    per_example = per_example_function(model)
    functions = {
        "plain": plain(model),
        "factors": lambda: hooked.compute(model, state, TASK, (inputs, labels), names, lambda block: None),
        "factors, as a function": lambda: factors(state, inputs, labels, zeros),
        "vmap(grad)": lambda: per_example(own, rest, inputs, labels),
    }
    facts: dict[str, dict] = {}
    start = time.perf_counter()
    fast = torch.compile(model)
    plain(fast)()
    functions["plain, compiled"] = plain(fast)
    facts["plain, compiled"] = {"compile_seconds": time.perf_counter() - start}
    for name, function, arguments in (
        ("factors, as a function", factors, (state, inputs, labels, zeros)),
        ("vmap(grad)", per_example, (own, rest, inputs, labels)),
    ):
        run, seconds, error = compiled(function, arguments)
        functions[f"{name}, compiled"] = run
        facts[f"{name}, compiled"] = {"compile_seconds": seconds, "error": error}
        print(case.name, name, facts[f"{name}, compiled"], flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for turn in range(rounds):
        order = list(functions)[turn % len(functions) :] + list(functions)[: turn % len(functions)]
        for name in order:
            start = clock()
            functions[name]()
            seconds[name].append(clock() - start)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "batch_size": case.batch_size,
        "rounds": rounds,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratios": {
            name: statistics.median(one / other for one, other in zip(values, seconds["plain"]))
            for name, values in seconds.items()
        },
        "compiled": facts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default="resnet9-small,bert-128", help="names, with commas")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "compile.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    record = json.loads(options.out.read_text()) if options.out.exists() else {}
    results = record.get("results", {})
    for name in options.cases.split(","):
        results[name] = measure(CASES[name], options.rounds, clock)
        print(name, json.dumps(results[name], indent=2), flush=True)
        record = {
            "date": date.today().isoformat(),
            "torch": torch.__version__,
            "trak": trak.__version__,
            "machine": platform.processor() or platform.machine(),
            "threads": options.threads,
            "clock": clock.__name__,
            "results": results,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
