"""Shapley values of the training examples of a nearest-neighbour classifier.

Jia, Dao, Wang, Hubis, Gurel, Li, Zhang, Spanos, Song: "Efficient Task-Specific Data Valuation for Nearest Neighbor Algorithms",
VLDB 2019, theorem 1.

Shape legend: N training rows, T targets, t targets of one block, D numbers per example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trak.batches import describe
from trak.datasets import RowSource, as_rows
from trak.errors import InputError
from trak.memory import available_memory
from trak.methods.base import Attributor, FittedAttributor
from trak.methods.representation_similarity import compare
from trak.methods.representations import RepresentationOptions, Representations, collect, represent
from trak.results import Attribution
from trak.scores import ArrayScores
from trak.tasks import Task

_BLOCK_PAIRS = 1 << 22


@dataclass(frozen=True, eq=False, kw_only=True)
class KNNShapley(RepresentationOptions, Attributor):
    """Exact Shapley values of the training examples in the game that an unweighted k-NN classifier plays for each target.

    The value of a subset S is the share of the target's label among its nearest neighbours in S, v(S) = 1/k Σ_{j ≤ min(k, |S|)}
    1[y_j = y]. With the training examples in order of distance, and m_i = 1[y_i = y]:

        s_N = m_N min(k, N)/(k N),    s_i = s_{i+1} + (m_i − m_{i+1})/k · min(k, i)/i

    Positive: the example pulls the vote towards the target's label. Each target's scores add up to v of the whole training set; sums
    over a validation set's targets value the training examples. Averaged over checkpoints. The whole N × T matrix is made at once,
    since each target orders all training examples.

    Without a model the inputs themselves are compared; checkpoints are then not read. The authors use features of a pretrained
    network.

    Attributes:
        k: number of neighbours that vote.
        distance: "euclidean" or "cosine"; training examples at the same distance are taken in their order.
        model: the module whose representations are compared, see `RepresentationSimilarity`; None for the inputs.
        task: says how to call the model on a batch; needed with a model.
        labels: batch -> class labels [B]; None for the last item of a tuple, or "labels" or "label" of a mapping.
    """

    k: int = 5
    distance: str = "euclidean"
    model: nn.Module | None = None
    task: Task | str | Callable[..., Tensor] | None = None
    labels: Callable[[Any], Tensor] | None = None

    def fit(self, train_set: Any, checkpoints: Sequence[Any] | None = None) -> FittedKNNShapley:
        """Represent the training set and read its labels.

        Raises:
            InputError: an impossible k or distance, a model without a task, a layer without a model, or batches without labels.
            TrakError: anything wrong with the other arguments and the checkpoints.
        """
        if not isinstance(self.k, int) or isinstance(self.k, bool) or self.k < 1:
            raise InputError(f"k must be a whole number ≥ 1; got {self.k!r}")
        if self.distance not in ("euclidean", "cosine"):
            raise InputError(f'distance must be "euclidean" or "cosine"; got {self.distance!r}')
        train = as_rows(train_set, batch_size=self.batch_size, what="train_set")
        labels_N = self._labels(train, "train_set")
        if self.model is None:
            if self.layer is not None:
                raise InputError(f"layer={self.layer!r} needs the model it belongs to: pass model= and task=")
            return FittedKNNShapley(self, train, labels_N, None, (self._inputs(train, "Inputs"),))
        if self.task is None:
            raise InputError(
                'a model needs a task= that says how it is called, e.g. task="image_classification"'
            )
        found = represent(self, self.model, self.task, train, checkpoints)
        return FittedKNNShapley(self, train, labels_N, found, found.features)

    def _inputs(self, source: RowSource, label: str) -> Tensor:
        def compute(batch: Any) -> Any:
            inputs = batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch
            if self.transform is not None:
                return self.transform(inputs)
            return inputs.float() if isinstance(inputs, Tensor) and not inputs.is_floating_point() else inputs

        return collect(source, compute, label, self.progress)

    def _labels(self, source: RowSource, what: str) -> Tensor:
        labels_N = torch.empty(source.num_rows, dtype=torch.int64)
        for rows_B, batch in source.batches():
            labels = self.labels(batch) if self.labels is not None else _own_labels(batch)
            if not isinstance(labels, Tensor) or labels.shape != rows_B.shape or labels.is_floating_point():
                raise InputError(
                    f"{what}: KNNShapley needs integer class labels [{len(rows_B)}] for a batch of {len(rows_B)} examples; got "
                    f"{describe(labels)} from {describe(batch)}. Pass labels=, a function of the batch"
                )
            labels_N[rows_B] = labels.cpu().long()
        return labels_N


@dataclass(frozen=True, eq=False)
class FittedKNNShapley(FittedAttributor):
    """See `KNNShapley`."""

    method: KNNShapley
    train: RowSource
    labels: Tensor
    representations: Representations | None
    features: tuple[Tensor, ...]

    def attribute(self, targets: Any) -> Attribution:
        """Shapley values [N, T], computed now.

        Raises:
            InputError: targets of another size, without labels, or too many for N × T numbers in memory.
        """
        method = self.method
        target_rows = as_rows(targets, batch_size=method.batch_size, what="targets")
        _refuse_large(self.train.num_rows, target_rows.num_rows, self.features[0].element_size())
        labels_T = method._labels(target_rows, "targets")
        found = self.representations
        vectors = (method._inputs(target_rows, "Targets"),) if found is None else found.of(target_rows)
        total_NT: Tensor | None = None
        for train_ND, targets_TD in zip(self.features, vectors):
            if train_ND.shape[1] != targets_TD.shape[1]:
                raise InputError(
                    f"training examples have {train_ND.shape[1]} numbers and targets {targets_TD.shape[1]}: they must have the same size"
                )
            values_NT = _values(train_ND, targets_TD, self.labels, labels_T, method.k, method.distance)
            total_NT = values_NT if total_NT is None else total_NT.add_(values_NT)
        assert total_NT is not None
        info: dict[str, Any] = {"method": "KNN-Shapley", "k": method.k, "distance": method.distance}
        if found is None:
            info["features"] = "inputs"
        else:
            info["features"] = found.layer if found.layer is not None else "input of the last Linear"
            info["checkpoints"] = list(found.hashes)
        return Attribution(
            scores=ArrayScores(total_NT.div_(len(vectors))),
            info=info,
            train_rows=self.train,
            target_rows=target_rows,
        )


def shapley_values(matches_tN: Tensor, k: int) -> Tensor:
    """The recursion for training examples in order of distance, nearest first.

    Args:
        matches_tN: [t, N] whether the label of each is the target's.
        k: number of neighbours that vote.

    Returns:
        [t, N] float64.
    """
    matches_tN = matches_tN.double()
    count = matches_tN.shape[1]
    position_N = torch.arange(1, count + 1, dtype=torch.float64)
    share_N = position_N.clamp_max(k) / position_N / k
    steps_tN = matches_tN * share_N
    steps_tN[:, :-1] -= matches_tN[:, 1:] * share_N[:-1]
    return steps_tN.flip(1).cumsum(1).flip(1)


def _values(
    train_ND: Tensor, targets_TD: Tensor, labels_N: Tensor, labels_T: Tensor, k: int, distance: str
) -> Tensor:
    """Shapley values [N, T] at one checkpoint, targets block by block."""
    out_NT = train_ND.new_empty(len(train_ND), len(targets_TD))
    block = max(1, _BLOCK_PAIRS // len(train_ND))
    for start in range(0, len(targets_TD), block):
        part = slice(start, start + block)
        closeness_tN = compare(targets_TD[part], train_ND, distance)
        order_tN = closeness_tN.sort(dim=1, descending=True, stable=True).indices
        values_tN = shapley_values(labels_N[order_tN] == labels_T[part].unsqueeze(1), k)
        out_NT[:, part] = torch.empty_like(values_tN).scatter_(1, order_tN, values_tN).T.to(out_NT.dtype)
    return out_NT


def _own_labels(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return batch.get("labels", batch.get("label"))
    return batch[-1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None


def _refuse_large(num_train: int, num_targets: int, size: int) -> None:
    needed, available = num_train * num_targets * size, available_memory()
    if available is not None and needed > 0.8 * available:
        raise InputError(
            f"{num_train:,} × {num_targets:,} Shapley values need {needed / 2**30:.1f} GiB and {available / 2**30:.1f} GiB of memory are free: "
            "attribute fewer targets at a time"
        )
