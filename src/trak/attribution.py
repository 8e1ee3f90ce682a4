"""attribute(): the one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trak.gradients import Gradients
from trak.methods.runs import Parameters
from trak.methods.trak import TRAK
from trak.precondition import Damping
from trak.projection import Projection
from trak.results import Attribution, Groups
from trak.tasks import Task

__all__ = ["Attribution", "Groups", "attribute"]


def attribute(
    model: nn.Module,
    train_set: Any,
    targets: Any,
    *,
    task: Task | str | Callable[..., Tensor],
    checkpoints: Sequence[Any] | None = None,
    projection: Projection | None = None,
    damping: float | str | Damping = "auto",
    preconditioner: str = "whole",
    gram: str | None = None,
    weight_exponent: float | None = None,
    parameters: Parameters = None,
    gradients: Gradients | str = "auto",
    save_dir: str | Path | None = None,
    feature_dtype: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    batch_size: int | None = None,
    check: bool = True,
    trust_pickle: bool = False,
    progress: bool | None = None,
) -> Attribution:
    """Which training examples made the model do this? TRAK scores of every training example for every target.

        τ(z)_i = [ 1/M Σ_m φ_m(z)ᵀ (Φ_mᵀR_m^γΦ_m + λ_m I)⁻¹ φ_m(z_i) ] · [ 1/M Σ_m q_m,i^γ ]

    with φ_m the projected gradient of the model output f at checkpoint m and q the derivative of the training loss with respect to f
    (Park et al. 2023, arXiv 2303.14186, equation 17, which has γ = 1 and no R: `gram="uniform", weight_exponent=1`). More choices:
    `trak.TRAK`.

    Args:
        model: the architecture; its parameters, flags, hooks and mode are the same afterwards.
        train_set: a DataLoader, a dataset, or tensors (inputs, labels). Rows are positions in the dataset, whatever the loader's order.
        targets: the same, for the predictions to explain.
        task: "image_classification", "text_classification", "regression", "causal_lm", "seq2seq_lm", "masked_lm", "dense_classification",
            a function (model, batch) -> f [batch], or a `trak.Task` such as `trak.ContrastivePairs` or `trak.Diffusion`.
        checkpoints: the ensemble: state dicts, paths (.safetensors, .pt, folders), modules, or functions that return one. More checkpoints,
            trained on different subsets or from different seeds, give better scores. None: the model's own state.
        projection: how gradients are compressed. None: by the number of attributed parameters, `trak.Identity()` up to 4,096,
            `trak.Eigenbasis(4096)`, which is fitted to some of the training set first, up to 50 million, and `trak.Kronecker(8192)` beyond.
            The paper's random columns are `trak.Rademacher(dim=4096, seed=0)`, or `trak.Sparse(4096)` for a fraction of the time.
        damping: λ ≥ 0 as a number in units of squared gradient norm, `trak.RelativeDamping(ratio)` of the mean eigenvalue, or "auto":
            `trak.MarquardtDamping()`, which adds a multiple of the Gram matrix's diagonal to λI, with `trak.Eigenbasis`, and
            `trak.AutomaticDamping()` otherwise.
        preconditioner: "whole" for the paper's K × K Gram matrix, "per_layer" for one block for each layer.
        gram: "logistic" for the Gram matrix ΦᵀR^γΦ with R = q (1 − q), the default for losses of a probability, or "uniform" for the paper's ΦᵀΦ.
        weight_exponent: γ, by default 1/2 for losses of a probability (classification) and 1 otherwise. The square root predicts retrained
            networks better, see design/defaults.md; 1 is the paper's formula, in units of f, and right for convex models.
        parameters: which parameters to attribute through: names, patterns ("encoder.*"), or a predicate (name, parameter) -> bool;
            None for those that require gradients.
        gradients: "auto", "hooked", "functional", "reference", or an object such as `trak.Functional(chunk_size=8)`.
        save_dir: keep features there: an interrupted run goes on where it stopped, and later calls with new targets or checkpoints do not
            featurize the training set again. None keeps them in memory.
        feature_dtype: "float32", "float64", "float16" or "bfloat16", in which features are stored; None for float32, and float64 for
            models in float64.
        device: where to compute; None for CUDA or MPS where there is one, else the CPU.
        dtype: compute in this dtype; None for the model's own.
        batch_size: examples at once; None for the loader's, or 64.
        check: verify per-example gradients on the first batch. Costs about one further batch.
        trust_pickle: load checkpoints that need arbitrary pickled code. Only for files whose origin you trust.
        progress: True or False to force progress bars; None shows them on terminals and in notebooks.

    Returns:
        An `Attribution`: `scores` [N, T], `top(k)`, `bottom(k)`, `self_influence()`, `group(labels)`, `predict(masks)`, `report(path)`, …

    Raises:
        TrakError: with what was wrong, what was got, what was expected and what to do next.
    """
    method = TRAK(
        model=model,
        task=task,
        projection=projection,
        damping=damping,
        preconditioner=preconditioner,
        gram=gram,
        weight_exponent=weight_exponent,
        parameters=parameters,
        gradients=gradients,
        save_dir=save_dir,
        feature_dtype=feature_dtype,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        check=check,
        trust_pickle=trust_pickle,
        progress=progress,
    )
    return method.fit(train_set, checkpoints).attribute(targets)
