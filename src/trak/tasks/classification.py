"""Classifiers of images, or of anything whose batch is (inputs, labels)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trak.errors import InputError
from trak.tasks.base import Task
from trak.tasks.margins import check_logits, class_margin


class _Classification(Task):
    """Shared algebra of the classifiers: a subclass says how a batch becomes logits and labels."""

    temperature: float

    def logits_and_labels(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def output(self, model: nn.Module, batch: Any) -> Tensor:
        """F = log(p / (1 − p)) of the correct class, [B]."""
        return class_margin(*self.logits_and_labels(model, batch))

    def loss_weight(self, outputs: Tensor) -> Tensor:
        """Q = 1 − p = sigmoid(−f / temperature), [B]; exact for two classes and for temperature 1."""
        return torch.sigmoid(-outputs / self.temperature)

    def output_and_weight(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """(f [B] with its graph, q = 1 − softmax(logits / temperature)_y [B] detached)."""
        logits, labels_B = self.logits_and_labels(model, batch)
        outputs_B = class_margin(logits, labels_B)
        if self.temperature == 1.0:
            return outputs_B, self.loss_weight(outputs_B.detach())
        # With more than two classes the temperature acts on every logit, so f alone does not determine q.
        return outputs_B, torch.sigmoid(-class_margin(logits.detach() / self.temperature, labels_B))

    @property
    def is_log_loss(self) -> bool:
        """Without a temperature: with one, q belongs to no loss of f."""
        return self.temperature == 1.0

    def fingerprint(self) -> dict[str, Any]:
        """Name and temperature."""
        return {"task": type(self).__name__, "temperature": self.temperature}


@dataclass(frozen=True)
class ImageClassification(_Classification):
    """f = logit_y − logsumexp(other logits) of `model(inputs)`; batches are (inputs, labels), or mappings with the labels in them.

    Park et al. 2023, section 2; the loss is cross-entropy = log(1 + e^(−f)). A model with one logit per example is a binary
    classifier with labels 0 and 1. Despite its name it serves any model whose forward takes one tensor. Of a mapping, such as Hugging
    Face's image processors and collators give (`pixel_values` and `labels` or `label`), everything but the labels is passed to the model
    by name.

    Attributes:
        temperature: divides the logits in the weight q = 1 − p only, for models whose confidence is not calibrated.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)

    def logits_and_labels(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """`model(inputs)` and labels from a batch (inputs, labels), or `model(**inputs)` and labels from a mapping."""
        if (parts := _split_mapping(batch)) is not None:
            inputs, labels_B = parts
            return check_logits(_logits(model(**inputs)), labels_B, what="image_classification")
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            from trak.batches import describe

            raise InputError(
                "image_classification expects batches (inputs, labels), or mappings with `labels` beside the model's inputs; "
                f"got {describe(batch)}. "
                "For another batch layout write a task: trak.CustomTask(lambda model, batch: ...)"
            )
        inputs, labels_B = batch
        return check_logits(_logits(model(inputs)), labels_B, what="image_classification")


@dataclass(frozen=True)
class TextClassification(_Classification):
    """f = logit_y − logsumexp(other logits) of `model(**inputs)`; batches are mappings with the labels in them.

    Takes batches as Hugging Face tokenizers and collators give them: `input_ids`, `attention_mask`, perhaps `token_type_ids`
    and others, and `labels` (or `label`). Everything but the labels is passed to the model by name, so that the model computes
    no loss of its own. A batch may also be a tuple (input_ids, attention_mask, labels) or (input_ids, token_type_ids,
    attention_mask, labels), the released package's order.

    Attributes:
        temperature: divides the logits in the weight q = 1 − p only.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)

    def logits_and_labels(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """`model(**inputs)` and labels from a mapping, or from a tuple in the released package's order."""
        inputs, labels_B = _split_text_batch(batch)
        return check_logits(_logits(model(**inputs)), labels_B, what="text_classification")


_TUPLE_FIELDS = {
    2: ("input_ids",),
    3: ("input_ids", "attention_mask"),
    4: ("input_ids", "token_type_ids", "attention_mask"),
}


def _split_text_batch(batch: Any) -> tuple[dict[str, Any], Any]:
    if isinstance(batch, (tuple, list)) and len(batch) in _TUPLE_FIELDS:
        return dict(zip(_TUPLE_FIELDS[len(batch)], batch)), batch[-1]
    if (parts := _split_mapping(batch)) is not None:
        return parts
    from trak.batches import describe

    raise InputError(
        f"text_classification expects a mapping with `labels` beside the model's inputs (input_ids, attention_mask, …); got {describe(batch)}"
    )


def _split_mapping(batch: Any) -> tuple[dict[str, Any], Any] | None:
    """A mapping's inputs by name, and its labels; None for anything else."""
    for key in ("labels", "label"):
        if isinstance(batch, Mapping) and key in batch:
            return {name: value for name, value in batch.items() if name != key}, batch[key]
    return None


def _logits(output: Any) -> Any:
    """The logits of a model's output: the output itself, or its `.logits` as Hugging Face models return them."""
    return getattr(output, "logits", output)


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise InputError(f"temperature must be a positive number; got {temperature!r}")
