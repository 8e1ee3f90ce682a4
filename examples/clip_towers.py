"""Two small towers for `clip_flickr.py`, trained from scratch as CLIP is, in seconds on one core.

Legend: N training pairs, H held-out pairs, B pairs of a batch, L words, D dimensions of the embeddings.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from clip_data import Pairs, Vocabulary
from torch import Tensor, nn
from torch.nn import functional as F

import trak
from trak.evaluation import seeded

State = dict[str, Tensor]
MAX_SCALE = 100.0  # of cosines in the logits, as in CLIP


class Family(Protocol):
    """What the experiment asks of a kind of model: `SmallTowers` here, `clip_pretrained.Pretrained` elsewhere.

    Attributes:
        train_set: the training pairs, as `trak.attribute` takes them.
        held_out: the held-out pairs, likewise.
        num_train: N.
        parameters: patterns of the parameters to attribute through.
        version: everything that decides a trained model, as a string.
    """

    train_set: object
    held_out: object
    num_train: int
    parameters: Sequence[str]
    version: str

    def build(self, seed: int) -> nn.Module:
        """A model before training."""
        ...

    def train(self, rows: Tensor, seed: int, snapshots: int = 0) -> tuple[nn.Module, list[Snapshot]]:
        """A model trained on these pairs, and its states at even distances along the way, the last one at the end."""
        ...

    def embed(self, model: nn.Module, pairs: object) -> tuple[Tensor, Tensor]:
        """(images, texts) of `train_set` or `held_out`, [n, D] of length 1."""
        ...

    def task(self, num_negatives: int) -> trak.ContrastivePairs:
        """What is explained."""
        ...


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A model on its way.

    Attributes:
        state: copies of its tensors.
        learning_rate: mean over the steps since the snapshot before.
    """

    state: State
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained, and how.

    Attributes:
        size: images are shrunk to size × size pixels.
        channels: of the first convolution; the second has twice as many.
        dim: D, and the width of the word embeddings.
        hidden: units between the mean of the word embeddings and the text's embedding.
        longest: words of a text that are read, L.
        least: texts in which a word must occur to be known.
        epochs: passes over all pairs; models of fewer pairs take as many steps.
        batch_size: B; what is left over at the end of a pass waits for the next.
        lr: peak learning rate; it rises over the first 15% of the steps and falls to 0 by a cosine.
        weight_decay: of AdamW.
    """

    size: int = 32
    channels: int = 16
    dim: int = 64
    hidden: int = 128
    longest: int = 60
    least: int = 3
    epochs: int = 6
    batch_size: int = 256
    lr: float = 3e-3
    weight_decay: float = 0.5


class Towers(nn.Module):
    """Two convolutions for the image; the mean of word embeddings and one hidden layer for the text."""

    def __init__(self, recipe: Recipe, num_words: int) -> None:
        super().__init__()
        width, grid = recipe.channels, recipe.size // 8
        self.image = nn.Sequential(
            nn.Conv2d(3, width, 4, 4, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * grid * grid, recipe.dim),
        )
        self.words = nn.Embedding(num_words, recipe.dim, padding_idx=0)
        nn.init.normal_(self.words.weight[1:], std=0.1)
        self.text = nn.Sequential(
            nn.Linear(recipe.dim, recipe.hidden), nn.ReLU(), nn.Linear(recipe.hidden, recipe.dim)
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def embed_images(self, images: Tensor) -> Tensor:
        """[B, D] of images [B, 3, size, size]."""
        return self.image(images)

    def embed_texts(self, tokens: Tensor) -> Tensor:
        """[B, D] of words [B, L]; row 0 of the table, which pads, is 0 and stays so."""
        count_B1 = (tokens != 0).sum(1, keepdim=True).clamp_min(1)
        # Means of some fifty embeddings are short: the factor brings them to the size that the next layer expects.
        return self.text(4 * self.words(tokens).sum(1) / count_B1)

    def scale(self) -> Tensor:
        """The factor of cosines in the logits."""
        return self.logit_scale.exp().clamp(max=MAX_SCALE)


ENCODER = trak.DualEncoder(
    image_features=lambda model, batch: model.embed_images(batch[0]),
    text_features=lambda model, batch: model.embed_texts(batch[1]),
    logit_scale=lambda model: model.scale(),
    name="small towers",
)


class SmallTowers:
    """The pairs as arrays, and one way to train on some of them."""

    # The scale belongs to no layer.
    parameters = ("image.*", "words.*", "text.*")

    def __init__(self, train: Pairs, held_out: Pairs, recipe: Recipe) -> None:
        self.recipe, self.num_train = recipe, len(train)
        vocabulary = Vocabulary(train.texts, recipe.least)
        self.num_words = len(vocabulary)
        self.train_set = self._arrays(train, vocabulary)
        self.held_out = self._arrays(held_out, vocabulary)
        images_N = self.train_set[0]
        # Mirrored copies, so that half of each batch can be mirrored without work.
        self._both = torch.cat([images_N, images_N.flip(3)]).to(memory_format=torch.channels_last)
        self.version = json.dumps(
            {
                "towers": 1,
                "captions": train.per_text,
                "pairs": hash_of([*train.names, "", *held_out.names]),
                **asdict(recipe),
            },
            sort_keys=True,
        )

    def _arrays(self, pairs: Pairs, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
        size = self.recipe.size
        images = torch.cat([F.adaptive_avg_pool2d(part.float(), size) for part in pairs.images.split(1000)])
        return (images - 115) / 68, vocabulary.encode(pairs.texts, self.recipe.longest)

    def build(self, seed: int = 0) -> Towers:
        """Random weights."""
        with seeded(seed):
            return Towers(self.recipe, self.num_words)

    def train(self, rows: Tensor, seed: int, snapshots: int = 0) -> tuple[Towers, list[Snapshot]]:
        """Train on some pairs [n] with AdamW and the symmetric contrastive loss over each batch."""
        recipe, model, order = self.recipe, self.build(seed), torch.Generator().manual_seed(seed)
        batch_size = min(recipe.batch_size, len(rows))
        # As many as for all pairs: what is removed takes away what can be learned, not steps to learn in.
        steps = recipe.epochs * max(1, self.num_train // recipe.batch_size)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True
        )
        record = Recorder(model, steps, snapshots)
        model.image.to(memory_format=torch.channels_last)
        for step, chosen in zip(range(steps), endless_batches(rows, batch_size, order)):
            rate = recipe.lr * one_cycle(step, steps)
            optimizer.param_groups[0]["lr"] = rate
            mirrored = self.num_train * torch.randint(2, chosen.shape, generator=order)
            images_BD = F.normalize(model.embed_images(self._both[chosen + mirrored]), dim=1)
            texts_BD = F.normalize(model.embed_texts(self.train_set[1][chosen]), dim=1)
            optimizer.zero_grad()
            contrastive_loss(images_BD, texts_BD, model.scale()).backward()
            optimizer.step()
            record(step, rate)
        return model.eval(), record.snapshots

    @torch.no_grad()
    def embed(self, model: Towers, pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(images, texts), [n, D] of length 1."""
        parts = [
            (model.embed_images(images), model.embed_texts(tokens))
            for images, tokens in zip(*(side.split(500) for side in pairs))
        ]
        images, texts = (F.normalize(torch.cat(side), dim=1) for side in zip(*parts))
        return images, texts

    def task(self, num_negatives: int) -> trak.ContrastivePairs:
        """Pairs told from some of the training pairs."""
        return trak.ContrastivePairs(self.train_set, num_negatives=num_negatives, encoder=ENCODER)


