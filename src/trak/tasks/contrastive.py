"""Contrastive training on pairs, as in CLIP: each pair is told from a simulated batch of others.

Shape legend: B pairs of a batch, N negatives, D dimensions of the embeddings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trak.batches import batch_size, cast, describe, flatten, move, take
from trak.errors import InputError
from trak.tasks.base import Task
from trak.tasks.dual_encoder import DualEncoder, resolve_encoder

# How far from 1 the cosines of an embedding with itself may lie after rounding, in batches of different sizes.
_SAME = {torch.float64: 1e-10, torch.float32: 1e-5}
_SAME_IN_HALF = 1e-3


@dataclass(frozen=True, eq=False)
class ContrastivePairs(Task):
    """f = −log Σ_j e^(−(s_ii − s_ij)) − log Σ_j e^(−(s_ii − s_ji)) over negatives j (Park et al. 2023, section 5.1, CLIP).

    s_ij is the logit of image i with text j: the cosine of their embeddings times the model's scale. Each of the two terms is
    log(p / (1 − p)) for the probability of finding the own partner among the negatives, image to text and text to image; q is 1 minus
    the mean of both probabilities.

    A training step of such a model depends on the whole batch; here each pair meets the same simulated batch, drawn once, uniformly
    without replacement, from the pairs that are given. Negatives are embedded anew at each checkpoint, once (see `bind`), and are
    constants there: no gradient flows through them. A negative that is the pair itself (both embeddings are the same but for
    rounding) is left out.

    Attributes:
        negatives: pairs to draw from: a batch (a tuple or mapping of tensors), or a map-style dataset of which only the drawn pairs are
            read; e.g. the training set.
        num_negatives: N, how many are drawn; None takes all.
        seed: of the draw.
        encoder: "transformers", "open_clip", or a `DualEncoder`.
        collate: puts pairs of a dataset together into a batch; by default torch's.
        batch_size: negatives that are embedded at once.

    Raises:
        InputError: fewer than two negatives, or fewer pairs than are to be drawn.
    """

    negatives: Any = field(repr=False)
    num_negatives: int | None = None
    seed: int = 0
    encoder: DualEncoder | str = "transformers"
    collate: Callable[[list[Any]], Any] | None = None
    batch_size: int = 64
    _drawn: Any = field(init=False, repr=False)
    _digest: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "encoder", resolve_encoder(self.encoder))
        drawn = _draw(self.negatives, self.num_negatives, self.seed, self.collate)
        object.__setattr__(self, "_drawn", drawn)
        object.__setattr__(self, "_digest", _digest(drawn))

    def bind(self, model: nn.Module, prepare: Callable[[Any], Any]) -> BoundPairs:
        """The task with its negatives embedded at this checkpoint."""
        encoder = resolve_encoder(self.encoder)
        images, texts = [], []
        with torch.no_grad():
            for start in range(0, batch_size(self._drawn), self.batch_size):
                batch = prepare(take(self._drawn, slice(start, start + self.batch_size)))
                image_BD, text_BD = embed(encoder, model, batch)
                images.append(image_BD.detach())
                texts.append(text_BD.detach())
        return BoundPairs(encoder, torch.cat(images), torch.cat(texts), self.fingerprint())

    def output(self, model: nn.Module, batch: Any) -> Tensor:
        """F [B], embedding the negatives for this call alone; `bind` does it once for many."""
        return self._bound(model).output(model, batch)

    def output_and_weight(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """(f [B] with its graph, q [B]), embedding the negatives for this call alone."""
        return self._bound(model).output_and_weight(model, batch)

    def loss_weight(self, outputs: Tensor) -> Tensor:
        """Not determined by f, a sum of two margins.

        Raises:
            InputError: always.
        """
        return _no_weight_of_f()

    @property
    def is_log_loss(self) -> bool:
        """No: q is a mean of two."""
        return False

    def fingerprint(self) -> dict[str, Any]:
        """The drawn negatives' digest and number, and the encoder."""
        return {
            "task": "ContrastivePairs",
            "negatives": self._digest,
            "num_negatives": batch_size(self._drawn),
            "encoder": resolve_encoder(self.encoder).name,
        }

    def _bound(self, model: nn.Module) -> BoundPairs:
        like = next(model.parameters())
        return self.bind(model, lambda batch: cast(move(batch, like.device), like.dtype))


