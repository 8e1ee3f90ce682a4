"""TRAK where rows are fewer than columns, by the N × N matrix of inner products: whole gradients, and any number of dampings, at no price.

Legend: N training rows, T targets, K columns, M checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import trak
from trak.datasets import as_rows
from trak.methods.runs import RunOptions, featurize_targets, start_run
from trak.precondition.damping import GroupMoments


@dataclass(frozen=True, eq=False)
class Kernel:
    """Inner products of the features of one checkpoint, float64.

    Attributes:
        train_NN: of training rows, ΦΦᵀ.
        cross_NT: of training rows and targets.
        weights_N: q, the derivative of each row's loss with respect to f.
    """

    train_NN: Tensor
    cross_NT: Tensor
    weights_N: Tensor

    @property
    def dot_products(self) -> Tensor:
        """−∇L(z_i)ᵀ∇f(z), [N, T]: a first step of gradient descent."""
        return self.weights_N[:, None] * self.cross_NT


def make_kernel(options: RunOptions, train_set: Any, targets: Any, checkpoint: Path) -> Kernel:
    """Of the features that the options say, which are made if they are not in `options.save_dir`."""
    run = start_run(options, train_set, [checkpoint])
    experiment = featurize_targets(run, as_rows(targets, batch_size=options.batch_size, what="targets"))
    (model_id,) = run.model_ids
    train, others = run.store.rows(model_id), run.store.rows(model_id, experiment)
    train_NK = train.read(0, train.num_rows).features
    targets_TK = others.read(0, others.num_rows).features
    products = (
        (train_NK @ those.T).double() for those in (train_NK, targets_TK)
    )  # formed in the store's dtype
    return Kernel(*products, train.weights().double())


def kept_kernel(file: Path, options: RunOptions, train_set: Any, targets: Any, checkpoint: Path) -> Kernel:
    """The same, read from a file if it is there."""
    if not file.is_file():
        kernel = make_kernel(options, train_set, targets, checkpoint)
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".part")
        save_file(vars(kernel), unfinished)
        unfinished.rename(file)
    return Kernel(**load_file(file))


@dataclass(frozen=True, eq=False)
class Gram:
    """One checkpoint's Gram matrix by its eigendecomposition, with the weights that are the default of `trak.TRAK`.

    With A = R^½ Φ the resolvent is (AᵀA + λ)⁻¹ = (I − Aᵀ(AAᵀ + λ)⁻¹A) / λ, and AAᵀ has the trace and the non-zero eigenvalues of the Gram
    matrix AᵀA.

    Attributes:
        kernel: of the checkpoint.
        weights_N: √q of a log loss, otherwise q.
        root_N: R^½, with R = √(q (1 − q)) for a log loss, otherwise 1.
        gram_NN: AAᵀ.
        values_N: its eigenvalues.
        vectors_NN: its eigenvectors.
    """

    kernel: Kernel
    weights_N: Tensor
    root_N: Tensor
    gram_NN: Tensor
    values_N: Tensor
    vectors_NN: Tensor

    @classmethod
    def of(cls, kernel: Kernel, *, is_log_loss: bool) -> Gram:
        """By one decomposition, after which any number of λ are free."""
        q_N = kernel.weights_N
        root_N = (q_N * (1 - q_N)) ** 0.25 if is_log_loss else torch.ones_like(q_N)
        gram_NN = root_N[:, None] * kernel.train_NN * root_N
        values_N, vectors_NN = torch.linalg.eigh(gram_NN)
        return cls(
            kernel, q_N.sqrt() if is_log_loss else q_N, root_N, gram_NN, values_N.clamp_min(0), vectors_NN
        )

    def dimension(self, damping: float) -> float:
        """Σ w / (w + λ), the effective dimension."""
        return float((self.values_N / (self.values_N + damping)).sum())

    def damping(self, rule: trak.Damping | float, num_checkpoints: int) -> float:
        """λ by a rule; or for a number, at which that is the effective dimension."""
        if isinstance(rule, trak.Damping):
            if rule.of_diagonal:
                raise ValueError(
                    f"the diagonal of the Gram matrix is not had from inner products; got {rule}"
                )
            nothing_N = torch.zeros_like(self.values_N)
            return rule.value(
                GroupMoments(self.gram_NN, nothing_N, len(nothing_N), 0.0, num_checkpoints=num_checkpoints)
            )
        low, high = 1e-12 * float(self.values_N.sum()), float(self.values_N.sum()) / rule
        for _ in range(60):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if self.dimension(middle) > rule else (low, middle)
        return high

    def solved(self, damping: float) -> Tensor:
        """Φ (ΦᵀRΦ + λ)⁻¹ φ(z), [N, T]."""
        inner_NT = self.vectors_NN.T @ (self.root_N[:, None] * self.kernel.cross_NT)
        inner_NT = self.vectors_NN @ (inner_NT / (self.values_N + damping)[:, None])
        return (self.kernel.cross_NT - self.kernel.train_NN @ (self.root_N[:, None] * inner_NT)) / damping


def dual_scores(grams: Sequence[Gram], rule: trak.Damping | float) -> Tensor:
    """Scores of `trak.TRAK` with its default weights and Gram matrix, [N, T], from inner products alone.

    Args:
        grams: of M checkpoints.
        rule: for λ > 0; or an effective dimension.
    """
    solved = [gram.solved(gram.damping(rule, len(grams))) for gram in grams]
    weights_N = torch.stack([gram.weights_N for gram in grams]).mean(0)
    return weights_N[:, None] * torch.stack(solved).mean(0)
