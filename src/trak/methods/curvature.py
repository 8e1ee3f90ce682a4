"""Curvature matrices of the mean training loss, by curvlinops, for any task whose loss is known.

The library wants a module of predictions, one of torch's loss modules and batches (inputs, labels); a task gives f and q of a batch.
Here the two meet:

    classification          logits [B, C] and cross-entropy, or one logit [B, 1] and its binary form
    regression              predictions [B, 1] and half the squared error
    a loss log(1 + e^(−f))  f [B, 1] and binary cross-entropy with label 1

Shape legend: B examples of a batch, C classes, P parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from trak import batches
from trak.datasets import RowSource
from trak.errors import InputError, MissingDependencyError
from trak.gradients import lend
from trak.gradients.base import random_state_kept
from trak.methods.gradient_passes import Passes
from trak.methods.runs import first_batch
from trak.setting import Setting, prepare
from trak.tasks import CustomTask, ImageClassification, Regression, Task, TextClassification

Product = Callable[[Tensor], Tensor]
"""Vectors [T, P] -> H times each, [T, P]."""
_VECTORS = 16
_OPERATORS = {"gauss_newton": "GGNLinearOperator", "exact": "HessianLinearOperator"}


def import_curvlinops(what: str) -> Any:
    """The library.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            # A dependency of the library compiles functions by a means that torch deprecates.
            warnings.simplefilter("ignore", DeprecationWarning)
            import curvlinops

            # Nor does torch itself do without them, when it first differentiates forwards.
            torch.func.jvp(torch.sin, (torch.zeros(1),), (torch.ones(1),))
    except ImportError as error:
        raise MissingDependencyError(
            f"{what} needs curvlinops: pip install 'trak-attribution[curvature]'"
        ) from error
    return curvlinops


@dataclass(frozen=True, eq=False)
class LentLoss:
    """The mean training loss of a model that is lent one checkpoint: usable inside `lent_loss` only.

    Attributes:
        library: curvlinops.
        setting: the run.
        model: what is lent.
        predictions: {"batch": batch} -> predictions [B, C].
        loss: their mean loss, a module of torch.
        parameters: attributed tensors, in the order of a gradient's entries.
        train: the training examples.
        scale: our loss / the module's.
        num_predictions: C.
    """

    library: Any
    setting: Setting
    model: nn.Module
    predictions: nn.Module
    loss: nn.Module
    parameters: list[Tensor]
    train: RowSource
    scale: float
    num_predictions: int

    def operator(self, matrix: str, batch: Any | None = None) -> Any:
        """H / scale as a curvlinops operator on vectors [P], of the training set or of one prepared batch."""
        needed = matrix == "exact"
        data = self.data(needed) if batch is None else [({"batch": batch}, self.labels(batch, needed))]
        return getattr(self.library, _OPERATORS[matrix])(
            self.predictions,
            self.loss,
            self.parameters,
            data,
            check_deterministic=False,
            num_data=self.train.num_rows if batch is None else batches.batch_size(batch),
            batch_size_fn=lambda inputs: batches.batch_size(inputs["batch"]),
        )

    def product(self, matrix: str, batch: Any | None = None) -> Product:
        """V [T, P] -> H V, [T, P], of the training set or of one prepared batch."""
        operator, dtype = self.operator(matrix, batch), self.parameters[0].dtype

        def multiply(vectors_TP: Tensor) -> Tensor:
            # The library takes all vectors through the model at once, each with activations of its own.
            parts = [
                (operator @ part_tP.to(dtype).T.contiguous()).T for part_tP in vectors_TP.split(_VECTORS)
            ]
            return self.scale * torch.cat(parts).to(vectors_TP)

        return multiply

    def data(self, needs_labels: bool) -> Iterable[tuple[dict[str, Any], Tensor]]:
        """Batches (inputs, labels) in curvlinops' form, to be read again and again."""
        # All labels now: getting them calls the model, and while the library reads batches it has hooks there.
        found = {
            int(rows_B[0]): self.labels(prepare(self.setting, batch), needs_labels)
            for rows_B, batch in self.train.batches()
        }
        return _Data(self, found)

    def labels(self, batch: Any, needed: bool) -> Tensor:
        """Labels of a prepared batch; zeros of the same form where the matrix does not depend on them."""
        if needed:
            with torch.no_grad():
                return _predict(self.setting.task, self.model, batch)[1]
        count = batches.batch_size(batch)
        if isinstance(self.loss, nn.CrossEntropyLoss):
            return torch.zeros(count, dtype=torch.int64, device=self.setting.device)
        return torch.zeros(count, 1, dtype=self.parameters[0].dtype, device=self.setting.device)


