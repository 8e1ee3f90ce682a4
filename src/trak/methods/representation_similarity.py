"""Similarity of representations: what a layer makes of two examples, compared.

Hanawa, Yokoi, Hara, Inui: "Evaluation of Similarity-Based Explanations", ICLR 2021; "representation similarity" among the baselines of
Park et al. 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trak.datasets import as_rows
from trak.errors import InputError
from trak.methods.base import Attributor, FittedAttributor
from trak.methods.dot_scores import unit_rows
from trak.methods.representations import RepresentationOptions, Representations, represent
from trak.results import Attribution
from trak.scores import Scores
from trak.tasks import Task

SIMILARITIES = ("dot", "cosine", "euclidean")


@dataclass(frozen=True, eq=False, kw_only=True)
class RepresentationSimilarity(RepresentationOptions, Attributor):
    """τ(z_i, z) = 1/M Σ_m s(h_m(z_i), h_m(z)), with h_m(z) a layer's output (or the last Linear's input) at checkpoint m.

    s is hᵀh' ("dot"), hᵀh'/(‖h‖‖h'‖) ("cosine") or −‖h − h'‖² ("euclidean"). It looks at inputs only: neither the labels nor the
    loss enter, so that a high score says "alike", not that the example raised the target's output. One forward pass for each example.

    Attributes:
        model: the module; it comes back as it was.
        task: says how to call the model on a batch, as in `trak.attribute`.
        similarity: "dot", "cosine" or "euclidean".
    """

    model: nn.Module
    task: Task | str | Callable[..., Tensor]
    similarity: str = "dot"

    def fit(self, train_set: Any, checkpoints: Sequence[Any] | None = None) -> FittedRepresentationSimilarity:
        """Represent the training set at every checkpoint: N × D numbers for each, in memory.

        Raises:
            InputError: an unknown similarity or layer, or a layer that gives no tensor with a row per example.
            TrakError: anything wrong with the other arguments and the checkpoints.
        """
        if self.similarity not in SIMILARITIES:
            raise InputError(
                f"similarity must be one of {', '.join(map(repr, SIMILARITIES))}; got {self.similarity!r}"
            )
        representations = represent(self, self.model, self.task, train_set, checkpoints)
        return FittedRepresentationSimilarity(representations, self.similarity)


@dataclass(frozen=True, eq=False)
class FittedRepresentationSimilarity(FittedAttributor):
    """See `RepresentationSimilarity`."""

    representations: Representations
    similarity: str

    def attribute(self, targets: Any) -> Attribution:
        """1/M Σ_m s(h_m(z_i), h_m(z)), [N, T], computed where it is read.

        Raises:
            TrakError: anything wrong with the targets, or a checkpoint that has changed.
        """
        found = self.representations
        target_rows = as_rows(targets, batch_size=found.options.batch_size, what="targets")
        parts = tuple(zip(found.features, found.of(target_rows)))
        for train_ND, targets_TD in parts:
            if train_ND.shape[1] != targets_TD.shape[1]:
                raise InputError(
                    f"representations have {train_ND.shape[1]} numbers for the training set and {targets_TD.shape[1]} for the targets: give a "
                    "transform= that pools what differs in length"
                )
        info = {
            "method": f"representation {self.similarity}",
            "layer": found.layer if found.layer is not None else "input of the last Linear",
            "dimension": int(parts[0][0].shape[1]),
            "checkpoints": list(found.hashes),
        }
        return Attribution(
            scores=PairScores(parts, self.similarity, found.options.progress),
            info=info,
            train_rows=found.train,
            target_rows=target_rows,
        )


@dataclass(frozen=True, eq=False, repr=False)
class PairScores(Scores):
    """Mean over checkpoints of the similarity of vectors that are in memory.

    Attributes:
        parts: (training vectors [N, D], target vectors [T, D]) of each checkpoint.
        similarity: see `RepresentationSimilarity`.
        progress: of the bar over blocks.
    """

    parts: tuple[tuple[Tensor, Tensor], ...]
    similarity: str
    progress: bool | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, T)."""
        return self.parts[0][0].shape[0], self.parts[0][1].shape[0]

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start to stop, [stop − start, T]."""
        products = [compare(train[start:stop], targets, self.similarity) for train, targets in self.parts]
        return torch.stack(products).mean(0)

    def select_targets(self, targets: Tensor) -> Scores:
        """Some of the targets."""
        return replace(self, parts=tuple((train, some[targets]) for train, some in self.parts))


def compare(train_RD: Tensor, targets_TD: Tensor, similarity: str) -> Tensor:
    """Similarity of every pair, [R, T]; larger is more alike."""
    targets_TD = targets_TD.to(train_RD.dtype)
    if similarity == "dot":
        return train_RD @ targets_TD.T
    if similarity == "cosine":
        return unit_rows(train_RD) @ unit_rows(targets_TD).T
    # Not ‖h‖² + ‖h'‖² − 2 hᵀh', which cancels for neighbours.
    distances_RT = torch.cdist(train_RD, targets_TD, compute_mode="donot_use_mm_for_euclid_dist")
    return -distances_RT.square()
