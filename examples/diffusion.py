"""Which training images made a diffusion model good at this one? LDS of `trak.Diffusion` on a bank of small denoisers.

    python examples/diffusion.py --out diffusion

Trains denoising diffusion models of Fashion-MNIST's T-shirts and ankle boots (as bundled, averaged down to 7 × 7) on random halves of the
images, and checkpoints on all; attributes held-out images by the loss and by "square", which D-TRAK recommends, beside inner products of the
loss's gradients and random scores. The LDS is that of minus the loss of held-out images under the same noise for all models. Minutes of one
core; a killed run goes on where it was. Leaves result.json and proponents.png (matplotlib). Differences to the first row are paired.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from alternatives import compared
from experiment_page import number, table
from small_banks import Seconds, kept_scores
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, mse_loss, silu

import trak
from trak.demo.data import load_data
from trak.evaluation import Bank, noise_ceiling, retrain
from trak.frontier.clock import machine_facts
from trak.progress import bar

CLASSES = (0, 9)  # T-shirt and ankle boot
DATA_SEED, BANK_SEED, CHECKPOINT_SEED = 0, 0, 1
SIDE, SHOWN = 7, 3  # pixels of a side, proponents in the figure


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Everything with a number; `rate` is of Adam and falls to 0 linearly, `copies` are noised ones of each image in a step."""

    num_train: int = 400
    num_targets: int = 50
    width: int = 128
    steps: int = 100
    epochs: int = 200
    batch_size: int = 50
    copies: int = 4
    rate: float = 2e-3
    samples: int = 20
    subsets: int = 40
    models: int = 2
    checkpoints: int = 3


FEW = {"num_train": 30, "num_targets": 6, "width": 8, "epochs": 2, "batch_size": 15, "samples": 2}
QUICK = Sizes(**FEW, subsets=6, models=1, checkpoints=2)


