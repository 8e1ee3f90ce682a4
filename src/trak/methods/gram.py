"""Gradients by their coordinates in their own span: exact, and shorter where there are fewer examples than parameters.

With K = GGᵀ = LLᵀ the rows of L [N, N] have the inner products of the gradients G [N, P]. What is made of training gradients and of inner
products with them only (a Gauss-Newton matrix, its solves, scores) is the same in either.

Shape legend: N training rows, R rows of one block, T targets, P parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trak.errors import InputError, NonFiniteError, SingularGramError
from trak.memory import available_memory
from trak.methods.gradient_passes import Passes, Products, State
from trak.methods.samples import some_rows

_SHARE = 0.25
"""Of the memory that is free, for a block of gradients."""
_UNKNOWN = 2 << 30
"""Bytes for a block where the system does not say what is free."""
_LARGEST_SHIFT = 1e-3


@dataclass(frozen=True, eq=False)
class Span:
    """The training gradients of one checkpoint in an orthonormal basis of their span.

    Attributes:
        root: L, lower triangular [N, N] float64; row i stands for ∇f(z_i).
        outputs: f, [N].
        weights: q = −∂L/∂f, [N].
    """

    root: Tensor
    outputs: Tensor
    weights: Tensor

    def coordinates(self, cross_NT: Tensor, squares_T: Tensor) -> Tensor:
        """Other vectors in this basis, [T, N + 1] float64, from their inner products with the training gradients and their squared norms.

        The last coordinate is the length of the part outside of the span.
        """
        inside_TN = torch.linalg.solve_triangular(self.root, cross_NT.double(), upper=False).T
        outside_T = (squares_T.double() - inside_TN.square().sum(1)).clamp_min(0).sqrt()
        return torch.cat([inside_TN, outside_T.unsqueeze(1)], dim=1)


def training_span(passes: Passes, state: State, *, where: str, rows_at_once: int | None = None) -> Span:
    """The span of a checkpoint's training gradients.

    N²P multiplications, and N²/2 numbers of memory beside a block of as many gradients as a quarter of the free memory holds: the training
    set is read once for each block, from that block on.

    Args:
        passes: the training set.
        state: the checkpoint, on the device.
        where: names the checkpoint in messages.
        rows_at_once: R; None for what fits.

    Raises:
        InputError: N × N numbers do not fit in memory.
        NonFiniteError: an output, a weight or a gradient is NaN or infinite.
        SingularGramError: all gradients are zero, or rounding leaves no root of K.
    """
    count, dtype = passes.train.num_rows, passes.setting.sum_dtype
    refuse_large_gram(count)
    size = rows_at_once or block_rows(count, passes.num_parameters * dtype.itemsize)
    gram_NN = torch.empty(count, count, dtype=torch.float64)
    outputs_N, weights_N = torch.empty(count, dtype=dtype), torch.empty(count, dtype=dtype)
    for start in range(0, count, size):
        stop = min(start + size, count)
        label = f"Gram matrix, {where}, rows {start} to {stop - 1}"
        block = _products(passes, state, start, stop, None, label)
        outputs_N[start:stop], weights_N[start:stop] = block.outputs, block.weights
        features_RP = block.values
        gram_NN[start:stop, start:stop] = features_RP @ features_RP.T
        if stop < count:
            # Below the diagonal only: that is all that the factorisation reads.
            below = _products(passes, state, stop, count, features_RP.T, label)
            gram_NN[stop:, start:stop] = below.values
        del block, features_RP
    return Span(_root(gram_NN, torch.finfo(dtype).eps, where), outputs_N, weights_N)


def block_rows(num_rows: int, row_bytes: int) -> int:
    """Rows of equal blocks, each of which takes a quarter of the free memory at the most."""
    free = available_memory()
    most = max(1, int((_UNKNOWN if free is None else _SHARE * free) // row_bytes))
    return -(-num_rows // -(-num_rows // most))


def refuse_large_gram(num_rows: int) -> None:
    """Raise InputError if K and its root, in float64, do not fit in memory."""
    needed, free = 2 * 8 * num_rows**2, available_memory()
    if free is not None and needed > 0.8 * free:
        raise InputError(
            f"inner products of {num_rows:,} training gradients and their root need {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of "
            'memory are free: use space="parameters" with fewer parameters=, or EKFACInfluence'
        )


def _products(
    passes: Passes, state: State, start: int, stop: int, matrix_PR: Tensor | None, label: str
) -> Products:
    return passes.products(state, some_rows(passes.train, torch.arange(start, stop)), matrix_PR, label=label)


def _root(gram_NN: Tensor, precision: float, where: str) -> Tensor:
    """The lower triangular root of K, which is read below the diagonal, and changed.

    What rounding (and gradients that depend on each other) may have taken from the smallest eigenvalues is added to the diagonal: as little as
    will do, from the gradients' precision on, relative to their mean square.

    Raises:
        NonFiniteError, SingularGramError: see `training_span`.
    """
    diagonal_N = gram_NN.diagonal()
    size, shift = float(diagonal_N.mean()), 0.0
    if not torch.isfinite(diagonal_N).all():
        raise NonFiniteError(
            f"{where}: squares of gradients are too large for their precision: try dtype=torch.float64"
        )
    if size == 0:
        raise SingularGramError(f"{where}: all training gradients are zero, so that nothing has an influence")
    wanted = precision
    while wanted <= _LARGEST_SHIFT:
        diagonal_N += (wanted - shift) * size
        shift = wanted
        root_NN, failed = torch.linalg.cholesky_ex(gram_NN)
        if not int(failed):
            return root_NN
        wanted *= 10
    raise SingularGramError(
        f"{where}: rounding has left the training gradients' inner products without a root: try dtype=torch.float64"
    )
