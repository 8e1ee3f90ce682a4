"""The only wiring: featurize, fit, score.

Everything comes in as arguments and goes out as results; the store is the only thing that is written to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trak import batches
from trak.allocator import give_freed_memory_back, keep_freed_memory
from trak.datasets import RowSource
from trak.errors import InputError, MissingRowsError
from trak.gradients import (
    forward_outputs,
)
from trak.precondition import (
    Damping,
    FixedDamping,
    Moments,
    Preconditioner,
    accumulate_moments,
    fit_preconditioner,
)
from trak.progress import bar
from trak.projection import Factors, Leading
from trak.projector import Projector, projected
from trak.scores import KernelScores, Member
from trak.setting import Setting, bound_task, prepare
from trak.store import RowSet, Store, ranges_text


def compare_stored(
    setting: Setting, state: Mapping[str, Tensor], source: RowSource, rows: RowSet, *, where: str
) -> None:
    """That stored rows are what this run would compute: f of some of them, one forward pass, tells.

    Examples that were changed, a task function that does something else under the same name and a model with other code have
    the same fingerprint, and would silently get the features of what was there before.

    Raises:
        InputError: the stored model outputs are others.
    """
    stored = (~_inside(torch.arange(rows.num_rows), rows.missing())).nonzero().squeeze(1)
    if not len(stored):
        return
    first = int(stored[0])
    numbers_B, batch = next(iter(source.batches([(first, first + 1)])))
    kept_B = torch.isin(numbers_B, stored)
    numbers_B, batch = numbers_B[kept_B], prepare(setting, batches.take(batch, kept_B.nonzero().squeeze(1)))
    again_B = forward_outputs(setting.model, state, bound_task(setting, state), batch).f.cpu().double()
    before_B = rows.outputs_of(numbers_B).double()
    tolerance = 0.1 if _computes_in_half(setting, state) else 1e-2
    error = float((again_B - before_B).abs().max())
    if not error <= tolerance * max(1.0, float(before_B.abs().max())):
        raise InputError(
            f"{where}: the features there come from other examples, another task function or another model's code: model outputs of rows "
            f"{int(numbers_B[0])} to {int(numbers_B[-1])} differ from those stored by up to {error:.3g}. Use another "
            "save_dir"
        )


def _computes_in_half(setting: Setting, state: Mapping[str, Tensor]) -> bool:
    return any(state[name].dtype in (torch.float16, torch.bfloat16) for name in setting.shapes)


def featurize(
    setting: Setting,
    state: Mapping[str, Tensor],
    model_id: int,
    source: RowSource,
    rows: RowSet,
    *,
    label: str,
    factors: Mapping[str, Factors | Leading] | None = None,
) -> None:
    """Compute and store φ, f and q of every row that is not stored yet.

    Args:
        setting: the run; verified, or the user does not want that.
        state: the checkpoint's parameters and buffers, on the device.
        model_id: the checkpoint's number: a part of the projection's key.
        source: the examples.
        rows: where they go.
        label: what is featurized, for the progress bar.
        factors: the checkpoint's, for a projection that is fitted.

    Raises:
        GradientError: gradients cannot be had.
        ProjectionError: the projection is fitted, and there are no factors.
        NonFiniteError: an output, a weight or a feature is NaN or infinite.
    """
    missing = rows.missing()
    if not missing:
        return
    projector = Projector(setting, state, model_id, factors)
    total = sum(stop - start for start, stop in missing)
    keep_freed_memory()
    try:
        with (
            bar(rows.num_rows, label, enabled=setting.progress, initial=rows.num_rows - total) as shown,
            rows.writer() as writer,
        ):
            for row_numbers, (features_BK, outputs) in projected(projector, source.batches(missing), label):
                wanted_B = _inside(row_numbers, missing)
                writer.add(
                    row_numbers[wanted_B], features_BK[wanted_B], outputs.f[wanted_B], outputs.q[wanted_B]
                )
                shown.update(int(wanted_B.sum()))
    finally:
        give_freed_memory_back()


def fit(
    rows: RowSet,
    damping: Damping,
    groups: Sequence[tuple[int, int]],
    *,
    num_checkpoints: int,
    device: torch.device,
    where: str,
    curvature_exponent: float = 0.0,
    progress: bool | None = None,
) -> Preconditioner:
    """The preconditioner of one checkpoint's training features, one of `num_checkpoints`; the Gram is kept in the store.

    Args:
        rows: the checkpoint's training rows.
        damping: the rule for λ.
        groups: column slices that are preconditioned apart.
        num_checkpoints: M.
        device: where products are formed.
        where: names the checkpoint in messages.
        curvature_exponent: γ in ΦᵀR^γΦ with R = q (1 − q), see `curvature_weights`; 0 for ΦᵀΦ.
        progress: as in `trak.attribute`.

    Raises:
        MissingRowsError: some rows are not there.
        SingularGramError: it cannot be inverted with this damping.
    """
    if device.type == "mps":
        device = torch.device("cpu")  # it has no float64
    if not rows.is_complete:
        raise MissingRowsError(
            f"{where}: {ranges_text(rows.missing())} of the training set are not featurized yet"
        )
    undamped = isinstance(damping, FixedDamping) and damping.damping == 0
    features_dtype = rows.read(0, 1).features.dtype
    # Without damping the small eigenvalues count, and float32 products drown them.
    product_dtype = torch.float64 if undamped or features_dtype == torch.float64 else torch.float32
    moments = _moments(rows, groups, curvature_exponent, product_dtype, device, where, progress)
    return fit_preconditioner(moments, damping, num_checkpoints=num_checkpoints, where=where)


def score(
    store: Store,
    model_ids: Sequence[int],
    experiment: str,
    preconditioners: Sequence[Preconditioner],
    weights: tuple[Tensor, ...],
    *,
    device: torch.device,
    progress: bool | None = None,
) -> KernelScores:
    """Scores [N, T] over some checkpoints, to be computed where they are read.

    Args:
        store: with features of the training set and of the experiment's targets.
        model_ids: the checkpoints.
        experiment: the targets' name.
        preconditioners: of each checkpoint.
        weights: of each checkpoint's training examples, [N] each.
        device: where products are formed.
        progress: as in `trak.attribute`.

    Raises:
        MissingRowsError: some training or target rows are not there.
    """
    members = []
    for model_id, preconditioner in zip(model_ids, preconditioners):
        train, targets = store.rows(model_id), store.rows(model_id, experiment)
        features_TK = targets.read(0, targets.num_rows).features
        members.append(Member(train, preconditioner.solve(features_TK).to(features_TK.dtype).cpu()))
    return KernelScores(tuple(members), torch.stack(weights).mean(0), device, progress)


def self_influence(
    store: Store,
    model_ids: Sequence[int],
    preconditioners: Sequence[Preconditioner],
    weights: tuple[Tensor, ...],
    *,
    progress: bool | None = None,
) -> Tensor:
    """τ(z_i)_i = [1/M Σ_m φ_m(z_i)ᵀ(Φ_mᵀΦ_m + λ_m I)⁻¹φ_m(z_i)] · q̄_i, [N] float64."""
    total_N = torch.zeros(store.header.num_rows, dtype=torch.float64)
    for model_id, preconditioner in zip(model_ids, preconditioners):
        total_N += leverages(store.rows(model_id), preconditioner, progress=progress)
    return total_N / len(model_ids) * torch.stack(weights).double().mean(0)


def leverages(
    rows: RowSet,
    preconditioner: Preconditioner,
    *,
    curvature_exponent: float = 0.0,
    progress: bool | None = None,
) -> Tensor:
    """R^γ φᵀ (ΦᵀR^γΦ + λI)⁻¹ φ of each training row, [N] float64; with exponent γ = 0 the plain quadratic form, whatever the Gram was."""
    total_N = torch.zeros(rows.num_rows, dtype=torch.float64)
    with bar(rows.num_rows, "Self-influence", enabled=progress, delay=2.0) as shown:
        for block in rows.blocks():
            leverage_R = preconditioner.leverage(block.features).cpu()
            if curvature_exponent != 0:
                leverage_R = leverage_R * curvature_weights(block.weights, curvature_exponent).double()
            total_N[block.start : block.stop] = leverage_R
            shown.update(block.stop - block.start)
    return total_N


def curvature_weights(weights_N: Tensor, exponent: float) -> Tensor:
    """(q (1 − q))^exponent, [N]: of exponent 1 the second derivative of the log loss.

    Rows that floating point cannot tell from certain count 1e-12 before the power is taken, so that a model which is certain of every
    row still has a Gram matrix.
    """
    return (weights_N * (1 - weights_N)).clamp_min(1e-12) ** exponent


def has_moments(rows: RowSet, groups: Sequence[tuple[int, int]], curvature_exponent: float) -> bool:
    """Whether `fit` was done for these rows, in this process or another."""
    return any(
        rows.derived(_moments_name(groups, curvature_exponent, dtype)) is not None
        for dtype in (torch.float32, torch.float64)
    )


def _moments_name(
    groups: Sequence[tuple[int, int]], curvature_exponent: float, product_dtype: torch.dtype
) -> str:
    parts = ["moments", "whole" if len(groups) == 1 else "layers", str(product_dtype).removeprefix("torch.")]
    return "-".join(parts if curvature_exponent == 0 else [*parts, f"logistic{curvature_exponent:g}"])


def _moments(
    rows: RowSet,
    groups: Sequence[tuple[int, int]],
    curvature_exponent: float,
    product_dtype: torch.dtype,
    device: torch.device,
    where: str,
    progress: bool | None,
) -> Moments:
    name = _moments_name(groups, curvature_exponent, product_dtype)
    kept = rows.derived(name)
    if kept is not None:
        grams = tuple(kept[f"gram.{index}"].to(device) for index in range(len(groups)))
        cross = tuple(kept[f"cross.{index}"].to(device) for index in range(len(groups)))
        return Moments(
            rows.num_rows, tuple(groups), grams, cross, float(kept["outputs_square"]), product_dtype
        )
    with bar(rows.num_rows, f"{where}: Gram matrix", enabled=progress) as shown:

        def blocks() -> Any:
            for block in rows.blocks():
                if curvature_exponent == 0:
                    yield block.features, block.outputs
                else:
                    root_R = curvature_weights(block.weights, curvature_exponent).sqrt().to(block.features)
                    yield block.features * root_R.unsqueeze(1), block.outputs * root_R
                shown.update(block.features.shape[0])

        moments = accumulate_moments(blocks(), groups, product_dtype=product_dtype, device=device)
    tensors = {f"gram.{index}": gram.cpu() for index, gram in enumerate(moments.grams)}
    tensors |= {f"cross.{index}": cross.cpu() for index, cross in enumerate(moments.cross)}
    rows.save_derived(
        name, tensors | {"outputs_square": torch.tensor(moments.outputs_square, dtype=torch.float64)}
    )
    return moments


def _inside(rows_B: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """Which rows lie in one of the ranges (ascending, disjoint), bool [B]."""
    edges = torch.tensor(ranges, dtype=torch.int64).reshape(-1)
    return torch.searchsorted(edges, rows_B, right=True) % 2 == 1
