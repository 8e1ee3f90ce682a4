"""The demo's trained models on disk, a file each, so that a second run goes on where the first stopped.

OUT/models-FINGERPRINT/checkpoint-000.safetensors     trained on a random half; these are attributed
OUT/models-FINGERPRINT/subset-000-model-0.safetensors trained on an evaluation subset
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from trak.demo.data import DemoData
from trak.demo.recipe import State, margins, train_many
from trak.demo.settings import Settings
from trak.evaluation import random_subsets
from trak.files import write_whole
from trak.progress import bar


@dataclass(frozen=True, eq=False)
class Bank:
    """Trained models.

    Attributes:
        folder: where they are.
        checkpoints: parameters of the M models to attribute.
        checkpoint_files: their files.
        checkpoint_masks: [M, N] bool, the rows they saw.
        subset_masks: [S, N] bool, the evaluation's subsets; drawn apart from the checkpoints' halves.
        subset_outputs: [S, R, T] float32, the output f of each test image after training on each subset.
    """

    folder: Path
    checkpoints: tuple[State, ...]
    checkpoint_files: tuple[Path, ...]
    checkpoint_masks: Tensor
    subset_masks: Tensor
    subset_outputs: Tensor


def train_bank(data: DemoData, settings: Settings, out: Path, *, progress: bool | None = None) -> Bank:
    """Train whatever is not there yet, and evaluate the retrained models on the test images.

    Args:
        data: images and labels.
        settings: numbers of models, recipe, seed.
        out: folder that holds the models' folder.
        progress: True or False to force the bar.

    Returns:
        The models.
    """
    folder = out / f"models-{settings.training_fingerprint(data)}"
    folder.mkdir(parents=True, exist_ok=True)
    num_rows, fraction = len(data.labels), settings.subset_fraction
    checkpoint_masks = random_subsets(
        num_rows, settings.num_checkpoints, fraction, seed=settings.derived_seed("checkpoint subsets")
    )
    subset_masks = random_subsets(
        num_rows, settings.num_subsets, fraction, seed=settings.derived_seed("evaluation subsets")
    )
    repeats = settings.models_per_subset
    names = [f"checkpoint-{index:03d}" for index in range(settings.num_checkpoints)]
    names += [f"subset-{s:03d}-model-{r}" for s in range(settings.num_subsets) for r in range(repeats)]
    masks = torch.cat([checkpoint_masks, subset_masks.repeat_interleave(repeats, dim=0)])
    files = tuple(folder / f"{name}.safetensors" for name in names)
    _train_missing(data, settings, masks, files, progress=progress)

    states = [load_file(file) for file in files]
    outputs = [
        margins(state, data.test_images, data.test_labels, recipe=settings.recipe)
        for state in states[settings.num_checkpoints :]
    ]
    return Bank(
        folder=folder,
        checkpoints=tuple(states[: settings.num_checkpoints]),
        checkpoint_files=files[: settings.num_checkpoints],
        checkpoint_masks=checkpoint_masks,
        subset_masks=subset_masks,
        subset_outputs=torch.stack(outputs).reshape(settings.num_subsets, repeats, -1),
    )


def _train_missing(
    data: DemoData, settings: Settings, masks: Tensor, files: Sequence[Path], *, progress: bool | None
) -> None:
    """Train the models whose file is not there; a file appears whole or not at all."""
    missing = [index for index, file in enumerate(files) if not file.is_file()]
    done = len(files) - len(missing)
    seeds = [settings.derived_seed(f"model {files[index].stem}") for index in missing]
    with bar(len(files), "Training ConvNets", unit="models", enabled=progress, initial=done) as shown:
        trained = train_many(data.images, data.labels, masks[missing], seeds, recipe=settings.recipe)
        for index, state in zip(missing, trained):
            write_whole(files[index], save(state))
            shown.update(1)
