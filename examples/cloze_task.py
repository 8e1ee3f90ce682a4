"""The task of `cloze.py`: sentences with a blank, and small models of transformers that fill it.

Legend: N training rows, T targets, B batch, L words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import facts_task
import torch
import torch.nn.functional as F
from facts_task import Row, read_facts
from small_banks_settings import DATA_SEED, Recipe, Setting, adamw
from torch import Tensor, nn

import trak

PAD, END, UNKNOWN, BLANK = range(4)
OBJECTS, SENTENCES, MAX_WORDS = 15, 6, 20  # objects, sentences of a fact, words of a sentence: at most
SMALL = {"num_train": 24, "num_targets": 5, "width": 4, "lengths": (1, 2), "batch_size": 12}
QUICK = {**SMALL, "subsets": 6, "models": 2, "checkpoints": 2, "trials": 2}
LARGE = {"num_train": 1000, "num_targets": 50, "width": 64, "batch_size": 50}
COMMON = {**LARGE, "subsets": 40, "models": 2, "checkpoints": 3, "trials": 2}
# Peak rates and weight decay were chosen as lengths are, by hand and by two models each, and so were objects and words above.
RECIPES = {
    "seq2seq": Recipe(**COMMON, lengths=(10, 20), rate=1e-2, weight_decay=0.3),
    "masked": Recipe(**COMMON, lengths=(10, 15, 20), rate=5e-3, weight_decay=0.3),
}


@dataclass(frozen=True, eq=False, kw_only=True)
class Cloze:
    """What is trained and explained, and the sentences that it is made of.

    Attributes:
        setting: as in `small_banks.py`.
        train: sentences with a blank and the object that belongs there, a row each.
        targets: held-out ones.
    """

    setting: Setting
    train: list[Row]
    targets: list[Row]


def read_rows(folder: Path, count: int) -> list[Row]:
    """Sentences of the commonest objects, in random order; only of facts that several sentences state.

    Raises:
        SystemExit: a file is missing, or there are too few.
    """
    facts, _ = read_facts(folder, facts_task.Recipe(max_words=MAX_WORDS))
    stated = [fact for fact in facts if len(fact.masked) > 1]
    found = {
        Row(words=words, object=fact.object): None for fact in stated for words in fact.masked[:SENTENCES]
    }
    counts = Counter(row.object for row in found)
    common = set(sorted(counts, key=lambda name: (-counts[name], name))[:OBJECTS])
    rows = [row for row in found if row.object in common]
    if len(rows) < count:
        raise SystemExit(
            f"{count} sentences are asked for; {folder} has {len(rows)} of the {OBJECTS} commonest objects"
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(DATA_SEED)).tolist()
    return [rows[index] for index in order[:count]]


def vocabulary(rows: Sequence[Row]) -> dict[str, int]:
    """Words that training sentences have more than once, and every object."""
    counts = Counter(word for row in rows for word in row.words)
    often = {word for word, count in counts.items() if count > 1} | {row.object for row in rows}
    often.discard(facts_task.SPECIAL[facts_task.MASK])
    return {word: place for place, word in enumerate(sorted(often), start=BLANK + 1)}


def encode(rows: Sequence[Row], known: dict[str, int], kind: str) -> dict[str, Tensor]:
    """A batch of the task."""
    numbers = {**known, facts_task.SPECIAL[facts_task.MASK]: BLANK}
    tokens_BL = torch.full((len(rows), MAX_WORDS + 1), PAD)
    for place, row in enumerate(rows):
        tokens_BL[place, : len(row.words) + 1] = torch.tensor(
            [*(numbers.get(word, UNKNOWN) for word in row.words), END]
        )
    objects_B = torch.tensor([known.get(row.object, UNKNOWN) for row in rows])
    if kind == "seq2seq":
        labels = torch.stack([objects_B, torch.full_like(objects_B, END)], dim=1)
    else:
        labels = torch.where(tokens_BL == BLANK, objects_B[:, None], -100)
    return {"input_ids": tokens_BL, "attention_mask": (tokens_BL != PAD).long(), "labels": labels}


def build_model(kind: str, num_words: int, width: int) -> nn.Module:
    """One layer (T5: of encoder and of decoder), four heads, words' embeddings tied to the last layer.

    Raises:
        SystemExit: transformers is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise SystemExit("this example needs the models of transformers: pip install transformers") from None
    if kind == "seq2seq":
        sizes = {"d_model": width, "d_kv": width // 4, "num_heads": 4, "d_ff": 2 * width, "num_layers": 1}
        special = {"pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": PAD}
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=num_words, **sizes, **special)
        )
    sizes = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    more = {"max_position_embeddings": MAX_WORDS + 1, "pad_token_id": PAD, "initializer_range": width**-0.5}
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=num_words, **sizes, **more))


def make_cloze(kind: str, data: Path, *, quick: bool = False) -> Cloze:
    """Rows, model and training.

    Raises:
        SystemExit: files or transformers are missing.
    """
    recipe = replace(RECIPES[kind], **QUICK) if quick else RECIPES[kind]
    rows = read_rows(data, recipe.num_train + recipe.num_targets)
    train, targets = rows[: recipe.num_train], rows[recipe.num_train :]
    known = vocabulary(train)
    task = trak.Seq2SeqLM() if kind == "seq2seq" else trak.MaskedLM()
    train_set = encode(train, known, kind)

    def build() -> nn.Module:
        return build_model(kind, BLANK + 1 + len(known), recipe.width)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits_BLV, labels_BL = model(**batch).logits, batch["labels"]
        losses = F.cross_entropy(logits_BLV.flatten(0, 1), labels_BL.flatten(), reduction="none")
        return losses.unflatten(0, labels_BL.shape).sum(1)

    setting = Setting(
        name=f"cloze-{kind}",
        words=f"{type(build()).__name__}, {len(known):,} words and {len({row.object for row in rows})} objects",
        recipe=recipe,
        task=task,
        build=build,
        train_set=train_set,
        targets=encode(targets, known, kind),
        loss=loss,
        train=adamw(build, train_set, loss),
    )
    return Cloze(setting=setting, train=train, targets=targets)


def guess(cloze: Cloze) -> float:
    """Mean log loss of the targets' objects if every blank is given the objects' shares of the training set, one added to each count."""
    counts = Counter(row.object for row in (*cloze.train, *cloze.targets))
    counts.subtract(row.object for row in cloze.targets)
    shares = torch.tensor(
        [(counts[row.object] + 1) / (len(cloze.train) + len(counts)) for row in cloze.targets]
    )
    return float(-shares.log().mean())
