"""A task from functions, and the names that stand for the built-in tasks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trak.errors import InputError
from trak.tasks.base import Task
from trak.tasks.causal_lm import CausalLM
from trak.tasks.classification import ImageClassification, TextClassification
from trak.tasks.dense import DenseClassification
from trak.tasks.masked_lm import MaskedLM
from trak.tasks.regression import Regression
from trak.tasks.seq2seq_lm import Seq2SeqLM


@dataclass(frozen=True)
class CustomTask(Task):
    """A task from one function, or two.

    Attributes:
        function: (model, batch) -> f [B]: the quantity to explain, one number per example, differentiable.
        weight: f [B] -> q [B], the negative derivative of the training loss with respect to f; by default sigmoid(−f), which
            belongs to the loss log(1 + e^(−f)).
        name: distinguishes this task from others in a store's fingerprint; by default the function's qualified name.
    """

    function: Callable[[nn.Module, Any], Tensor]
    weight: Callable[[Tensor], Tensor] | None = None
    name: str | None = None

    def output(self, model: nn.Module, batch: Any) -> Tensor:
        """`function(model, batch)`, [B]."""
        return self.function(model, batch)

    def loss_weight(self, outputs: Tensor) -> Tensor:
        """`weight(f)`, or sigmoid(−f)."""
        return torch.sigmoid(-outputs) if self.weight is None else self.weight(outputs)

    @property
    def is_log_loss(self) -> bool:
        """With the default weights."""
        return self.weight is None

    def fingerprint(self) -> dict[str, Any]:
        """Names of the functions: their code is the user's to version."""
        weight = "sigmoid(-f)" if self.weight is None else _qualified_name(self.weight)
        return {"task": self.name or _qualified_name(self.function), "weight": weight}


def resolve_task(task: Task | str | Callable[..., Tensor]) -> Task:
    """A task object from an object, a built-in name, or a function (model, batch) -> f.

    Raises:
        InputError: an unknown name, a class instead of an object, or something else altogether.
    """
    builtin: dict[str, Callable[[], Task]] = {
        "image_classification": ImageClassification,
        "text_classification": TextClassification,
        "regression": Regression,
        "causal_lm": CausalLM,
        "dense_classification": DenseClassification,
        "masked_lm": MaskedLM,
        "seq2seq_lm": Seq2SeqLM,
    }
    if isinstance(task, str):
        if task not in builtin:
            raise InputError(
                f"unknown task {task!r}; known names: {', '.join(sorted(builtin))}. "
                "Tasks that need more than a name are objects, e.g. trak.ContrastivePairs(negatives) for CLIP; for anything else pass a function "
                "(model, batch) -> f [batch], or a trak.Task"
            )
        return builtin[task]()
    if isinstance(task, Task):
        return task
    if inspect.isclass(task):
        raise InputError(f"task must be an object, not a class: write {task.__name__}(...)")
    if hasattr(task, "get_output") and hasattr(task, "get_out_to_loss_grad"):
        raise InputError(
            f"{type(task).__name__} follows the released package's per-example interface (get_output over functional weights). "
            "Write the batched form instead: trak.CustomTask(lambda model, batch: ...), see the migration guide"
        )
    if callable(task):
        return CustomTask(task)
    raise InputError(
        f"task must be a name, a trak.Task or a function (model, batch) -> f [batch]; got {type(task).__name__}"
    )


def _qualified_name(function: Callable[..., Any]) -> str:
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', '?')}.{name}"
