"""The task of `facts.py`: sentences that state facts of T-REx, one word masked, and a small masked language model.

Legend: N training rows, Q queries, B batch, L words, V vocabulary, D features.
"""

from __future__ import annotations

import json
import lzma
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import trak
from trak.evaluation import seeded

PAD, UNKNOWN, MASK = 0, 1, 2
BUCKET = 8  # batches that are drawn together and sorted by length
SPECIAL = ("[PAD]", "[UNK]", "[MASK]")
WORD = re.compile(r"\w+|[^\w\s]")

Batch = dict[str, Tensor]
Words = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained on what.

    Attributes:
        num_train: N, masked sentences; those of the queries' facts are among them.
        num_queries: at most; Q are left, for which the training set has another object of the relation.
        sentences: the fewest and the most sentences of a query's fact; of a fact that is no query at most as many.
        max_words: of a sentence; the least is six.
        width: D.
        layers: of the transformer.
        epochs: passes over a model's rows.
        lr: peak learning rate; it rises over the first tenth of the steps and falls to 0.
        weight_decay: of AdamW.
        word_dropout: share of words that a training step does not see.
        batch_size: B.
        seed: of the choice of facts.
    """

    num_train: int = 1500
    num_queries: int = 120
    sentences: tuple[int, int] = (3, 6)
    max_words: int = 20
    width: int = 64
    layers: int = 1
    epochs: int = 6
    lr: float = 8e-3
    weight_decay: float = 0.01
    word_dropout: float = 0.2
    batch_size: int = 32
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A fact and the sentences that state it.

    Attributes:
        relation: such as "P19".
        subject: in words.
        object: one word in lower case.
        masked: its sentences in words, the object replaced by [MASK].
        answers: every object that the file has for this subject and relation.
    """

    relation: str
    subject: str
    object: str
    masked: tuple[Words, ...]
    answers: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A training example: words with one [MASK], and the word that belongs there."""

    words: Words
    object: str


@dataclass(frozen=True, kw_only=True)
class Query:
    """A template filled with a subject, the object masked.

    Attributes:
        fact: that is asked for.
        words: of the template.
        rivals: other objects of the relation that are wrong here.
        relevant: rows that state the fact and mask its object, rising.
    """

    fact: Fact
    words: Words
    rivals: tuple[str, ...]
    relevant: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class FactSet:
    """Training rows and queries."""

    rows: tuple[Row, ...]
    queries: tuple[Query, ...]


def in_full(words: Words, answer: str) -> str:
    """The sentence with its masked word."""
    return " ".join(answer if word == SPECIAL[MASK] else word for word in words)


def split_words(text: str) -> Words:
    """Words and punctuation marks in lower case."""
    return tuple(WORD.findall(text.lower()))


def read_facts(folder: Path, recipe: Recipe) -> tuple[list[Fact], dict[str, str]]:
    """Facts whose object is one word, with the sentences that can be used, and the template of every relation.

    A sentence is used if it has 6 to `max_words` words, the object exactly once and as the fact has it, and calls the subject by
    words of its name.

    Raises:
        SystemExit: a file is missing.
    """
    files = [folder / name for name in ("lama_trex_28rel.jsonl.xz", "lama_relations.jsonl")]
    for file in files:
        if not file.is_file():
            raise SystemExit(
                f"There is no {file}. This example needs lama_trex_28rel.jsonl.xz (a fact a line: p, s, o, and ev: sentence, subject and object "
                "as written) and lama_relations.jsonl (relation, template): pass --data with the folder that holds them."
            )
    with lzma.open(files[0], "rt", encoding="utf-8") as lines:
        raw = [json.loads(line) for line in lines]
    relations = [json.loads(line) for line in files[1].read_text(encoding="utf-8").splitlines()]
    templates = {one["relation"]: one["template"] for one in relations}
    return usable_facts(raw, recipe), templates


def usable_facts(raw: Iterable[dict], recipe: Recipe) -> list[Fact]:
    """See `read_facts`; `raw` are the lines of the file."""
    raw = list(raw)
    answers: dict[tuple[str, str], set[str]] = {}
    for line in raw:
        answers.setdefault((line["p"], line["s"]), set()).add(" ".join(split_words(line["o"])))
    facts = []
    for line in raw:
        subject, target = split_words(line["s"]), split_words(line["o"])
        if len(target) != 1 or target[0] in subject:
            continue
        masked = {
            tuple(SPECIAL[MASK] if word == target[0] else word for word in words)
            for words, by_name, as_written in (
                (split_words(sentence), split_words(written), split_words(object_written))
                for sentence, written, object_written in line["ev"]
            )
            if as_written == target
            and set(by_name) <= set(subject)
            and 6 <= len(words) <= recipe.max_words
            and words.count(target[0]) == 1
        }
        if masked:
            known = frozenset(answers[line["p"], line["s"]])
            facts.append(
                Fact(
                    relation=line["p"],
                    subject=line["s"],
                    object=target[0],
                    masked=tuple(sorted(masked)),
                    answers=known,
                )
            )
    return facts


def choose(facts: Sequence[Fact], templates: dict[str, str], recipe: Recipe) -> FactSet:
    """Queries from all relations alike, their sentences, and sentences of other facts up to N.

    Raises:
        SystemExit: there are not as many.
    """
    order = torch.randperm(len(facts), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    low, high = recipe.sentences
    by_relation: dict[str, list[Fact]] = {}
    for index in order:
        fact = facts[index]
        if low <= len(fact.masked) <= high and len(fact.answers) == 1:
            by_relation.setdefault(fact.relation, []).append(fact)
    turns = max((len(some) for some in by_relation.values()), default=0)
    asked = [
        some[turn] for turn in range(turns) for _, some in sorted(by_relation.items()) if turn < len(some)
    ]
    asked = asked[: recipe.num_queries]
    taken = {id(fact) for fact in asked}
    rows: dict[tuple[Words, str], int] = {}
    used: list[Fact] = []
    for fact in (*asked, *(facts[index] for index in order if id(facts[index]) not in taken)):
        if len(rows) >= recipe.num_train and len(used) >= len(asked):
            break
        used.append(fact)
        for words in fact.masked[:high]:
            rows.setdefault((words, fact.object), len(rows))
    if len(asked) < recipe.num_queries or not recipe.num_train <= len(rows):
        raise SystemExit(
            f"{recipe.num_queries} queries and {recipe.num_train} sentences are asked for; there are {len(asked)} facts of {low} to {high} "
            f"sentences with one answer, and {len(rows)} sentences. Pass a smaller --queries or --train, or a larger --max-words."
        )
    kept = list(rows)[: recipe.num_train]
    number = {row: index for index, row in enumerate(kept)}
    objects: dict[str, set[str]] = {}
    for fact in used:
        objects.setdefault(fact.relation, set()).add(fact.object)
    queries = []
    for fact in asked:
        filled = templates[fact.relation].replace("[X]", fact.subject).replace("[Y]", " \0 ")
        words = tuple(
            word
            for place, part in enumerate(filled.split("\0"))
            for word in ((SPECIAL[MASK],) * bool(place) + split_words(part))
        )
        relevant = sorted(
            number[words, fact.object] for words in fact.masked if (words, fact.object) in number
        )
        rivals = tuple(sorted(objects[fact.relation] - fact.answers))
        if rivals:  # otherwise nothing could be got wrong
            queries.append(Query(fact=fact, words=words, rivals=rivals, relevant=tuple(relevant)))
    return FactSet(
        rows=tuple(Row(words=words, object=target) for words, target in kept), queries=tuple(queries)
    )


class Block(nn.Module):
    """Attention of some positions to all of them, and two layers of neurons; normalised before each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_in, self.norm_seen, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, asking_BAD: Tensor, seen_BLD: Tensor, visible_B11L: Tensor) -> Tensor:
        """[B, A, D] for A asking positions."""
        seen = self.norm_seen(seen_BLD)
        parts = (self.query(self.norm_in(asking_BAD)), self.key(seen), self.value(seen))
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=visible_B11L)
        asking_BAD = asking_BAD + self.out(found.transpose(1, 2).flatten(2))
        return asking_BAD + self.mlp(self.norm_mlp(asking_BAD))


