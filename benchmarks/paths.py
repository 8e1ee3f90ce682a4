"""Each way to project, at equal K: what it costs and what it is worth.

    python benchmarks/paths.py [--bank ../shared/banks/cifar2] [--dim 2048] [--paths Kronecker,Eigenbasis,Sparse,Rademacher] [--checkpoints 3]

TRAK with its defaults on a recipe's model, data and targets, with one and with all --checkpoints, judged by a bank of retrained models: the linear
datamodeling score with its bootstrap interval over subsets and targets; and the seconds that featurizing and solving took, training set and
targets, in plain passes over the same examples, measured in between. Features are kept in --work, so that a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import runpy
import statistics
from pathlib import Path

import torch
from records import RESULTS, clock_for, conditions, read_record, write_record
from torch.nn import functional as F

import trak
from trak.evaluation import Bank
from trak.methods.runs import RunOptions, load_state, resolve_setting

ROOT = Path(__file__).resolve().parents[1]
PATHS = {
    "Kronecker": lambda dim: trak.Kronecker(dim),
    "Eigenbasis": lambda dim: trak.Eigenbasis(dim),
    "Sparse": lambda dim: trak.Sparse(dim),
    "Rademacher": lambda dim: trak.Rademacher(dim),
    "Gaussian": lambda dim: trak.Gaussian(dim),
}


def plain_seconds(recipe: dict, clock, examples: int = 1000) -> float:
    """Seconds of a forward and backward pass for one example, at the first checkpoint."""
    options = RunOptions(model=recipe["model"], task=recipe["task"], device="cpu")
    state = load_state(options, resolve_setting(options), recipe["checkpoints"][0])
    model = recipe["model"].eval()
    model.load_state_dict(state, strict=False)
    inputs, labels = (part[:examples] for part in recipe["train_set"])
    start = clock()
    for rows in torch.arange(len(labels)).split(recipe["batch_size"]):
        F.cross_entropy(model(inputs[rows].float()), labels[rows]).backward()
        model.zero_grad(set_to_none=True)
    return (clock() - start) / len(labels)


def run_path(name: str, recipe: dict, dim: int, count: int, work: Path, clock) -> dict:
    """Seconds of each checkpoint (None for those that were there), and scores of one and of all."""
    method = trak.TRAK(
        model=recipe["model"],
        task=recipe["task"],
        projection=PATHS[name](dim),
        save_dir=work / name,
        device="cpu",
        batch_size=recipe["batch_size"],
    )
    seconds = []
    known = work / f"{name}.json"
    done = json.loads(known.read_text()) if known.exists() else []
    for index, checkpoint in enumerate(recipe["checkpoints"][:count]):
        if index < len(done):
            seconds.append(done[index])
            continue
        before = plain_seconds(recipe, clock)
        start = clock()
        method.fit(recipe["train_set"], [checkpoint]).attribute(recipe["targets"])
        spent = clock() - start
        plain = statistics.mean([before, plain_seconds(recipe, clock)])
        rows = len(recipe["train_set"][1]) + len(recipe["targets"][1])
        seconds.append({"seconds": spent, "plain_passes": spent / rows / plain})
        done = seconds
        known.write_text(json.dumps(done))
        print(
            f"{name}: checkpoint {index}: {spent:.0f} s, {seconds[-1]['plain_passes']:.2f} plain passes",
            flush=True,
        )
    attributions = {
        number: method.fit(recipe["train_set"], recipe["checkpoints"][:number]).attribute(recipe["targets"])
        for number in sorted({1, count})
    }
    return {"checkpoints": seconds, "attributions": attributions}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, default=ROOT / "examples" / "recipes" / "cifar2.py")
    parser.add_argument("--bank", type=Path, default=ROOT.parent / "shared" / "banks" / "cifar2")
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--paths", default="Kronecker,Eigenbasis,Sparse,Rademacher")
    parser.add_argument("--checkpoints", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("paths-features"))
    parser.add_argument("--out", type=Path, default=RESULTS / "paths.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = clock_for(options.threads)
    recipe = runpy.run_path(str(options.recipe))
    bank = Bank.load(options.bank)
    options.work.mkdir(parents=True, exist_ok=True)
    record = {"paths": {}} | read_record(options.out)
    for name in options.paths.split(","):
        found = run_path(name, recipe, options.dim, options.checkpoints, options.work, clock)
        lds = {}
        for number, attribution in found["attributions"].items():
            result = bank.lds(attribution.scores)
            lds[str(number)] = {"mean": result.mean, "low": result.low, "high": result.high}
            print(name, number, result, flush=True)
        record["paths"][name] = {"checkpoints": found["checkpoints"], "lds": lds, "dim": options.dim}
        record |= {
            **conditions(options.threads),
            "clock": clock.__name__,
            "title": recipe["title"],
            "rows": len(recipe["train_set"][1]),
            "targets": len(recipe["targets"][1]),
            "parameters": sum(p.numel() for p in recipe["model"].parameters()),
        }
        write_record(options.out, record)


if __name__ == "__main__":
    main()
