"""A real CLIP for `clip_flickr.py --clip`: weights of transformers or open_clip, fine-tuned on the pairs.

    --clip transformers:openai/clip-vit-base-patch32          a name on the hub, or a folder of save_pretrained
    --clip open_clip:ViT-B-32/laion2b_s34b_b79k               MODEL/WEIGHTS, as open_clip.list_pretrained() has them

What is removed is then missing from fine-tuning alone; what the weights knew before stays.

Legend: n pairs, B pairs of a batch, D dimensions of the embeddings.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from clip_data import Pairs
from clip_towers import (
    MAX_SCALE,
    Recorder,
    Snapshot,
    contrastive_loss,
    endless_batches,
    hash_of,
    one_cycle,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, default_collate

import trak
from trak.tasks.dual_encoder import resolve_encoder

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's CLIP
PARAMETERS = {"transformers": ["*.layers.*"], "open_clip": ["*resblocks*"]}
"""Both transformers. The rest is few, and some of it (scale, class token, positions) belongs to no layer."""


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """How a pretrained CLIP is trained on.

    Attributes:
        epochs: passes over all pairs; models of fewer pairs take as many steps.
        batch_size: B.
        lr: peak learning rate, with the schedule of the small towers.
        weight_decay: of AdamW.
    """

    epochs: int = 3
    batch_size: int = 128
    lr: float = 1e-5
    weight_decay: float = 0.1


@dataclass(frozen=True, eq=False)
class Loaded:
    """A pretrained CLIP and what goes before it.

    Attributes:
        library: "transformers" or "open_clip".
        model: the module.
        size: pixels of its images.
        mean: of each channel, subtracted.
        std: of each channel, divided by.
        tokenize: texts -> the fields of a batch that the text tower reads.
    """

    library: str
    model: nn.Module
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tokenize: Callable[[list[str]], dict[str, Tensor]]


def load(
    spec: str, train: Pairs, held_out: Pairs, recipe: FineTuning, device: str | None = None
) -> Pretrained:
    """The family of models that are fine-tuned from some weights.

    Raises:
        SystemExit: the library or the weights are not there, or `spec` is not LIBRARY:NAME.
    """
    library, _, name = spec.partition(":")
    loaders = {"transformers": _load_transformers, "open_clip": _load_open_clip}
    if library not in loaders or not name:
        raise SystemExit(
            f"--clip {spec!r}: expected transformers:NAME, such as transformers:openai/clip-vit-base-patch32, or open_clip:MODEL/WEIGHTS, "
            "such as open_clip:ViT-B-32/laion2b_s34b_b79k."
        )
    return Pretrained(loaders[library](name), spec, train, held_out, recipe, device)


def _load_transformers(name: str) -> Loaded:
    try:
        from transformers import AutoTokenizer, CLIPModel
    except ImportError:
        raise SystemExit("--clip transformers:… needs transformers. Run: pip install transformers") from None
    try:
        # The attention that per-example gradients by torch.func see through, should they be needed.
        model = CLIPModel.from_pretrained(name, attn_implementation="eager")
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"--clip transformers:{name}: the weights or the tokenizer cannot be had ({str(error).splitlines()[0]}). Give the name of a CLIP on "
            "the hub and a network to fetch it, or a folder with a model and tokenizer written by save_pretrained."
        ) from None
    longest = model.config.text_config.max_position_embeddings

    def tokenize(texts: list[str]) -> dict[str, Tensor]:
        found = tokenizer(
            texts, padding="max_length", truncation=True, max_length=longest, return_tensors="pt"
        )
        return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}

    return Loaded("transformers", model, model.config.vision_config.image_size, MEAN, STD, tokenize)


def _load_open_clip(name: str) -> Loaded:
    try:
        import open_clip
    except ImportError:
        raise SystemExit("--clip open_clip:… needs open_clip. Run: pip install open_clip_torch") from None
    architecture, _, weights = name.partition("/")
    if not weights:
        raise SystemExit(
            f"--clip open_clip:{name}: expected open_clip:MODEL/WEIGHTS, such as ViT-B-32/laion2b_s34b_b79k."
        )
    try:
        model = open_clip.create_model(architecture, pretrained=weights)
        tokenizer = open_clip.get_tokenizer(architecture)
    except Exception as error:  # open_clip passes on whatever its download raised
        raise SystemExit(
            f"--clip open_clip:{name}: the weights cannot be had ({type(error).__name__}: {str(error)[:200]}). open_clip.list_pretrained() "
            "has the names; fetching them needs a network."
        ) from None
    size = model.visual.image_size
    visual = model.visual
    return Loaded(
        "open_clip",
        model,
        size if isinstance(size, int) else size[0],
        tuple(getattr(visual, "image_mean", None) or MEAN),
        tuple(getattr(visual, "image_std", None) or STD),
        lambda texts: {"tokens": tokenizer(texts)},
    )


class PairRows(Dataset):
    """Pairs as the library's models take them, enlarged where they are read."""

    def __init__(self, loaded: Loaded, pairs: Pairs) -> None:
        self._loaded, self._images = loaded, pairs.images
        self._texts = loaded.tokenize(pairs.texts)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, row: int) -> Any:
        loaded = self._loaded
        image = self._images[row][None].float() / 255
        image = F.interpolate(image, size=(loaded.size, loaded.size), mode="bicubic", antialias=True)[
            0
        ].clamp(0, 1)
        image = (image - torch.tensor(loaded.mean)[:, None, None]) / torch.tensor(loaded.std)[:, None, None]
        texts = {name: values[row] for name, values in self._texts.items()}
        return (
            {"pixel_values": image, **texts} if loaded.library == "transformers" else (image, texts["tokens"])
        )


