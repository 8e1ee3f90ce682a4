"""Gradients in the basis of Kronecker factors, whitened and projected at random or cut off: a trial, for `alternatives.py --what whitening`.

A parameter's gradient as a matrix M [R, C] is turned into the eigenvectors of its two second moments and divided by the roots of damped
eigenvalues,

    M̃ = (Uᵀ M V) / sqrt(Λ + λ),      E[ρ M Mᵀ] = U L Uᵀ,   E[ρ MᵀM] = V S Vᵀ,   ρ = (q (1 − q))^γ / Σ (q (1 − q))^γ

with Λ = E[ρ (UᵀMV)²], entry by entry (EK-FAC), or Λ = L Sᵀ / Σ S (K-FAC), and λ = ratio · mean(Λ) + FLOOR · the mean over all parameters: some
gradients are zero but for rounding (the bias of an attention's keys), and divided by their own size they would be noise as large as the rest.

Inner products of M̃ are those of EK-FAC influence functions, and a random projection of M̃ keeps them in expectation (`Whitened`). `Leading` keeps
the K entries of UᵀMV with the largest eigenvalues instead, with or without the division: no randomness, and no error but what is cut off.

Other than in Martens and Grosse's factors the positions of one example are not taken for independent, so that every layer is treated alike:
E[ρ M Mᵀ] is E[ρ |a|² g gᵀ] for a layer with one position, inputs a and output gradients g. A bias is a matrix of one column, whitened by all of its
covariance. A side of more than LARGEST_SIDE numbers (an embedding's vocabulary) is not turned, and K-FAC has EK-FAC's eigenvalues there. Every
parameter is to be used once in a forward pass.

Shape legend: B examples of a batch, R rows and C columns of a parameter, T positions, K features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from trak.blocks import Block, DenseBlock, IndexBlock, OuterBlock
from trak.datasets import as_rows
from trak.gradients import forward_outputs, select_gradients
from trak.methods.runs import RunOptions, load_state, resolve_setting
from trak.pipeline import bound_task, curvature_weights, prepare
from trak.projection import Projection
from trak.projection.base import Columns, ProjectionState, Shapes
from trak.projection.pieces import is_large_table, table_pieces, upcast

LARGEST_SIDE = 2048
FLOOR = 1e-4


@dataclass(frozen=True, eq=False)
class Factors:
    """One parameter's eigenvectors U [R, R] and V [C, C], None for a side that is not turned, Λ [R, C] and the least λ."""

    rows: Tensor | None
    columns: Tensor | None
    eigenvalues: Tensor
    floor: float = 0.0

    def turned(self, block: Block) -> Block:
        """UᵀMV of each example, as factors where the block is of factors."""
        if _is_outer(block):
            left = block.left if self.rows is None else block.left @ self.rows
            right = block.right if self.columns is None else block.right @ self.columns
            return replace(block, left=left, right=right)
        if isinstance(block, IndexBlock) and self.rows is None:
            return block if self.columns is None else replace(block, values=block.values @ self.columns)
        matrices_BRC = _matrices(block)
        if self.rows is not None:
            matrices_BRC = self.rows.T @ matrices_BRC
        if self.columns is not None:
            matrices_BRC = matrices_BRC @ self.columns
        return _dense(block, matrices_BRC)

    def scale(self, ratio: float) -> Tensor:
        """1 / sqrt(Λ + λ), [R, C]."""
        return (self.eigenvalues + ratio * self.eigenvalues.mean() + self.floor).rsqrt()

    def whitened(self, block: Block, ratio: float) -> Block:
        """UᵀMV / sqrt(Λ + λ) of each example."""
        block, scale_RC = self.turned(block), self.scale(ratio)
        if is_large_table(block):
            return replace(block, values=block.values * scale_RC[block.indices])
        return _dense(block, _matrices(block) * scale_RC)


@dataclass(frozen=True, eq=False)
class Whitened(Projection):
    """Another projection, of whitened gradients.

    Attributes:
        inner: the other one.
        factors: a checkpoint's number -> its factors.
        ratio: damping, in units of each parameter's mean eigenvalue.
        factors_kind: what `factors` are, for the fingerprint.
    """

    inner: Projection
    factors: Callable[[int], Mapping[str, Factors]]
    ratio: float
    factors_kind: str

    kind = "whitened"
    version = 1

    def columns(self, shapes: Shapes) -> tuple[Columns, ...]:
        return self.inner.columns(shapes)

    def init(self, shapes: Shapes, *, checkpoint: int = 0, **options: Any) -> ProjectionState:
        return self.inner.init(shapes, checkpoint=checkpoint, **options)

    def add(self, state: ProjectionState, block: Block, out_BK: Tensor) -> None:
        factors = self.factors(state.checkpoint)[block.name]
        self.inner.add(state, factors.whitened(upcast(block, state.dtype), self.ratio), out_BK)

    def matrix(self, state: ProjectionState, name: str) -> Tensor:
        """[P_name, K], from unit gradients."""
        return _matrix(self, state, name)

    def fingerprint(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "version": self.version,
            "inner": self.inner.fingerprint(),
            "factors": self.factors_kind,
            "ratio": self.ratio,
        }