def cosine_schedule(steps: int) -> Tensor:
    """ᾱ_t, float32 [T], much as in equation 17 of Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models", ICML 2021."""
    times = (torch.arange(1, steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008
    return (times * torch.pi / 2).cos().square().clamp(1e-3, 0.999).float()


class Denoiser(nn.Module):
    """ε_θ(x_t, t) = √(1 − ᾱ_t) x_t + √ᾱ_t · network: the first term is the best guess for white images, so that the network has the rest."""

    def __init__(self, width: int, alphas_T: Tensor) -> None:
        super().__init__()
        self.register_buffer("alphas_T", alphas_T)
        self.first, self.time = nn.Linear(SIDE * SIDE, width), nn.Linear(16, width)
        self.middle, self.last = nn.Linear(width, width), nn.Linear(width, SIDE * SIDE)

    def forward(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        share_B1 = timesteps[:, None].to(noisy.dtype) / len(self.alphas_T)
        angles = share_B1 * torch.pi * 2.0 ** torch.arange(8, device=noisy.device) / 2
        hidden = self.first(noisy.flatten(1)) + self.time(torch.cat([angles.sin(), angles.cos()], 1))
        rest = self.last(silu(self.middle(silu(hidden)))).reshape(noisy.shape)
        alphas = self.alphas_T[timesteps].reshape(-1, 1, 1, 1)
        return (1 - alphas).sqrt() * noisy + alphas.sqrt() * rest


def read_data(sizes: Sizes) -> SimpleNamespace:
    """`train` and `targets`, [N or T, 1, 7, 7], and as they are shown `train_pixels` and `target_pixels`, [N or T, 28, 28]."""
    data, order = load_data(corrupted_share=0.0, seed=0), torch.Generator().manual_seed(DATA_SEED)
    chosen = []
    for labels, count in ((data.true_labels, sizes.num_train), (data.test_labels, sizes.num_targets)):
        rows = torch.isin(labels, torch.tensor(CLASSES)).nonzero().squeeze(1)
        chosen.append(rows[torch.randperm(len(rows), generator=order)[:count]])
    train, targets = chosen
    given = {"train": data.images[train], "targets": data.test_images[targets]}
    small = {name: avg_pool2d(images, 28 // SIDE) for name, images in given.items()}
    return SimpleNamespace(**small, train_pixels=data.pixels[train], target_pixels=data.test_pixels[targets])


def train_model(images: Tensor, sizes: Sizes, alphas_T: Tensor) -> Denoiser:
    """One model; draws from torch's shared generator, which `retrain` seeds for each."""
    model = Denoiser(sizes.width, alphas_T)
    optimiser = torch.optim.Adam(model.parameters(), lr=sizes.rate)
    total = sizes.epochs * -(-len(images) // sizes.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / total)
    for _ in range(sizes.epochs):
        for rows in torch.randperm(len(images)).split(sizes.batch_size):
            clean = images[rows].repeat(sizes.copies, 1, 1, 1)
            timesteps, noise = torch.randint(sizes.steps, (len(clean),)), torch.randn_like(clean)
            alphas = alphas_T[timesteps].reshape(-1, 1, 1, 1)
            predicted = model(alphas.sqrt() * clean + (1 - alphas).sqrt() * noise, timesteps)
            optimiser.zero_grad()
            mse_loss(predicted, noise).backward()
            optimiser.step()
            schedule.step()
    return model


def train_bank(sizes: Sizes, data: SimpleNamespace, alphas_T: Tensor, folder: Path, **plan: Any) -> Bank:
    """Models and their outputs on the targets, minus the loss; those that are in the folder are read."""
    task = trak.Diffusion(alphas_T, num_samples=sizes.samples)
    recipe = {name: value for name, value in asdict(sizes).items() if name not in ("subsets", "checkpoints")}
    version = json.dumps({"version": 1, **recipe})
    kept = {"num_train": len(data.train), "folder": folder, "version": version}

    def train(rows: Tensor, seed: int) -> Denoiser:
        return train_model(data.train[rows], sizes, alphas_T)

    return retrain(train, lambda model: task.output(model, data.targets).detach(), **kept, **plan)


def methods(sizes: Sizes, data: Any, alphas_T: Tensor, checkpoints: list[Path], folder: Path) -> dict:
    """By name, functions that attribute the targets."""
    model, settings = Denoiser(sizes.width, alphas_T), {"num_samples": sizes.samples}
    loss, square = (trak.Diffusion(alphas_T, output_function=f, **settings) for f in ("loss", "square"))
    whole = {"projection": trak.Identity(), "save_dir": folder / "dot"}
    dot = trak.GradientSimilarity(model=model, task=loss, similarity="dot", **whole)

    def by_trak(task: trak.Diffusion) -> trak.Attribution:
        options = {"checkpoints": checkpoints, "save_dir": folder / task.output_function}
        return trak.attribute(model, data.train, data.targets, task=task, **options)

    return {
        "TRAK, loss": lambda: by_trak(loss),
        "TRAK, square (D-TRAK)": lambda: by_trak(square),
        "gradient dot product": lambda: dot.fit(data.train, checkpoints).attribute(data.targets),
        "random": lambda: trak.RandomScores(seed=0).fit(data.train).attribute(data.targets),
    }


def measure(bank: Bank, scores: dict[str, tuple[Tensor, float]]) -> list[dict[str, Any]]:
    """Rows of the table: LDS, its 95% interval, and that of the difference to the first row, in the same resamples."""
    found, rows = compared(bank, {name: [scores_NT] for name, (scores_NT, _) in scores.items()}), []
    for name, row in found.items():
        interval, gain = [row["low"], row["high"]], row.get("gain", [0.0, 0.0])
        row = {"method": name, "lds": row["lds"], "interval": interval, "gain": gain}
        rows.append({**row, "seconds": round(scores[name][1], 1)})
    return rows


def draw(data: SimpleNamespace, scores: dict[str, tuple[Tensor, float]], file: Path) -> None:
    """The first target and its strongest proponents by both output functions, as the data set has them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.8 * (SHOWN + 1), 4.6), layout="constrained")
    for line, name in zip(figure.subplots(2, SHOWN + 1), scores):
        values, rows = scores[name][0][:, 0].topk(SHOWN)
        titles = [f"target\n{name}", *(f"#{row}\n{value:.2g}" for row, value in zip(rows, values))]
        for axes, picture, title in zip(line, [data.target_pixels[0], *data.train_pixels[rows]], titles):
            axes.imshow(picture.numpy(), cmap="gray_r")
            axes.set_title(title, fontsize=8)
            axes.set_axis_off()
    figure.savefig(file, dpi=130)


def run(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """All stages; the result as JSON values."""
    data, alphas_T = read_data(sizes), cosine_schedule(sizes.steps)
    seconds, given = Seconds(folder / "seconds.jsonl"), (sizes, data, alphas_T)
    halves = {"num_subsets": sizes.subsets, "models_per_subset": sizes.models, "seed": BANK_SEED}
    whole = {"masks": torch.ones(1, sizes.num_train) > 0, "models_per_subset": sizes.checkpoints}
    with seconds.of("training"):
        bank = train_bank(*given, folder / "bank", **halves)
        full = train_bank(*given, folder / "checkpoints", keep_models=True, seed=CHECKPOINT_SEED, **whole)
    scores, found = {}, methods(*given, list(full.models), folder / "features")
    with seconds.of("attribution"), bar(len(found), "Attributing", unit="methods") as shown:
        for place, (name, compute) in enumerate(found.items()):
            scores[name] = kept_scores(folder / f"scores-{place}.safetensors", compute)
            shown.update(1)
    result = {
        "sizes": asdict(sizes),
        "seeds": {"data": DATA_SEED, "bank": BANK_SEED, "checkpoints": CHECKPOINT_SEED},
        "parameters": sum(p.numel() for p in Denoiser(sizes.width, alphas_T).parameters()),
        "loss of the targets": [-float(models.outputs.mean()) for models in (bank, full)],
        "noise ceiling": noise_ceiling(bank.outputs).mean if sizes.models > 1 else None,
        "methods": measure(bank, scores),
        "processor seconds": seconds.totals(),
        "machine": machine_facts(),
    }
    draw(data, scores, folder / "proponents.png")
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("diffusion"), help="folder of everything")
    parser.add_argument("--quick", action="store_true", help="few images and models; proves nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    lines = []
    for one in run(QUICK if options.quick else Sizes(), options.out)["methods"]:
        spans = [" to ".join(map(number, pair)) for pair in (one["interval"], one["gain"])]
        lines.append([one["method"], number(one["lds"]), *spans, str(one["seconds"])])
    print(table(["method", "LDS", "95%", "difference to the first", "seconds"], lines))


if __name__ == "__main__":
    main()
