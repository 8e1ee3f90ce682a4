"""The task of `sst2.py`: sentences of SST-2, and the first layers of MiniLM fine-tuned on some of them.

Legend: N training sentences, T targets, B batch, L tokens, D = 384 features.
"""

from __future__ import annotations

import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from finetuning import Examples, fine_tune
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

import trak
from trak.evaluation import seeded

CLASSES = ("negative", "positive")
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_TOKENS = 80  # the longest sentence of the development set has 60

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained on what.

    Attributes:
        num_train: N, half of each class.
        num_targets: T.
        max_words: of a training sentence and of a target; the least is five.
        layers: of MiniLM's six.
        epochs: passes over a model's rows.
        lr: peak learning rate; it rises over the first tenth of the steps and falls to 0.
        weight_decay: of AdamW.
        batch_size: B.
    """

    num_train: int = 2000
    num_targets: int = 256
    max_words: int = 16
    layers: int = 3
    epochs: int = 2
    lr: float = 2e-4
    weight_decay: float = 0.01
    batch_size: int = 32


def read_sentences(file: Path) -> Examples:
    """All lines of a file of SST-2: a header, then label and sentence separated by a tab.

    Raises:
        SystemExit: no such file.
    """
    if not file.is_file():
        raise SystemExit(
            f"There is no {file}. This example needs sst2_train.tsv.xz and sst2_dev.tsv.xz (lines of label, tab, "
            "sentence, below a header): pass --data with the folder that holds them."
        )
    with lzma.open(file, "rt", encoding="utf-8") as lines:
        pairs = [line.rstrip("\n").split("\t") for line in lines][1:]
    return Examples(
        texts=[text.strip() for _, text in pairs],
        labels=[int(label) for label, _ in pairs],
        rows=list(range(len(pairs))),
    )


def choose_train(everything: Examples, recipe: Recipe) -> Examples:
    """The first N / 2 whole sentences of each class.

    The file holds sentences and most of their phrases. A whole sentence here is a line of 5 to `max_words` words that
    ends with a full stop, exclamation or question mark and is no part of a longer line.

    Raises:
        SystemExit: there are not as many.
    """
    parts = _parts(everything.texts, recipe.max_words)
    whole = [
        row
        for row in everything.rows
        if _fits(everything.texts[row], recipe)
        and everything.texts[row][-1] in ".!?"
        and everything.texts[row] not in parts
    ]
    chosen = []
    for label in range(len(CLASSES)):
        of_class = [row for row in whole if everything.labels[row] == label]
        if 2 * len(of_class) < recipe.num_train:
            raise SystemExit(
                f"--train {recipe.num_train} needs {recipe.num_train // 2} {CLASSES[label]} sentences of 5 to "
                f"{recipe.max_words} words; there are {len(of_class)}. Pass a smaller --train or a larger --max-words."
            )
        chosen += of_class[: recipe.num_train // 2]
    return _by_length(everything, chosen)


def choose_targets(everything: Examples, recipe: Recipe) -> Examples:
    """The first T lines of 5 to `max_words` words."""
    fitting = [row for row in everything.rows if _fits(everything.texts[row], recipe)]
    if len(fitting) < recipe.num_targets:
        raise SystemExit(
            f"--targets {recipe.num_targets}: there are {len(fitting)} sentences of 5 to {recipe.max_words} words."
        )
    return _by_length(everything, fitting[: recipe.num_targets])


def _fits(text: str, recipe: Recipe) -> bool:
    return 5 <= len(text.split()) <= recipe.max_words


def _parts(texts: Sequence[str], max_words: int) -> set[str]:
    """Every run of 5 to `max_words` words that is shorter than the line it is of."""
    found = set()
    for words in (text.split() for text in texts):
        for size in range(5, min(max_words + 1, len(words))):
            found.update(" ".join(words[start : start + size]) for start in range(len(words) - size + 1))
    return found


def _by_length(everything: Examples, rows: Sequence[int]) -> Examples:
    order = sorted(rows, key=lambda row: (len(everything.texts[row].split()), row))
    return Examples(
        texts=[everything.texts[row] for row in order],
        labels=[everything.labels[row] for row in order],
        rows=order,
    )


class SentenceClassifier(nn.Module):
    """Transformer layers, the mean over tokens, and a linear head."""

    def __init__(self, bert: nn.Module, num_features: int) -> None:
        super().__init__()
        self.bert = bert
        self.head = nn.Linear(num_features, len(CLASSES))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [B, 2] of tokens [B, L]."""
        hidden_BLD = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        weights_BL1 = attention_mask[:, :, None].to(hidden_BLD.dtype)
        return self.head((hidden_BLD * weights_BL1).sum(dim=1) / weights_BL1.sum(dim=1))


