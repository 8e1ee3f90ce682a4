"""The model of `qnli.py`: a BERT on pairs of question and sentence, of which the lower layers may be left to be run once.

Legend: B batch, L tokens, D features, Q queries of the last layer, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PairClassifier(nn.Module):
    """The trained part of a BERT: embeddings if they are trained, the layers above the frozen ones, and a linear head.

    Args:
        bert: a BertModel; its modules are used, not copied.
        frozen: lower layers that are left out, and the embeddings with them; 0 leaves out nothing.
        layers: of the model, up to which they are used; None for all.
        apart: question and sentence see only themselves, and the head sees the products of their embeddings; else they are one sequence,
            and the head sees the pooler's output.
        num_classes: of the head.
    """

    def __init__(
        self, bert: nn.Module, *, frozen: int, layers: int | None, apart: bool, num_classes: int
    ) -> None:
        super().__init__()
        self.apart = apart
        self.embeddings = None if frozen else bert.embeddings
        self.layers = bert.encoder.layer[frozen:layers]
        self.pooler = None if apart else bert.pooler
        self.head = nn.Linear(bert.config.hidden_size, num_classes)

    def forward(self, inputs: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Logits [B, 2] of tokens [B, L], or of what the frozen layers make of them [B, L, D]."""
        return self.head(self.features(inputs, attention_mask, token_type_ids))

    def features(self, inputs: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """What the head sees, [B, D]."""
        hidden_BLD, sides_BQL = inputs, sides(attention_mask, token_type_ids, self.head.weight.dtype)
        if self.embeddings is not None:
            hidden_BLD = embed(self.embeddings, inputs, sides_BQL, apart=self.apart)
        hidden_BLD = through_layers(self.layers[:-1], hidden_BLD, sides_BQL, apart=self.apart)
        if self.pooler is not None:
            first_B1D, all_B1L = hidden_BLD[:, :1], sides_BQL.sum(dim=1, keepdim=True)
            return self.pooler(from_queries(self.layers[-1], first_B1D, hidden_BLD, all_B1L))
        means_BQD = sides_BQL @ hidden_BLD / sides_BQL.sum(dim=2, keepdim=True)
        u_BD, v_BD = from_queries(self.layers[-1], means_BQD, hidden_BLD, sides_BQL).unbind(dim=1)
        return (
            nn.functional.normalize(u_BD, dim=1) * nn.functional.normalize(v_BD, dim=1) * u_BD.shape[1] ** 0.5
        )


def sides(attention_mask: Tensor, token_type_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 2, L]: 1 at the question's tokens, 1 at the sentence's."""
    return torch.stack([attention_mask * (1 - token_type_ids), attention_mask * token_type_ids], dim=1).to(
        dtype
    )


def embed(embeddings: nn.Module, ids_BL: Tensor, sides_BQL: Tensor, *, apart: bool) -> Tensor:
    """[B, L, D]. Apart, both sides are first segments, and each begins at position 0."""
    positions_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device).expand_as(ids_BL)
    types_BL = sides_BQL[:, 1].long()
    if apart:
        positions_BL = positions_BL - types_BL * sides_BQL[:, 0].sum(dim=1, keepdim=True).long()
        types_BL = torch.zeros_like(types_BL)
    return embeddings(input_ids=ids_BL, token_type_ids=types_BL, position_ids=positions_BL)


def through_layers(layers: nn.ModuleList, hidden_BLD: Tensor, sides_BQL: Tensor, *, apart: bool) -> Tensor:
    """Some layers of a BERT; padding is not attended to, nor, apart, the other side."""
    seen_BLL = sides_BQL.sum(dim=1, keepdim=True).expand(-1, sides_BQL.shape[2], -1)
    if apart:
        seen_BLL = sides_BQL.transpose(1, 2) @ sides_BQL
    for layer in layers:
        found = layer(hidden_BLD, attention_mask=blind(seen_BLL))
        hidden_BLD = found[0] if isinstance(found, tuple) else found  # a tuple in older releases
    return hidden_BLD


def blind(seen_BQL: Tensor) -> Tensor:
    """[B, 1, Q, L], added to attention scores: 0 where a query sees a token, the lowest number elsewhere."""
    return ((1 - seen_BQL) * torch.finfo(seen_BQL.dtype).min)[:, None]


def from_queries(layer: nn.Module, queries_BQD: Tensor, hidden_BLD: Tensor, seen_BQL: Tensor) -> Tensor:
    """A layer of a BERT at Q queries in place of its L tokens, [B, Q, D], which is most of its cost.

    The last layer with the first token for a query is all that BERT's pooler reads, exactly. With the means of the two sides for queries
    it stands for the means over the outputs of all tokens.
    """
    attention = layer.attention.self
    heads = attention.num_attention_heads

    def split(projected: Tensor) -> Tensor:  # [B, L, D] to [B, H, L, D / H]
        return projected.unflatten(-1, (heads, -1)).transpose(1, 2)

    query_BHQd = split(attention.query(queries_BQD))
    key_BHLd, value_BHLd = split(attention.key(hidden_BLD)), split(attention.value(hidden_BLD))
    scores_BHQL = query_BHQd @ key_BHLd.transpose(2, 3) / query_BHQd.shape[-1] ** 0.5
    shares_BHQL = (scores_BHQL + blind(seen_BQL)).softmax(dim=-1)
    found_BQD = (shares_BHQL @ value_BHLd).transpose(1, 2).flatten(2)
    return layer.feed_forward_chunk(layer.attention.output(found_BQD, queries_BQD))


def start_as_cosine(head: nn.Linear, middle: float) -> None:
    """Logits ±(sum of the products − middle) / 4: plus for "entailment", the first class."""
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.25], [-0.25]]).expand_as(head.weight))
        head.bias.copy_(torch.tensor([-0.25 * middle, 0.25 * middle]))