@dataclass(frozen=True, eq=False)
class LeadingState(ProjectionState):
    """Of each parameter: its factors, and the flattened entries k of UᵀMV that are kept, their columns and what they are multiplied by."""

    chosen: Mapping[str, tuple[Factors, Tensor, Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Leading(Projection):
    """The entries of UᵀMV with the K largest eigenvalues Λ of all parameters, in descending order.

    Attributes:
        dim: K.
        factors: a checkpoint's number -> its factors.
        ratio: damping of the whitening, as in `Whitened`; None keeps the entries as they are.
        factors_kind: what `factors` are, for the fingerprint.
    """

    dim: int
    factors: Callable[[int], Mapping[str, Factors]]
    ratio: float | None
    factors_kind: str

    kind = "leading"
    version = 1

    def columns(self, shapes: Shapes) -> tuple[Columns, ...]:
        return (Columns("all", 0, self.dim),)

    def init(
        self,
        shapes: Shapes,
        *,
        checkpoint: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> LeadingState:
        factors = self.factors(checkpoint)
        largest_K = torch.cat([factors[name].eigenvalues.flatten() for name in shapes]).topk(self.dim).indices
        chosen, first = {}, 0
        for name in shapes:
            own = factors[name]
            columns_k = ((largest_K >= first) & (largest_K < first + own.eigenvalues.numel())).nonzero()[:, 0]
            entries_k = largest_K[columns_k] - first
            first += own.eigenvalues.numel()
            if len(columns_k):
                scale_RC = torch.ones_like(own.eigenvalues) if self.ratio is None else own.scale(self.ratio)
                chosen[name] = (own, entries_k, columns_k, scale_RC.flatten()[entries_k])
        return LeadingState(dict(shapes), checkpoint, self.dim, torch.device(device), dtype, chosen)

    def add(self, state: LeadingState, block: Block, out_BK: Tensor) -> None:
        if block.name not in state.chosen:
            return
        factors, entries_k, columns_k, scale_k = state.chosen[block.name]
        out_BK[:, columns_k] += _entries(factors.turned(upcast(block, state.dtype)), entries_k) * scale_k

    def matrix(self, state: LeadingState, name: str) -> Tensor:
        """[P_name, K], from unit gradients."""
        return _matrix(self, state, name)

    def fingerprint(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "version": self.version,
            "dim": self.dim,
            "factors": self.factors_kind,
            "ratio": self.ratio,
        }


def fit_factors(
    options: Mapping[str, Any], train_set: Any, checkpoint: Any, *, kind: str = "ekfac", exponent: float = 0.5
) -> dict[str, Factors]:
    """The factors of every parameter at a checkpoint: two passes over the training set, one more for its q's before each.

    Args:
        options: arguments of `trak.TRAK` that say what is attributed and how.
        train_set: the examples.
        checkpoint: the model.
        kind: "ekfac" or "kfac".
        exponent: γ of (q (1 − q))^γ.
    """
    run = RunOptions(**options)
    setting = resolve_setting(run)
    state = load_state(run, setting, checkpoint)
    task, names = bound_task(setting, state), list(setting.shapes)
    gradients = select_gradients(setting.gradients, setting.model, names)
    rows = as_rows(train_set, batch_size=run.batch_size, what="train_set")

    def over_training_set(consume: Callable[[Block, Tensor], None]) -> None:
        for _, batch in rows.batches():
            batch = prepare(setting, batch)
            q_B = forward_outputs(setting.model, state, task, batch).q
            weights_B = curvature_weights(q_B, exponent).to(setting.sum_dtype)

            def take(block: Block, weights_B: Tensor = weights_B) -> None:
                consume(upcast(block, setting.sum_dtype), weights_B)

            gradients.compute(setting.model, state, task, batch, names, take)
            total.add_(weights_B.sum())

    total = torch.zeros((), dtype=setting.sum_dtype)
    shapes = {name: _matrix_shape(shape) for name, shape in setting.shapes.items()}
    moments = {
        name: tuple(
            torch.zeros(side, side, dtype=setting.sum_dtype) if side <= LARGEST_SIDE else None
            for side in shape
        )
        for name, shape in shapes.items()
    }
    over_training_set(lambda block, weights_B: _add_moments(block, weights_B, *moments[block.name]))
    factors = {}
    for name, sides in moments.items():
        (values_R, rows_RR), (values_C, columns_CC) = (
            torch.linalg.eigh(side / total) if side is not None else (None, None) for side in sides
        )
        eigenvalues_RC = torch.zeros(shapes[name], dtype=setting.sum_dtype)
        if kind == "kfac" and values_R is not None and values_C is not None:
            eigenvalues_RC = torch.outer(values_R.clamp_min(0), values_C.clamp_min(0)) / values_C.sum()
        factors[name] = Factors(rows_RR, columns_CC, eigenvalues_RC)
    uncorrected = {name for name in factors if kind == "kfac" and None not in moments[name]}
    if len(uncorrected) == len(factors):
        return _with_floor(factors)
    total.zero_()

    def add_squares(block: Block, weights_B: Tensor) -> None:
        if block.name not in uncorrected:
            _add_squares(factors[block.name].turned(block), weights_B, factors[block.name].eigenvalues)

    over_training_set(add_squares)
    for name in factors.keys() - uncorrected:
        factors[name].eigenvalues.div_(total)
    return _with_floor(factors)


def _with_floor(factors: Mapping[str, Factors]) -> dict[str, Factors]:
    mean = torch.cat([found.eigenvalues.flatten() for found in factors.values()]).mean()
    return {name: replace(found, floor=FLOOR * float(mean)) for name, found in factors.items()}


def _add_moments(block: Block, weights_B: Tensor, rows_RR: Tensor | None, columns_CC: Tensor | None) -> None:
    """Add Σ_b w_b M_b M_bᵀ and Σ_b w_b M_bᵀ M_b."""
    rows, columns = block.matrix_shape
    roots_B11 = weights_B.sqrt()[:, None, None]
    if _is_outer(block):
        left_BTR, right_BTC = block.left[:, 0] * roots_B11, block.right[:, 0]
        # M Mᵀ = leftᵀ (right rightᵀ) left, and T × T is small.
        if rows_RR is not None:
            inner_BTR = right_BTC @ right_BTC.transpose(1, 2) @ left_BTR
            rows_RR += inner_BTR.reshape(-1, rows).T @ left_BTR.reshape(-1, rows)
        if columns_CC is not None:
            inner_BTC = left_BTR @ left_BTR.transpose(1, 2) @ right_BTC
            columns_CC += inner_BTC.reshape(-1, columns).T @ right_BTC.reshape(-1, columns)
        return
    if is_large_table(block) and rows_RR is None and columns_CC is not None:
        for _, values_BuC in table_pieces(block):
            weighted_nC = (values_BuC * roots_B11).reshape(-1, columns)
            columns_CC += weighted_nC.T @ weighted_nC
        return
    matrices_BRC = _matrices(block) * roots_B11
    if rows_RR is not None:
        by_row_Rn = matrices_BRC.permute(1, 0, 2).reshape(rows, -1)
        rows_RR += by_row_Rn @ by_row_Rn.T
    if columns_CC is not None:
        by_column_nC = matrices_BRC.reshape(-1, columns)
        columns_CC += by_column_nC.T @ by_column_nC


def _add_squares(block: Block, weights_B: Tensor, out_RC: Tensor) -> None:
    """Add Σ_b w_b M_b², entry by entry."""
    if is_large_table(block):
        for rows_u, values_BuC in table_pieces(block):
            out_RC.index_add_(0, rows_u, torch.einsum("b,buc->uc", weights_B, values_BuC.square()))
        return
    out_RC += torch.einsum("b,brc->rc", weights_B, _matrices(block).square())


def _entries(block: Block, entries_k: Tensor) -> Tensor:
    """Some of the flattened entries of each example's gradient, [B, k]; that of a layer is not multiplied out."""
    rows_k, columns_k = entries_k // block.matrix_shape[1], entries_k % block.matrix_shape[1]
    if _is_outer(block):
        left_BTR, right_BTC = block.left[:, 0], block.right[:, 0]
        if left_BTR.shape[1] * len(entries_k) < prod(block.shape):
            return torch.einsum("btk,btk->bk", left_BTR[..., rows_k], right_BTC[..., columns_k])
    if is_large_table(block):
        hits_BTk = block.indices[..., None] == rows_k
        return (block.values[..., columns_k] * hits_BTk).sum(1)
    return _matrices(block).flatten(1)[:, entries_k]


def _matrix(projection: Projection, state: ProjectionState, name: str) -> Tensor:
    shape = state.shapes[name]
    units = torch.eye(prod(shape), dtype=state.dtype, device=state.device).reshape(-1, *shape)
    out_PK = state.zeros(len(units))
    projection.add(state, DenseBlock(name, shape, units), out_PK)
    return out_PK


def _is_outer(block: Block) -> bool:
    return isinstance(block, OuterBlock) and block.left.shape[1] == 1


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], prod(shape[1:])) if shape else (1, 1)


def _matrices(block: Block) -> Tensor:
    return block.dense().reshape(block.batch_size, *block.matrix_shape)


def _dense(block: Block, matrices_BRC: Tensor) -> DenseBlock:
    return DenseBlock(block.name, block.shape, matrices_BRC.reshape(-1, *block.shape))
