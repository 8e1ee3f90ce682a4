"""Encoder-decoder language models (T5, mT5, BART)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trak.errors import InputError
from trak.tasks.language import TARGET_MASK, TokenRows, split_batch
from trak.tasks.looking import is_true
from trak.tasks.series import IGNORED, Positions, SeriesTask, check_options, check_positions

_DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")


@dataclass(frozen=True)
class Seq2SeqLM(SeriesTask):
    """f = Σ_t log(p_t / (1 − p_t)) over the target tokens of an output text, given the input text and the tokens before.

    Batches are mappings with `input_ids`, `attention_mask` and `labels` [B, T] of the output text, −100 at padding. The decoder's
    inputs are the batch's `decoder_input_ids`, or what the model makes of the labels
    (`prepare_decoder_input_ids_from_labels`). Because they are made of the labels, a span of the output is chosen by an optional
    `target_mask` [B, T], not by labels of −100, which the decoder would not see either.

    Attributes:
        reduction: "sum" or "mean" over target tokens.
        weights: "per_position", "mean" or "single_position", as for `CausalLM`.
    """

    reduction: str = "sum"
    weights: str = "per_position"

    def __post_init__(self) -> None:
        check_options(self.reduction, self.weights)

    def positions(self, model: nn.Module, batch: Any) -> Positions:
        """Logits and labels at each position of the output text, [B, T]."""
        inputs, labels_BT, counted_BT = split_batch(batch, mask="decoder_attention_mask", what="seq2seq_lm")
        if not any(name in inputs for name in _DECODER_INPUTS):
            inputs["decoder_input_ids"] = _decoder_inputs(model, labels_BT)
            labels_BT = _without_gaps(labels_BT)
        output = model(**inputs)
        return check_positions(getattr(output, "logits", output), labels_BT, counted_BT, what="seq2seq_lm")

    def token_rows(self, sequences: Any) -> TokenRows:
        """A dataset with one row for every target token of `sequences`, chosen by `target_mask`."""
        return TokenRows(sequences)


def _decoder_inputs(model: nn.Module, labels_BT: Tensor) -> Tensor:
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is None:
        raise InputError(
            f"{type(model).__name__} does not say how decoder inputs are made of labels: add `decoder_input_ids` to the batches"
        )
    return prepare(labels=labels_BT)


def _without_gaps(labels_BT: Tensor) -> Tensor:
    """The labels, where no label of −100 is before others: those would be unknown to the decoder.

    Where values are not looked at, an example with such labels has none that exist, so that its output is NaN where any position counts.
    """
    is_token_BT = labels_BT != IGNORED
    gaps_BT = is_token_BT[:, 1:] & ~is_token_BT[:, :-1]
    if is_true(gaps_BT.any()):
        raise InputError(
            f"seq2seq_lm: example {int(gaps_BT.any(1).nonzero()[0])} of the batch has labels of {IGNORED} before others, and the decoder's "
            f"inputs are made of the labels. Keep all labels and choose the span by `{TARGET_MASK}` [batch, positions], or give `decoder_input_ids`"
        )
    return labels_BT.masked_fill(gaps_BT.any(1, keepdim=True), IGNORED)