class Pretrained:
    """One way to fine-tune a pretrained CLIP on some pairs."""

    def __init__(
        self, loaded: Loaded, spec: str, train: Pairs, held_out: Pairs, recipe: FineTuning, device: str | None
    ) -> None:
        self.recipe, self.num_train, self.parameters = recipe, len(train), PARAMETERS[loaded.library]
        self.train_set, self.held_out = PairRows(loaded, train), PairRows(loaded, held_out)
        self._loaded, self._encoder = loaded, resolve_encoder(loaded.library)
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.version = json.dumps(
            {
                "clip": spec,
                "captions": train.per_text,
                "pairs": hash_of([*train.names, "", *held_out.names]),
                **asdict(recipe),
            },
            sort_keys=True,
        )

    def build(self, seed: int = 0) -> nn.Module:
        """A copy of the pretrained model, whatever the seed."""
        return copy.deepcopy(self._loaded.model).to(self._device)

    def train(self, rows: Tensor, seed: int, snapshots: int = 0) -> tuple[nn.Module, list[Snapshot]]:
        """Fine-tune on some pairs [n] with AdamW; the seed decides the order of the pairs."""
        recipe, model, order = self.recipe, self.build(), torch.Generator().manual_seed(seed)
        batch_size = min(recipe.batch_size, len(rows))
        steps = recipe.epochs * max(1, self.num_train // recipe.batch_size)
        optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
        record = Recorder(model, steps, snapshots)
        model.train()
        for step, chosen in zip(range(steps), endless_batches(rows, batch_size, order)):
            rate = recipe.lr * one_cycle(step, steps)
            optimizer.param_groups[0]["lr"] = rate
            batch = self._moved(default_collate([self.train_set[int(row)] for row in chosen]))
            scale = torch.as_tensor(self._encoder.logit_scale(model)).clamp(max=MAX_SCALE)
            optimizer.zero_grad()
            contrastive_loss(*self._embed(model, batch), scale).backward()
            optimizer.step()
            record(step, rate)
        return model.eval(), record.snapshots

    @torch.no_grad()
    def embed(self, model: nn.Module, pairs: PairRows) -> tuple[Tensor, Tensor]:
        """(images, texts), [n, D] of length 1."""
        batches = DataLoader(pairs, batch_size=self.recipe.batch_size)
        parts = [self._embed(model, self._moved(batch)) for batch in batches]
        images, texts = (torch.cat(side) for side in zip(*parts))
        return images, texts

    def task(self, num_negatives: int) -> trak.ContrastivePairs:
        """Pairs told from some of the training pairs."""
        return trak.ContrastivePairs(
            self.train_set, num_negatives=num_negatives, encoder=self._loaded.library
        )

    def _embed(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        images, texts = self._encoder.image_features(model, batch), self._encoder.text_features(model, batch)
        return F.normalize(images, dim=1), F.normalize(texts, dim=1)

    def _moved(self, batch: Any) -> Any:
        if isinstance(batch, dict):
            return {name: values.to(self._device) for name, values in batch.items()}
        return tuple(values.to(self._device) for values in batch)
