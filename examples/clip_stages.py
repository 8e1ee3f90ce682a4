"""The stages of `clip_flickr.py`: train, look, choose, attribute, remove. Each reads what an earlier run has finished.

Legend: N training pairs, H held-out pairs, K removal sizes, C models, t targets.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clip_data import Pairs
from clip_towers import Family, alignment
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import trak
from trak.evaluation import Bank, RemovalResult, removal_curve, retrain
from trak.progress import bar

SNAPSHOTS = 3  # along the training of each checkpoint, the end included: what TracIn sums over
CONTROL_SEED, REMOVAL_SEED, TARGET_SEED = 1, 1000, 0  # checkpoints have the seeds 0, 1, …


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """The models that are attributed.

    Attributes:
        files: for each model its snapshots, the last one of the trained model.
        rates: mean learning rates before each snapshot.
    """

    files: list[list[Path]]
    rates: list[list[float]]

    @property
    def trained(self) -> list[Path]:
        """The last snapshot of each model."""
        return [each[-1] for each in self.files]


class Clock:
    """Adds up the processor time of trainings in a file, so that a run in several pieces knows what it took."""

    def __init__(self, file: Path) -> None:
        self._file = file

    @contextmanager
    def __call__(self) -> Iterator[None]:
        start = time.process_time()
        yield
        with self._file.open("a") as lines:
            lines.write(f"{time.process_time() - start:.3f}\n")

    def total(self) -> float:
        """Seconds so far."""
        return sum(map(float, self._file.read_text().split()))


def train_checkpoints(family: Family, clock: Clock, options: argparse.Namespace) -> Checkpoints:
    """Train what is missing, each model on all pairs from its own seed.

    Raises:
        SystemExit: a snapshot there is of other settings.
    """
    folder = options.out / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    files = [
        [folder / f"model-{model}-snapshot-{number}.safetensors" for number in range(SNAPSHOTS)]
        for model in range(options.checkpoints)
    ]
    with bar(len(files), "Checkpoints", unit="models") as shown:
        for seed, snapshots in enumerate(files):
            if not all(file.is_file() for file in snapshots):
                with clock():
                    _, found = family.train(torch.arange(family.num_train), seed, SNAPSHOTS)
                for file, snapshot in zip(snapshots, found):
                    about = {"version": family.version, "learning_rate": repr(snapshot.learning_rate)}
                    save_file(snapshot.state, file.with_suffix(".part"), about)
                    os.replace(file.with_suffix(".part"), file)
            shown.update(1)
    return Checkpoints(files=files, rates=[[_rate(file, family) for file in each] for each in files])


def _rate(file: Path, family: Family) -> float:
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    if about["version"] != family.version:
        raise SystemExit(
            f"{file} is of other settings:\n  there {about['version']}\n  asked {family.version}\nPass another --out."
        )
    return float(about["learning_rate"])


@torch.no_grad()
def look_at(family: Family, checkpoints: Checkpoints) -> tuple[Tensor, Tensor, dict[str, float]]:
    """(similarity of all pairs [N, H], alignment [H], how good the models are), means over checkpoints.

    The similarity of two pairs is the mean of the cosines of their images and of their texts: neighbours in CLIP space.
    """
    model, similarity, aligned, quality = family.build(0), [], [], []
    for file in checkpoints.trained:
        model.load_state_dict(trak.load_checkpoint(file))
        model.eval()
        images_ND, texts_ND = family.embed(model, family.train_set)
        images_HD, texts_HD = family.embed(model, family.held_out)
        similarity.append((images_ND @ images_HD.T + texts_ND @ texts_HD.T).cpu() / 2)
        cosines_HH = (images_HD @ texts_HD.T).double().cpu()
        matched_H, size = cosines_HH.diagonal(), len(cosines_HH)
        aligned.append(matched_H)
        ranks_H = (cosines_HH > matched_H[:, None]).sum(1)
        unmatched = (cosines_HH.sum() - matched_H.sum()) / (size * (size - 1))
        quality.append([matched_H.mean().item(), unmatched.item(), (ranks_H < 10).double().mean().item()])
    names = ("matched", "unmatched", "recall_10")
    means = dict(zip(names, np.mean(quality, axis=0).tolist()))
    return torch.stack(similarity).mean(0), torch.stack(aligned).mean(0), means


def choose_targets(aligned_H: Tensor, count: int) -> list[int]:
    """Held-out pairs drawn from the better half by alignment at the checkpoints: what was not learned cannot fall.

    More targets begin with those of fewer.

    Raises:
        SystemExit: there are not as many.
    """
    better = aligned_H.argsort(descending=True, stable=True)[: len(aligned_H) // 2]
    if count > len(better):
        raise SystemExit(f"--targets {count}: half of the held-out pairs are {len(better)}.")
    drawn = torch.randperm(len(better), generator=torch.Generator().manual_seed(TARGET_SEED))[:count]
    return better[drawn].tolist()


def attribute(
    family: Family, checkpoints: Checkpoints, options: argparse.Namespace
) -> dict[str, trak.Attribution]:
    """TRAK over the trained models and TracIn over all snapshots of some of them, of every held-out pair.

    TracIn is defined along one run of training; over several it is their sum.
    """
    common: dict[str, Any] = {
        "model": family.build(0),
        "task": family.task(options.negatives),
        "parameters": list(family.parameters),
        # Random columns, as in the paper: TracIn reads the same features.
        "projection": trak.Sparse(dim=options.dim),
        "save_dir": options.out / "features",
        "feature_dtype": "float16",
        "device": options.device,
        "batch_size": options.batch_size,
    }
    snapshots = [file for each in checkpoints.files[: options.trajectories] for file in each]
    rates = [rate for each in checkpoints.rates[: options.trajectories] for rate in each]
    tracin = trak.TracIn(**common, learning_rates=rates)
    return {
        "TRAK": trak.TRAK(**common).fit(family.train_set, checkpoints.trained).attribute(family.held_out),
        "TracIn": tracin.fit(family.train_set, snapshots).attribute(family.held_out),
    }


def control_masks(num_rows: int, ks: Sequence[int], count: int) -> Tensor:
    """[(1 + K) · count, N]: all pairs, then all but k random ones for each k, the largest first.

    So that a smaller k may be added later, after the masks that were there.
    """
    masks = torch.ones(1 + len(ks), count, num_rows, dtype=torch.bool)
    for draw in range(count):
        order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(draw))
        for place, k in enumerate(sorted(ks, reverse=True), start=1):
            masks[place, draw, order[:k]] = False
    return masks.flatten(0, 1)


class Retrain:
    """(rows, seed) -> alignment and excess [2H] of a model trained on these pairs."""

    def __init__(self, family: Family, clock: Clock) -> None:
        self._family, self._clock = family, clock

    def model(self, rows: Tensor, seed: int) -> torch.nn.Module:
        with self._clock():
            return self._family.train(rows, seed)[0]

    def outputs(self, model: torch.nn.Module) -> Tensor:
        return alignment(self._family, model)

    def __call__(self, rows: Tensor, seed: int) -> Tensor:
        return self.outputs(self.model(rows, seed))


def train_controls(family: Family, again: Retrain, options: argparse.Namespace) -> Bank:
    """Models on all pairs, and on all but random ones; finished models are read from the folder."""
    return retrain(
        again.model,
        again.outputs,
        num_train=family.num_train,
        masks=control_masks(family.num_train, options.k, options.controls),
        seed=CONTROL_SEED,
        folder=options.out / "controls",
        version=family.version,
    )


def remove(
    again: Retrain, scores: dict[str, Tensor], chosen: list[int], family: Family, options: argparse.Namespace
) -> RemovalResult:
    """Outputs of the targets without the strongest pairs of each, by each method: alignments first, then excesses.

    The excess of a target counts as another target with the same scores, hence the same rows: its models are those that are there.
    """
    num_held_out = next(iter(scores.values())).shape[1]
    return removal_curve(
        again,
        {name: one.repeat(1, 2) for name, one in scores.items()},
        k=options.k,
        targets=[*chosen, *(num_held_out + target for target in chosen)],
        num_seeds=options.seeds,
        random=False,
        seed=REMOVAL_SEED,
        folder=options.out / "removals",
        version=family.version,
    )


def collect(controls: Bank, removed: RemovalResult) -> dict[str, Any]:
    """For alignment and excess: that of the targets with all pairs, and without some by k and method; a row for each model."""
    outputs_SCt = (
        controls.outputs[:, 0, removed.targets.tolist()]
        .double()
        .unflatten(0, (1 + len(removed.k), -1))
        .numpy()
    )
    base_Ct = np.concatenate([outputs_SCt[0], removed.full_outputs])
    found: dict[str, Any] = {}
    half = len(removed.targets) // 2
    for measure, part in (("alignment", slice(None, half)), ("excess", slice(half, None))):
        without = {}
        for place, k in enumerate(removed.k):
            rows = {
                name: curve.changes[place] + removed.full_outputs for name, curve in removed.curves.items()
            }
            rows["random"] = outputs_SCt[len(removed.k) - place]
            without[str(k)] = {name: values[:, part].round(5).tolist() for name, values in rows.items()}
        found[measure] = {"controls": base_Ct[:, part].round(5).tolist(), "without": without}
    return found


def shared_rows(scores: dict[str, Tensor], chosen: list[int], k: int) -> dict[str, float]:
    """Mean share of TRAK's top k that is among the other methods' top k."""
    tops = {name: one[:, chosen].topk(k, dim=0).indices for name, one in scores.items()}
    own = tops.pop("TRAK")
    return {
        name: float(
            np.mean(
                [
                    np.isin(own[:, place].numpy(), other[:, place].numpy()).mean()
                    for place in range(len(chosen))
                ]
            )
        )
        for name, other in tops.items()
    }


def gallery(
    train: Pairs,
    held_out: Pairs,
    chosen: list[int],
    similarity_NH: Tensor,
    attribution: trak.Attribution,
    k: int = 5,
) -> list[dict[str, Any]]:
    """What `clip_results.draw_gallery` shows of some targets."""
    top, bottom = attribution.top(k).rows, attribution.bottom(k).rows

    def shown(row: int) -> tuple[Any, str]:
        return train.images[row].permute(1, 2, 0).numpy(), train.captions[row][0]

    return [
        {
            "image": held_out.images[target].permute(1, 2, 0).numpy(),
            "text": held_out.captions[target][0],
            "rows": {
                "CLIP neighbours": [shown(int(row)) for row in similarity_NH[:, target].topk(k).indices],
                "TRAK proponents": [shown(int(row)) for row in top[target]],
                "TRAK opponents": [shown(int(row)) for row in bottom[target]],
            },
        }
        for target in chosen
    ]
