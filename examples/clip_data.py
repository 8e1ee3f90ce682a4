"""The pairs of `clip_flickr.py`: photographs of Flickr8k at 64 pixels, and their captions.

Legend: N pairs, L words of a text, V words in the vocabulary.
"""

from __future__ import annotations

import gzip
import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PHOTOS, CAPTIONS = "flickr8k_64px.npz", "flickr8k_captions.json.gz"


@dataclass(frozen=True, eq=False, kw_only=True)
class Pairs:
    """Photographs, each with a text.

    Attributes:
        images: [N, 3, H, W] uint8.
        captions: of each photograph, in the file's order.
        names: of the photographs' files.
        per_text: how many captions make the text of a pair.
    """

    images: Tensor
    captions: list[list[str]]
    names: list[str]
    per_text: int

    def __len__(self) -> int:
        """N."""
        return len(self.images)

    @property
    def texts(self) -> list[str]:
        """The first captions of each photograph, one after another."""
        return [" ".join(each[: self.per_text]) for each in self.captions]

    def __getitem__(self, rows: Sequence[int] | Tensor) -> Pairs:
        """Some of the pairs."""
        rows = [int(row) for row in rows]
        return Pairs(
            images=self.images[rows],
            captions=[self.captions[row] for row in rows],
            names=[self.names[row] for row in rows],
            per_text=self.per_text,
        )


def read_pairs(folder: Path, per_text: int) -> Pairs:
    """All photographs that have captions.

    Raises:
        SystemExit: a file is missing.
    """
    missing = [name for name in (PHOTOS, CAPTIONS) if not (folder / name).is_file()]
    if missing:
        raise SystemExit(
            f"{folder} has no {' and no '.join(missing)}. This example needs the photographs of Flickr8k ({PHOTOS}: arrays jpeg, with all "
            f"files' bytes end to end, offsets [N + 1] in it, and names [N]) and their captions ({CAPTIONS}: an object of name to a list of "
            "sentences): pass --data with the folder that holds them."
        )
    file = np.load(folder / PHOTOS)
    data, offsets, names = file["jpeg"].tobytes(), file["offsets"], [str(name) for name in file["names"]]
    with gzip.open(folder / CAPTIONS, "rt", encoding="utf-8") as lines:
        captions = json.load(lines)
    images = [
        np.asarray(Image.open(io.BytesIO(data[start:stop])).convert("RGB"))
        for start, stop in pairwise(offsets)
    ]
    return Pairs(
        images=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
        captions=[captions[name] for name in names],
        names=names,
        per_text=per_text,
    )


def split(pairs: Pairs, num_train: int, num_held_out: int, seed: int = 0) -> tuple[Pairs, Pairs]:
    """Training pairs and held-out pairs, drawn once.

    Raises:
        SystemExit: there are not as many.
    """
    if num_train + num_held_out > len(pairs):
        raise SystemExit(
            f"--train {num_train} and --held-out {num_held_out} are more pairs than the {len(pairs)} that there are."
        )
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    return pairs[order[:num_train]], pairs[order[len(order) - num_held_out :]]


class Vocabulary:
    """Words that occur in at least `least` texts, numbered from 1 in alphabetical order; 0 pads."""

    def __init__(self, texts: Sequence[str], least: int) -> None:
        counts = Counter(word for text in texts for word in set(words(text)))
        kept = sorted(word for word, count in counts.items() if count >= least)
        self.numbers = {word: number for number, word in enumerate(kept, start=1)}

    def __len__(self) -> int:
        """V, padding included."""
        return len(self.numbers) + 1

    def encode(self, texts: Sequence[str], longest: int) -> Tensor:
        """[N, L] int64: the known words of each text, the first `longest` of them."""
        out_NL = torch.zeros(len(texts), longest, dtype=torch.int64)
        for row, text in enumerate(texts):
            known = [self.numbers[word] for word in words(text) if word in self.numbers][:longest]
            out_NL[row, : len(known)] = torch.tensor(known, dtype=torch.int64)
        return out_NL


def words(text: str) -> list[str]:
    """Lower-case words without punctuation and digits."""
    return re.findall(r"[a-z]+", text.lower())
