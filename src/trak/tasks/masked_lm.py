"""Language models that fill in masked tokens (BERT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from trak.tasks.language import TokenRows, split_batch
from trak.tasks.series import Positions, SeriesTask, check_options, check_positions


@dataclass(frozen=True)
class MaskedLM(SeriesTask):
    """f = Σ_t log(p_t / (1 − p_t)) over the masked tokens of a text.

    Batches are mappings with `input_ids` (some masked), `attention_mask` and `labels` [B, T], −100 where no token is to be filled in;
    perhaps `target_mask`, as for `CausalLM`. Draw the masks once and keep them: a collator that draws anew each time it is called
    gives other examples at every checkpoint.

    Attributes:
        reduction: "sum" or "mean" over target tokens.
        weights: "per_position", "mean" or "single_position", as for `CausalLM`.
    """

    reduction: str = "sum"
    weights: str = "per_position"

    def __post_init__(self) -> None:
        check_options(self.reduction, self.weights)

    def positions(self, model: nn.Module, batch: Any) -> Positions:
        """Logits and labels at each position, [B, T]."""
        inputs, labels_BT, counted_BT = split_batch(batch, mask="attention_mask", what="masked_lm")
        output = model(**inputs)
        return check_positions(getattr(output, "logits", output), labels_BT, counted_BT, what="masked_lm")

    def token_rows(self, sequences: Any) -> TokenRows:
        """A dataset with one row for every target token of `sequences` (a dataset of mappings, or one mapping of tensors)."""
        return TokenRows(sequences, mask_labels=True)