@dataclass(frozen=True, eq=False)
class _Data:
    """Batches with the labels of those that begin at a row."""

    loss: LentLoss
    labels: Mapping[int, Tensor]

    def __iter__(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for rows_B, batch in self.loss.train.batches():
            yield {"batch": prepare(self.loss.setting, batch)}, self.labels[int(rows_B[0])]


class _Predictions(nn.Module):
    """The model and its task as one module from a mapping, which the library hands through untouched."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, inputs: Mapping[str, Any]) -> Tensor:
        return _predict(self.task, self.model, inputs["batch"])[0]


@contextmanager
def lent_loss(passes: Passes, state: Mapping[str, Tensor], what: str) -> Iterator[LentLoss]:
    """The model with the checkpoint's tensors, and its loss; random generators and model are put back on the way out.

    Raises:
        InputError: the task's loss is unknown.
        MissingDependencyError: curvlinops is not installed.
    """
    library = import_curvlinops(what)
    setting = passes.setting
    attributed = {name: state[name].detach().requires_grad_() for name in passes.names}
    with (
        random_state_kept(state),
        lend(setting.model, {**state, **attributed}) as lent,
        torch.enable_grad(),
        # Fused attention can be differentiated once, and backwards.
        sdpa_kernel(SDPBackend.MATH),
    ):
        with torch.no_grad():
            predicted, _ = _predict(setting.task, lent, prepare(setting, first_batch(passes.train)))
        loss, scale = _loss_module(setting.task, predicted.shape[1])
        yield LentLoss(
            library,
            setting,
            lent,
            _Predictions(lent, setting.task),
            loss,
            list(attributed.values()),
            passes.train,
            scale,
            predicted.shape[1],
        )


def check_loss(task: Task, what: str) -> None:
    """That the task's loss is one whose curvature is known.

    Raises:
        InputError: it is not.
    """
    if isinstance(task, (ImageClassification, TextClassification)):
        if task.temperature != 1.0:
            raise InputError(
                f"{what} needs the loss that the weights belong to, and with temperature={task.temperature:g} they belong to none: use "
                "temperature=1"
            )
        return
    if isinstance(task, Regression) or _is_logistic(task):
        return
    raise InputError(
        f"{what} knows the losses of classification and regression, and log(1 + e^(−f)), which belongs to the default weights of a "
        f"CustomTask; {type(task).__name__} has weights of its own. Use InfluenceFunction, which takes any loss that is a function of f"
    )


def _is_logistic(task: Task) -> bool:
    """Whether q is sigmoid(−f)."""
    if isinstance(task, CustomTask):
        return task.weight is None
    kind = type(task)
    return kind.loss_weight is Task.loss_weight and kind.output_and_weight is Task.output_and_weight


def _loss_module(task: Task, width: int) -> tuple[nn.Module, float]:
    if isinstance(task, Regression):
        # Half of torch's squared error.
        return nn.MSELoss(), 0.5
    return (nn.CrossEntropyLoss() if width > 1 else nn.BCEWithLogitsLoss()), 1.0


def _predict(task: Task, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Predictions [B, C] with their graph, and labels: [B] int64 where C > 1, else [B, 1]."""
    if isinstance(task, (ImageClassification, TextClassification)):
        logits, labels_B = task.logits_and_labels(model, batch)
        if logits.ndim == 2 and logits.shape[1] > 1:
            return logits, labels_B
        logits_B1 = logits.reshape(-1, 1)
        return logits_B1, labels_B.to(logits_B1.dtype).unsqueeze(1)
    if isinstance(task, Regression):
        predictions_B, residuals_B = task.output_and_weight(model, batch)
        return predictions_B.unsqueeze(1), (predictions_B.detach() + residuals_B).unsqueeze(1)
    outputs_B1 = task.output(model, batch).unsqueeze(1)
    return outputs_B1, torch.ones_like(outputs_B1)


def loss_curvature(task: Task, outputs_N: Tensor, weights_N: Tensor) -> Tensor:
    """L''(f) = −dq/df of each row, [N] float64.

    Raises:
        InputError: q is not what the task's `loss_weight(f)` gives.
    """
    if isinstance(task, Regression):
        return torch.ones(len(outputs_N), dtype=torch.float64)
    outputs_N = outputs_N.detach().double().requires_grad_()
    with torch.enable_grad():
        again_N = task.loss_weight(outputs_N)
    if not torch.allclose(again_N.detach(), weights_N.double(), rtol=1e-2, atol=1e-3):
        raise InputError(
            f"the loss of {type(task).__name__} is no function of f alone (its weights are not loss_weight(f)), so its second derivative is "
            "unknown: use temperature=1, or a task whose loss_weight(f) is −∂L/∂f"
        )
    if not again_N.requires_grad:
        return torch.zeros(len(outputs_N), dtype=torch.float64)
    return -torch.autograd.grad(again_N, outputs_N, torch.ones_like(again_N))[0]