@dataclass(frozen=True, eq=False)
class BoundPairs(Task):
    """`ContrastivePairs` at one checkpoint.

    Attributes:
        encoder: how the model is asked.
        images_ND: embeddings of the negatives' images, of length 1.
        texts_ND: those of their texts.
        identity: the unbound task's fingerprint.
    """

    encoder: DualEncoder
    images_ND: Tensor
    texts_ND: Tensor
    identity: Mapping[str, Any]

    def output(self, model: nn.Module, batch: Any) -> Tensor:
        """The sum of both margins, [B]."""
        to_text_B, to_image_B = self.margins(model, batch)
        return to_text_B + to_image_B

    def output_and_weight(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """(f [B] with its graph, q = 1 − (p + p') / 2 [B] detached), p of image to text and p' of text to image."""
        to_text_B, to_image_B = self.margins(model, batch)
        weights_B = (torch.sigmoid(-to_text_B.detach()) + torch.sigmoid(-to_image_B.detach())) / 2
        return to_text_B + to_image_B, weights_B

    def margins(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """(s_ii − log Σ_j e^s_ij, s_ii − log Σ_j e^s_ji), [B] each."""
        image_BD, text_BD = embed(self.encoder, model, batch)
        images_ND, texts_ND = self.images_ND.to(image_BD.dtype), self.texts_ND.to(text_BD.dtype)
        scale = self.encoder.logit_scale(model)
        own_B = (image_BD * text_BD).sum(1)
        is_itself_BN = _same(image_BD, images_ND) & _same(text_BD, texts_ND)

        def margin(one_BD: Tensor, others_ND: Tensor) -> Tensor:
            against_BN = (scale * one_BD @ others_ND.T).masked_fill(is_itself_BN, float("-inf"))
            return scale * own_B - against_BN.logsumexp(1)

        return margin(image_BD, texts_ND), margin(text_BD, images_ND)

    def loss_weight(self, outputs: Tensor) -> Tensor:
        """Not determined by f.

        Raises:
            InputError: always.
        """
        return _no_weight_of_f()

    @property
    def is_log_loss(self) -> bool:
        """No: q is a mean of two."""
        return False

    def fingerprint(self) -> dict[str, Any]:
        """The unbound task's."""
        return dict(self.identity)


def embed(encoder: DualEncoder, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Embeddings of a batch's images and texts, [B, D] each, of length 1.

    Raises:
        InputError: the encoder gives something else than two tensors of the same shape [B, D].
    """
    found = encoder.image_features(model, batch), encoder.text_features(model, batch)
    size = batch_size(batch)
    if not all(isinstance(side, Tensor) and side.ndim == 2 for side in found) or not (
        found[0].shape == found[1].shape and len(found[0]) == size
    ):
        raise InputError(
            f"a dual encoder must give two tensors [batch, dimensions] for {size} pairs; got {describe(found[0])} for images and "
            f"{describe(found[1])} for texts"
        )
    return F.normalize(found[0], dim=1), F.normalize(found[1], dim=1)


def _same(one_BD: Tensor, others_ND: Tensor) -> Tensor:
    """Which embeddings are equal but for rounding, bool [B, N]."""
    tolerance = _SAME.get(one_BD.dtype, _SAME_IN_HALF)
    wide = torch.float64 if one_BD.dtype == torch.float64 else torch.float32
    # Of half-precision vectors the length is off by more than the direction.
    one_BD, others_ND = (F.normalize(side.detach().to(wide), dim=1) for side in (one_BD, others_ND))
    return one_BD @ others_ND.T >= 1 - tolerance


def _draw(pairs: Any, count: int | None, seed: int, collate: Callable[[list[Any]], Any] | None) -> Any:
    """A batch of `count` pairs, uniformly without replacement, in their own order."""
    is_batch = isinstance(pairs, Mapping) or (
        isinstance(pairs, tuple) and all(isinstance(part, (Tensor, Mapping)) for part in pairs)
    )
    if not is_batch and not (hasattr(pairs, "__len__") and hasattr(pairs, "__getitem__")):
        raise InputError(
            f"negatives must be a batch of pairs (a tuple or mapping of tensors) or a map-style dataset; got {describe(pairs)}"
        )
    total = batch_size(pairs) if is_batch else len(pairs)
    count = total if count is None else count
    if isinstance(count, bool) or not isinstance(count, int) or not 2 <= count <= total:
        raise InputError(
            f"num_negatives must be a whole number from 2 to the number of pairs given, {total}; got {count!r}"
        )
    rows = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].sort().values
    if is_batch:
        return take(pairs, rows)
    return (collate or torch.utils.data.default_collate)([pairs[int(row)] for row in rows])


def _digest(batch: Any) -> str:
    """SHA-256 of a batch's tensors."""
    digest = hashlib.sha256()
    for leaf in flatten(batch)[0]:
        digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
        digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


def _no_weight_of_f() -> Tensor:
    raise InputError(
        "f of a pair is the sum of two margins, and q the mean of their weights, no function of f: call output_and_weight(model, batch)"
    )
