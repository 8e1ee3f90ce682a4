"""Language models that predict each token from those before it (GPT, Llama)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import nn

from trak.tasks.language import TokenRows, preceded, split_batch
from trak.tasks.series import Positions, SeriesTask, check_options, check_positions


@dataclass(frozen=True)
class CausalLM(SeriesTask):
    """f = Σ_t log(p_t / (1 − p_t)) over the target tokens of a sequence, p_t = p(token t | tokens before it).

    Batches are mappings as Hugging Face's collators give them: `input_ids`, `attention_mask`, `labels` [B, T], which are the input
    ids themselves, −100 where a token is no target (the task shifts them by one, as the models do). Everything but the labels is
    passed to the model by name, so that it computes no loss of its own. Labels where the attention mask is 0 never count, nor those
    where an optional `target_mask` [B, T] is 0. So a target may be a whole text, a completion, a span, or one token. The first token,
    which nothing comes before, never counts.

    Pad on the right, or pass `position_ids`: many models count positions from the left whatever the mask.

    Attributes:
        reduction: "sum", or "mean" over target tokens, which belongs to a loss that is a mean over each sequence.
        weights: "per_position": the feature of a training sequence is −∇L = Σ_t q_t ∇f_t, with weight 1. "mean": it is ∇f, with the
            mean of q_t = 1 − p_t for its weight. "single_position": for rows of one token each (see `token_rows`), with q = 1 − p.
    """

    reduction: str = "sum"
    weights: str = "per_position"

    def __post_init__(self) -> None:
        check_options(self.reduction, self.weights)

    def positions(self, model: nn.Module, batch: Any) -> Positions:
        """Logits at each position and the token that follows it, [B, T]; nothing follows the last."""
        inputs, labels_BT, counted_BT = split_batch(batch, mask="attention_mask", what="causal_lm")
        output = model(**inputs)
        found = check_positions(getattr(output, "logits", output), labels_BT, counted_BT, what="causal_lm")
        counted_BT = found.counted & preceded(inputs.get("attention_mask"), labels_BT)
        # The labels are moved rather than the logits, which would be copied.
        return Positions(found.logits, F.pad(found.labels[:, 1:], (0, 1)), F.pad(counted_BT[:, 1:], (0, 1)))

    def token_rows(self, sequences: Any) -> TokenRows:
        """A dataset with one row for every target token of `sequences` (a dataset of mappings, or one mapping of tensors)."""
        return TokenRows(sequences, is_shifted=True, mask_labels=True)
