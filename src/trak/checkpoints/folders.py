"""All checkpoints of a training run."""

from __future__ import annotations

import os
from functools import partial
from itertools import pairwise
from pathlib import Path

from torch import nn

from trak.checkpoints.read import CheckpointSource, load_checkpoint
from trak.checkpoints.steps import steps_in
from trak.errors import CheckpointError


def list_checkpoints(
    folder: str | os.PathLike[str], *, model: nn.Module | None = None
) -> list[CheckpointSource]:
    """The checkpoints in a training run's folder by ascending step, for `checkpoints=`.

    These are the folders checkpoint-500, checkpoint-1000, … of a Hugging Face `Trainer`, or files whose names have a step in them:
    Lightning's epoch=0-step=500.ckpt, the step-00000500.safetensors of `trak.integrations`.

    Args:
        folder: the run's output folder.
        model: the model they are for, where they must be fitted to it: adapters, trainable parameters only, prefixes (see
            `trak.load_checkpoint`).

    Returns:
        Paths; with `model`, callables that load one each.

    Raises:
        CheckpointError: no such folder, none in it, or two of one step.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}: expected the output folder of a training run.")
    found = steps_in(folder)
    if not found:
        names = sorted(entry.name for entry in folder.iterdir())
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        raise CheckpointError(
            f"{folder} holds no checkpoints of a run: expected folders checkpoint-STEP or files with step-STEP or step=STEP in "
            f"their names; found {shown or 'nothing'}. Pass their paths as a list in the order of training."
        )
    for (step, one), (other_step, other) in pairwise(found):
        if step == other_step:
            raise CheckpointError(
                f"{folder} holds two checkpoints of step {step}, {one.name} and {other.name}: of two runs, or of one twice? Move one "
                "away, or pass a list of paths."
            )
    paths: list[CheckpointSource] = [path for _, path in found]
    return paths if model is None else [partial(load_checkpoint, path, model=model) for path in paths]