class Task:
    """Data as tokens, the pretrained weights, and one way to train on some rows.

    The vocabulary is cut to the tokens that occur in the training sentences and the development set: others would
    keep their embeddings but for weight decay, and take most of the memory. All parameters are trained; dropout is off, so that
    the seed decides the head's first weights and the order of the batches and nothing else.
    """

    name, classes = "sst2", CLASSES

    def __init__(self, data: Path, weights: Path, recipe: Recipe) -> None:
        from tokenizers import Tokenizer
        from transformers import BertConfig

        self.recipe = recipe
        development = read_sentences(data / "sst2_dev.tsv.xz")
        self.train_set = choose_train(read_sentences(data / "sst2_train.tsv.xz"), recipe)
        self.targets = choose_targets(development, recipe)

        tokenizer = Tokenizer.from_file(str(weights / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        used = {tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
        for text in (*self.train_set.texts, *development.texts):
            used.update(tokenizer.encode(text).ids)
        vocabulary = sorted(used)  # [PAD] stays 0
        numbers = {token: number for number, token in enumerate(vocabulary)}
        self._train_tokens = [[numbers[t] for t in tokenizer.encode(x).ids] for x in self.train_set.texts]
        self._target_tokens = [[numbers[t] for t in tokenizer.encode(x).ids] for x in self.targets.texts]

        self.config = BertConfig.from_json_file(weights / "config.json")
        self.config.num_hidden_layers = recipe.layers
        self.config.vocab_size = len(vocabulary)
        self.config.max_position_embeddings = MAX_TOKENS
        self.config.hidden_dropout_prob = self.config.attention_probs_dropout_prob = 0.0
        self.config._attn_implementation = "eager"  # the attention that per-example gradients see through
        self._pretrained = load_file(weights / "model.safetensors")
        for name, rows in (("word", torch.tensor(vocabulary)), ("position", torch.arange(MAX_TOKENS))):
            name = f"embeddings.{name}_embeddings.weight"
            self._pretrained[name] = self._pretrained[name][rows]

    def train_loader(self) -> DataLoader:
        """The training sentences in batches, in order."""
        return self._loader(self._train_tokens, self.train_set.labels)

    def target_loader(self) -> DataLoader:
        """The targets in batches, in order."""
        return self._loader(self._target_tokens, self.targets.labels)

    def _loader(self, tokens: list[list[int]], labels: list[int]) -> DataLoader:
        return DataLoader(list(zip(tokens, labels)), batch_size=self.recipe.batch_size, collate_fn=collate)

    def build(self, seed: int = 0) -> SentenceClassifier:
        """MiniLM's first layers and a new head."""
        from transformers import BertModel

        with seeded(seed):
            bert = BertModel(self.config, add_pooling_layer=False)
            model = SentenceClassifier(bert, self.config.hidden_size)
        names = bert.state_dict().keys()
        bert.load_state_dict({name: self._pretrained[name] for name in names})
        return model

    def train(self, rows: Tensor, seed: int) -> nn.Module:
        """Fine-tune on some rows [n] with AdamW."""
        return fine_tune(self.build(seed), rows, seed=seed, recipe=self.recipe, collate=self._batch)

    def _batch(self, rows: Sequence[int]) -> Batch:
        return collate([(self._train_tokens[row], self.train_set.labels[row]) for row in rows])

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> Tensor:
        """[T] f of the targets: logit of the true class minus the other."""
        return torch.cat([trak.TextClassification().output(model, batch) for batch in self.target_loader()])


def collate(examples: Sequence[tuple[list[int], int]]) -> Batch:
    """Tokens and labels as tensors, padded to the longest of the batch."""
    longest = max(len(tokens) for tokens, _ in examples)
    tokens = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in examples])
    return {
        "input_ids": tokens,
        "attention_mask": (tokens != 0).long(),
        "labels": torch.tensor([label for _, label in examples]),
    }
