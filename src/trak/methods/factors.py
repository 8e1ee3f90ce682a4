"""Factors of fitted projections: found from a sample of the training set at each checkpoint, and kept with it in the store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from trak.allocator import keep_freed_memory
from trak.blocks import Block
from trak.datasets import RowSource
from trak.errors import NonFiniteError, ProtocolError
from trak.gradients import select_gradients
from trak.methods.samples import some_rows, spread_rows
from trak.pipeline import curvature_weights
from trak.progress import bar
from trak.projection import (
    Factors,
    FittedProjection,
    Leading,
    Moments,
    joined,
)
from trak.setting import Setting, bound_task, prepare
from trak.store import Store

CURVATURE_EXPONENT = 0.5
"""γ of the weights (q (1 − q))^γ in the moments, for losses of a probability; others count every example alike."""
NAME = "factors"
"""Of the kept tensors."""


def fit_factors(
    setting: Setting, state: Mapping[str, Tensor], source: RowSource, *, label: str
) -> dict[str, Factors]:
    """The factors of every parameter at a checkpoint: two passes over `sample` rows of the training set.

    A batch's blocks are held together, until its last: weights come with the last one, and a parameter that is used several times in a forward
    pass has several, which are one gradient.

    Args:
        setting: the run, with a fitted projection; that of training rows.
        state: the checkpoint's parameters and buffers, on the device.
        source: the training examples.
        label: the checkpoint, for progress bars and messages.

    Raises:
        GradientError: gradients cannot be had.
        NonFiniteError: an output or a weight is NaN or infinite.
        ProjectionError: gradients that are not finite, or all zero.
    """
    assert isinstance(setting.projection, FittedProjection)
    options = setting.projection.factor_options
    sample = some_rows(source, spread_rows(source.num_rows, options.sample))
    moments = Moments.zeros(setting.shapes, options, device=setting.device, dtype=setting.sum_dtype)
    for blocks, weights_B in _gradients(setting, state, sample, f"{label}: factors"):
        moments.add(blocks, weights_B)
    squares = moments.turned()
    if squares.needed:
        for blocks, weights_B in _gradients(setting, state, sample, f"{label}: eigenvalues"):
            squares.add(blocks, weights_B)
    return squares.factors()


def kept_factors(
    setting: Setting,
    state: Mapping[str, Tensor],
    store: Store,
    model_id: int,
    source: RowSource,
    *,
    label: str,
) -> Mapping[str, Factors | Leading] | None:
    """What the projection needs of a checkpoint's factors, from the store, fitted and kept there if there are none; None for ordinary projections.

    Of several processes that fit at the same time one keeps its factors, and all use those.

    Raises:
        ProtocolError: features are stored that were made with factors which are no longer there.
        TrakError: as for `fit_factors`.
    """
    if not isinstance(setting.projection, FittedProjection):
        return None
    # Rows first: another process may write both in between, and always keeps its factors before it writes rows.
    rows = store.rows(model_id)
    is_begun = rows.missing() != [(0, rows.num_rows)]
    tensors = store.kept(model_id, NAME)
    if tensors is None:
        if is_begun:
            raise ProtocolError(_lost(store, model_id))
        found = fit_factors(setting, state, source, label=label)
        tensors = store.keep(model_id, NAME, setting.projection.to_keep(setting.shapes, found))
    return setting.projection.from_kept(setting.shapes, tensors)


def stored_factors(
    setting: Setting, store: Store, model_id: int, *, is_needed: bool = True
) -> Mapping[str, Factors | Leading] | None:
    """The factors of a checkpoint whose training set is featurized; None for ordinary projections, and if there are none that are needed.

    Raises:
        ProtocolError: they are no longer there.
    """
    if not isinstance(setting.projection, FittedProjection):
        return None
    tensors = store.kept(model_id, NAME)
    if tensors is None:
        if not is_needed:
            return None
        raise ProtocolError(_lost(store, model_id))
    return setting.projection.from_kept(setting.shapes, tensors)


def _lost(store: Store, model_id: int) -> str:
    return (
        f"checkpoint {model_id} in {store.where} has features and no factors that they were made with: factors that are fitted again may "
        "differ in sign and order. Restore its factors from a copy, or use another save_dir and featurize again"
    )


def _gradients(
    setting: Setting, state: Mapping[str, Tensor], sample: RowSource, label: str
) -> Iterator[tuple[dict[str, Block], Tensor]]:
    """Of each batch the gradients, one block for a parameter, and the examples' weights."""
    task, names = bound_task(setting, state), list(setting.shapes)
    gradients = select_gradients(setting.gradients, setting.model, names)
    keep_freed_memory()
    with bar(sample.num_rows, label, enabled=setting.progress) as shown:
        for numbers_B, batch in sample.batches():
            blocks: dict[str, list[Block]] = {}

            def take(block: Block, blocks: dict[str, list[Block]] = blocks) -> None:
                blocks.setdefault(block.name, []).append(block)

            outputs = gradients.compute(setting.model, state, task, prepare(setting, batch), names, take)
            for what, values in (("model outputs", outputs.f), ("loss weights", outputs.q)):
                if not values.isfinite().all():
                    raise NonFiniteError(
                        f"{label}: {what} are NaN or infinite for {int((~values.isfinite()).sum())} of {len(values)} examples. Look at the "
                        "model's output there; a model in float16 may overflow: try dtype=torch.float32"
                    )
            weights_B = torch.ones_like(outputs.q)
            if task.is_log_loss:
                weights_B = curvature_weights(outputs.q.to(setting.sum_dtype), CURVATURE_EXPONENT)
            yield {name: joined(found) for name, found in blocks.items()}, weights_B
            shown.update(len(numbers_B))
