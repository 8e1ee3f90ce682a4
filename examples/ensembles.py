"""Cheaper ensembles: what does a training run, or one checkpoint, give beyond a single estimate? LDS on CIFAR-2.

    python examples/ensembles.py --data ../shared --save-dir features --json ensembles.json

Compares, at equal numbers of training runs: one final checkpoint; its weights q averaged over earlier epochs of the run (forward passes only);
all epochs as an ensemble; members made by adding noise to the weights of one checkpoint; several projections of one checkpoint; and
more training runs. Cost is counted in passes of per-example gradients over the training set, and training runs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from cifar2 import Bank, ResNet9, load_bank
from safetensors.torch import load_file
from torch import Tensor

import trak

EPOCHS = (4, 8, 16)
PAPER = {"weight_exponent": 1.0, "gram": "uniform"}


@dataclass(frozen=True)
class Setting:
    """A way to make an ensemble.

    Attributes:
        name: in words.
        runs: how many models are trained to the end.
        passes: of per-example gradients over the training set.
        methods: (TRAK, checkpoints) whose scores are averaged; several differ in their projection.
    """

    name: str
    runs: int
    passes: int
    methods: list[tuple[trak.TRAK, list]]


def perturbed(path: Path, noise: float, seed: int) -> dict[str, Tensor]:
    """The checkpoint with noise added to its weights: for each tensor Gaussian, `noise` times its root mean square."""
    generator = torch.Generator().manual_seed(seed)
    state = load_file(path)
    for name, value in state.items():
        # Running statistics belong to the weights as trained: they stay.
        if name.endswith(("weight", "bias")):
            scale = noise * float(value.square().mean().sqrt())
            state[name] = value + scale * torch.randn(value.shape, generator=generator)
    return state


def settings(bank: Bank, options: argparse.Namespace, seed: int) -> Iterator[Setting]:
    """The ensembles to be had from the training run of one seed (and of others, for comparison)."""
    folder = bank.checkpoints[seed].parent
    last = bank.checkpoints[seed]
    epochs = [folder / f"seed{seed:02d}_epoch{epoch:02d}.safetensors" for epoch in EPOCHS]

    def method(projection_seed: int = 0, **more) -> trak.TRAK:
        return trak.TRAK(
            model=ResNet9(),
            task="image_classification",
            projection=trak.Sparse(dim=options.dim, seed=projection_seed),
            save_dir=None if options.save_dir is None else options.save_dir / f"projection-{projection_seed}",
            batch_size=100,
            **more,
        )

    yield Setting("one checkpoint, as in the paper", 1, 1, [(method(**PAPER), [last])])
    yield Setting("one checkpoint", 1, 1, [(method(), [last])])
    yield Setting("weights averaged over 4 epochs", 1, 1, [(method(trajectories=[epochs]), [last])])
    for count in (1, 2, 3):
        chosen = [*epochs[-count:], last]
        yield Setting(f"last {count + 1} of epochs 4, 8, 16, 24", 1, count + 1, [(method(), chosen)])
        plain = method(**PAPER)
        yield Setting(f"last {count + 1} epochs, as in the paper", 1, count + 1, [(plain, chosen)])
    for noise in options.noise:
        members = [last, *(perturbed(last, noise, 100 * seed + member) for member in range(3))]
        yield Setting(f"with 3 members of noise {noise:g}", 1, 4, [(method(), members)])
    yield Setting("2 projections", 1, 2, [(method(number), [last]) for number in range(2)])
    yield Setting("4 projections", 1, 4, [(method(number), [last]) for number in range(4)])
    yield Setting("2 runs", 2, 2, [(method(), [last, bank.checkpoints[seed + 2]])])
    yield Setting("4 runs", 4, 4, [(method(), [last, *bank.checkpoints[seed + 2 : seed + 5]])])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=Path("../shared"), help="folder with data/ and banks/cifar2/")
    add("--seeds", type=int, nargs="+", default=[0, 1], help="the runs whose epochs were kept")
    add("--dim", type=int, default=4096, help="K")
    add("--noise", type=float, nargs="*", default=[0.05, 0.1], help="relative size of weight noise")
    add("--targets", type=int, default=None, help="only the first so many targets")
    add("--save-dir", type=Path, default=None, help="keep features there")
    add("--json", type=Path, default=None, help="write the results there")
    options = parser.parse_args()

    bank = load_bank(options.data, options.targets)
    results = []
    for seed in options.seeds:
        for setting in settings(bank, options, seed):
            parts = [
                method.fit(bank.train_set, checkpoints).attribute(bank.targets).scores.tensor()
                for method, checkpoints in setting.methods
            ]
            found = trak.evaluation.lds(torch.stack(parts).mean(0), bank.masks, bank.margins)
            results.append(
                {"seed": seed, "name": setting.name, "runs": setting.runs, "passes": setting.passes}
                | {"lds": found.mean, "low": found.low, "high": found.high}
            )
            print(
                f"run {seed}  {setting.name:42s} runs {setting.runs}  passes {setting.passes}  "
                f"LDS {found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]",
                flush=True,
            )
            if options.json is not None:
                options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
