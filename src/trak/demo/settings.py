"""The demo's settings: all that decides its numbers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from trak import __version__
from trak.demo.data import DemoData
from trak.demo.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is trained and attributed.

    Attributes:
        seed: everything random is derived from it.
        corrupted_share: share of the training labels that are changed.
        subset_fraction: share of the training rows that each model sees.
        num_checkpoints: M, models whose predictions are attributed.
        num_subsets: S, further random subsets for the evaluation.
        models_per_subset: R, models retrained on each.
        projection_dim: K.
        num_shown: targets that get a card in the report, an even number.
        recipe: model and training.
    """

    seed: int = 0
    corrupted_share: float = 0.1
    subset_fraction: float = 0.5
    num_checkpoints: int = 10
    num_subsets: int = 40
    models_per_subset: int = 2
    projection_dim: int = 2048
    num_shown: int = 8
    recipe: Recipe = field(default_factory=Recipe)

    def derived_seed(self, purpose: str) -> int:
        """The first 63 bits of SHA-256 of "seed purpose": draws for different purposes are unrelated."""
        digest = hashlib.sha256(f"{self.seed} {purpose}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    def training_fingerprint(self, data: DemoData) -> str:
        """A hash of all that decides a trained model besides its subset's number: 12 hexadecimal digits.

        The numbers of checkpoints and subsets are not in it, so that a longer run goes on where a shorter one
        stopped.
        """
        facts: dict[str, Any] = {
            "recipe": asdict(self.recipe),
            "seed": self.seed,
            "corrupted_share": self.corrupted_share,
            "subset_fraction": self.subset_fraction,
            "data": data.source_hash,
            "trak": __version__,
            "torch": str(torch.__version__),
            "numpy": np.__version__,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def full_settings(seed: int) -> Settings:
    """The settings of `trak demo`."""
    return Settings(seed=seed)


def quick_settings(seed: int) -> Settings:
    """The settings of `trak demo --quick`: fewer checkpoints and subsets, the same models."""
    return Settings(seed=seed, num_checkpoints=5, num_subsets=20, models_per_subset=1)