class MaskedModel(nn.Module):
    """A masked language model of transformer layers that answers at [MASK] only: the last one is computed there."""

    def __init__(self, vocabulary: int, longest: int, width: int, layers: int = 1, heads: int = 4) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, width), nn.Embedding(longest, width)
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(layers - 1))
        self.last = Block(width, heads)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)
        for table in (self.words, self.places):
            nn.init.normal_(table.weight, std=width**-0.5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [B, 1, V] of the masked word."""
        visible = (attention_mask != 0)[:, None, None, :]
        places_BL = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        hidden_BLD = self.words(input_ids) + self.places(places_BL)
        for layer in self.layers:
            hidden_BLD = layer(hidden_BLD, hidden_BLD, visible)
        masked_B1L = (input_ids == MASK)[:, None, :].to(hidden_BLD.dtype)
        return self.head(self.norm(self.last(masked_B1L @ hidden_BLD, hidden_BLD, visible)))


@dataclass(frozen=True)
class Task:
    """Rows and queries as word numbers, and one way to train on some rows.

    Words that occur once in the training set and in no subject, object or template are [UNK].

    Attributes:
        facts: rows and queries.
        recipe: see there.
    """

    facts: FactSet
    recipe: Recipe
    vocabulary: tuple[str, ...] = field(init=False)
    rows: tuple[tuple[list[int], int], ...] = field(init=False)
    queries: tuple[tuple[list[int], int], ...] = field(init=False)

    def __post_init__(self) -> None:
        counts: Counter[str] = Counter()
        for row in self.facts.rows:
            counts.update({*row.words, row.object})
        for query in self.facts.queries:
            counts.update(dict.fromkeys((*query.words, *query.rivals, query.fact.object), 2))
        for row in self.facts.rows:
            counts[row.object] += 1
        words = sorted(word for word, count in counts.items() if count > 1 and word not in SPECIAL)
        object.__setattr__(self, "vocabulary", (*SPECIAL, *words))
        object.__setattr__(self, "_number", {word: n for n, word in enumerate(self.vocabulary)})
        rows = tuple((self._numbers(row.words), self._number[row.object]) for row in self.facts.rows)
        queries = tuple((self._numbers(q.words), self._number[q.fact.object]) for q in self.facts.queries)
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "queries", queries)
        table = collate(rows)
        object.__setattr__(self, "_table", table)
        object.__setattr__(self, "_lengths", table["attention_mask"].sum(1))
        wrong_QV = torch.ones(len(queries), len(self.vocabulary), dtype=torch.bool)
        for index, query in enumerate(self.facts.queries):
            wrong_QV[index, [self._number[word] for word in query.rivals]] = False
        object.__setattr__(self, "_no_rival", wrong_QV)

    def _numbers(self, words: Words) -> list[int]:
        return [self._number.get(word, UNKNOWN) for word in words]

    @property
    def explained(self) -> dict[str, Any]:
        """Arguments of attribution methods: a row has one masked word, with a weight of its own."""
        return {"model": self.build(), "task": trak.MaskedLM(weights="single_position")}

    @property
    def representation(self) -> dict[str, Any]:
        """Where representations are read: what goes into the last layer, at the mask."""
        return {}

    def train_loader(self) -> DataLoader:
        """The rows in batches, in order."""
        return DataLoader(self.rows, batch_size=64, collate_fn=collate)

    def query_loader(self) -> DataLoader:
        """The queries in batches, in order."""
        return DataLoader(self.queries, batch_size=64, collate_fn=collate)

    def build(self, seed: int = 0) -> MaskedModel:
        """A model with random weights."""
        longest = max(len(words) for words, _ in (*self.rows, *self.queries))
        with seeded(seed):
            return MaskedModel(len(self.vocabulary), longest, self.recipe.width, self.recipe.layers)

    def train(
        self, rows: Tensor, seed: int, *, keep_at: Sequence[float] = ()
    ) -> tuple[MaskedModel, list[tuple[float, dict]]]:
        """A model of some rows [n], and (learning rate, state) after the shares `keep_at` of the epochs."""
        recipe, model = self.recipe, self.build(seed).train()
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True
        )
        steps, step, kept = recipe.epochs * len(self._epoch(rows, torch.Generator())), 0, []
        marks = {round(share * recipe.epochs) for share in keep_at}
        for epoch in range(recipe.epochs):
            for chosen in self._epoch(rows, generator):
                batch = self._batch(chosen)
                labels, tokens = batch.pop("labels"), batch["input_ids"]
                hidden = (torch.rand(tokens.shape, generator=generator) < recipe.word_dropout) & (
                    tokens > MASK
                )
                batch["input_ids"] = tokens.masked_fill(hidden, UNKNOWN)
                rate = recipe.lr * min(1.0, (step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
                optimizer.param_groups[0]["lr"] = rate
                optimizer.zero_grad()
                F.cross_entropy(model(**batch).flatten(0, 1), labels.flatten()).backward()
                optimizer.step()
                step += 1
            if epoch + 1 in marks:
                kept.append((rate, {name: value.clone() for name, value in model.state_dict().items()}))
        return model.eval(), kept

    def _epoch(self, rows: Tensor, generator: torch.Generator) -> list[Tensor]:
        """Batches of rows in random order, in which neighbours in a random order of all rows are sorted by length."""
        size, batches = self.recipe.batch_size, []
        for bucket in rows[torch.randperm(len(rows), generator=generator)].split(BUCKET * size):
            batches += bucket[self._lengths[bucket].argsort(stable=True)].split(size)
        return [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]

    def _batch(self, rows: Tensor) -> Batch:
        """What `collate` makes of these rows, from the table of all."""
        tokens = self._table["input_ids"][rows, : int(self._lengths[rows].max())]
        return {"input_ids": tokens, "attention_mask": tokens != PAD, "labels": self._table["labels"][rows]}

    @torch.no_grad()
    def leads(self, model: nn.Module) -> Tensor:
        """[Q] logit of the true object minus the largest of the relation's other objects: above 0 where the model gives the fact."""
        logits_QV = torch.cat([model(b["input_ids"], b["attention_mask"])[:, 0] for b in self.query_loader()])
        true_Q = logits_QV.gather(1, torch.tensor([label for _, label in self.queries])[:, None])[:, 0]
        return true_Q - logits_QV.masked_fill(self._no_rival, float("-inf")).amax(1)


def collate(examples: Sequence[tuple[list[int], int]]) -> Batch:
    """Words and labels [B, 1] as tensors, padded to the longest of the batch."""
    longest = max(len(words) for words, _ in examples)
    tokens = torch.tensor([words + [PAD] * (longest - len(words)) for words, _ in examples])
    return {
        "input_ids": tokens,
        "attention_mask": (tokens != PAD).long(),
        "labels": torch.tensor([[label] for _, label in examples]),
    }