class Recorder:
    """Copies a model's state at even distances, the last time at the end."""

    def __init__(self, model: nn.Module, steps: int, count: int) -> None:
        self._model = model
        self._at = {round(steps * (index + 1) / count) for index in range(count)}
        self._rates: list[float] = []
        self.snapshots: list[Snapshot] = []

    def __call__(self, step: int, rate: float) -> None:
        self._rates.append(rate)
        if step + 1 in self._at:
            tensors = self._model.state_dict().items()
            state = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors}
            self.snapshots.append(Snapshot(state, sum(self._rates) / len(self._rates)))
            self._rates = []


def contrastive_loss(images_BD: Tensor, texts_BD: Tensor, scale: Tensor) -> Tensor:
    """Cross-entropy of finding each partner in the batch, mean of both directions (CLIP, Radford et al. 2021)."""
    logits_BB = scale * images_BD @ texts_BD.T
    partners_B = torch.arange(len(logits_BB), device=logits_BB.device)
    return (F.cross_entropy(logits_BB, partners_B) + F.cross_entropy(logits_BB.T, partners_B)) / 2


def endless_batches(rows: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches [B] of whole epochs in random order; the rest of an epoch is left out."""
    while True:
        order = rows[torch.randperm(len(rows), generator=generator)]
        yield from order[: len(order) - len(order) % batch_size].split(batch_size)


def one_cycle(step: int, steps: int, warmup: float = 0.15) -> float:
    """Factor of the peak learning rate."""
    share = (step + 0.5) / steps
    if share < warmup:
        return share / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (share - warmup) / (1 - warmup))


def hash_of(names: Sequence[str]) -> str:
    """A digest that tells other pairs, or another order, apart."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def alignment(family: Family, model: nn.Module) -> Tensor:
    """[2H] float64: the cosine of image and text of each held-out pair, and by how much it exceeds that of unmatched ones.

    The second is the cosine less the mean of those of the image with the other texts and of the text with the other images: a
    model whose embeddings all point the same way has cosines near 1 and no excess.
    """
    images_HD, texts_HD = family.embed(model, family.held_out)
    cosines_HH = (images_HD @ texts_HD.T).double().cpu()
    return torch.cat([cosines_HH.diagonal(), excess(cosines_HH)])


def excess(cosines_HH: Tensor) -> Tensor:
    """Diagonal less the mean of the rest of its row and column, [H]."""
    matched_H, others = cosines_HH.diagonal(), 2 * (len(cosines_HH) - 1)
    return matched_H - (cosines_HH.sum(0) + cosines_HH.sum(1) - 2 * matched_H) / others
