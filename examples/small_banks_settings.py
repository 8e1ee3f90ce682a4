"""The three problems of `small_banks.py`: data, a model, and how it is trained on some of the rows.

Legend: N training rows, T targets, B batch, L words, V vocabulary, D features.
"""

from __future__ import annotations

import json
import lzma
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from facts_task import split_words
from torch import Tensor, nn

import trak
from trak.demo.data import load_data
from trak.evaluation import Bank, retrain, retrain_stacked, seeded

PAD, START, UNKNOWN = 0, 1, 2
DATA_SEED = 0  # which rows are drawn, in what order


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Sizes and training of one setting; `rate` peaks after a tenth of the steps and falls to 0.

    Attributes:
        num_train: N, or fewer where the data has no more.
        num_targets: T.
        width: of the layers, see each `build`.
        lengths: epochs of which the length of training is chosen, by the loss of rows that models have not seen.
        batch_size: B.
        rate: peak learning rate, of SGD with momentum 0.9, or of AdamW for the language model.
        weight_decay: of the same.
        subsets: S.
        models: R, on each subset.
        checkpoints: trained on all rows, with different seeds.
        trials: models of each length that is tried.
        dim: K.
    """

    num_train: int
    num_targets: int
    width: int
    lengths: tuple[int, ...]
    batch_size: int
    rate: float
    weight_decay: float
    subsets: int = 100
    models: int = 3
    checkpoints: int = 5
    trials: int = 8
    dim: int = 4096

    def factor(self, share: float) -> float:
        """Of the peak rate after a share of training in (0, 1)."""
        return min(share / 0.1, (1 - share) / 0.9)


@dataclass(frozen=True, eq=False, kw_only=True)
class Setting:
    """What is trained on what, and explained.

    Attributes:
        name: on the command line.
        words: in one sentence.
        recipe: sizes and training.
        task: of trak.
        build: a new model, initialised from torch's shared generator.
        train_set: all N rows as one batch of the task.
        targets: T rows as one batch.
        loss: (model, batch) → [B], the training loss of each row.
        train: (recipe, epochs, outputs, what `retrain` takes) → a bank.
    """

    name: str
    words: str
    recipe: Recipe
    task: trak.Task
    build: Callable[[], nn.Module]
    train_set: Any
    targets: Any
    loss: Callable[[nn.Module, Any], Tensor]
    train: Callable[..., Bank]

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> Tensor:
        """F of the targets, [T]."""
        return self.task.output(model, self.targets)

    @torch.no_grad()
    def losses(self, model: nn.Module) -> Tensor:
        """Training loss of every training row, seen or not, [N]."""
        return self.loss(model, self.train_set)

    @torch.no_grad()
    def target_losses(self, model: nn.Module) -> Tensor:
        """The same of the targets, [T]."""
        return self.loss(model, self.targets)


# Peak rates and decay were chosen as lengths are, by hand and by two models each.
RECIPES = {
    "rows": Recipe(
        num_train=300, num_targets=100, width=16, lengths=(5, 10, 20, 40), batch_size=25, rate=0.02, weight_decay=0.05,
    ),
    "regression": Recipe(
        num_train=353, num_targets=89, width=128, lengths=(20, 40, 80, 160), batch_size=25, rate=0.02, weight_decay=3e-3,
    ),
    "language": Recipe(
        num_train=1000, num_targets=100, width=48, lengths=(5, 10, 20), batch_size=32, rate=5e-3, weight_decay=0.1,
        subsets=60, models=2, trials=4,
    ),
}  # fmt: skip
QUICK: dict[str, dict[str, Any]] = {
    "rows": {"num_train": 40, "num_targets": 6, "width": 4, "batch_size": 10},
    "regression": {"num_train": 40, "num_targets": 6, "width": 16, "batch_size": 10},
    "language": {"num_train": 40, "num_targets": 6, "width": 8, "batch_size": 10},
}
SMALL = {"lengths": (1, 2), "subsets": 6, "models": 2, "checkpoints": 2, "trials": 2, "dim": 64}


def make_setting(name: str, data: Path, *, quick: bool = False) -> Setting:
    """A setting by its name.

    Raises:
        SystemExit: the sentences are not there.
    """
    recipe = replace(RECIPES[name], **QUICK[name], **SMALL) if quick else RECIPES[name]
    makers: dict[str, Callable[[], Setting]] = {
        "rows": lambda: rows(recipe),
        "regression": lambda: regression(recipe),
        "language": lambda: language(recipe, read_sentences(data)),
    }
    return makers[name]()


def sgd(build: Callable[[], nn.Module], train_set: tuple[Tensor, Tensor], loss: Callable) -> Callable:
    """Training of a stack of models at once by SGD."""

    def train(recipe: Recipe, epochs: int, outputs: Callable, **plan: Any) -> Bank:
        return retrain_stacked(
            build,
            *train_set,
            outputs,
            epochs=epochs,
            batch_size=recipe.batch_size,
            lr=recipe.rate,
            momentum=0.9,
            weight_decay=recipe.weight_decay,
            schedule=recipe.factor,
            loss=loss,
            stack_size=8,
            **plan,
        )

    return train


def adamw(build: Callable[[], nn.Module], train_set: dict[str, Tensor], loss: Callable) -> Callable:
    """Training of one model after another by AdamW, on the mean of its rows' losses."""

    def fit(rows: Tensor, seed: int, *, recipe: Recipe, epochs: int) -> nn.Module:
        with seeded(seed):
            model = build()
        generator = torch.Generator().manual_seed(seed)
        batches = [
            batch
            for _ in range(epochs)
            for batch in rows[torch.randperm(len(rows), generator=generator)].split(recipe.batch_size)
        ]
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=recipe.rate, weight_decay=recipe.weight_decay, fused=True
        )
        for step, picked in enumerate(batches):
            optimizer.param_groups[0]["lr"] = recipe.rate * recipe.factor((step + 0.5) / len(batches))
            optimizer.zero_grad()
            loss(model, {name: values[picked] for name, values in train_set.items()}).mean().backward()
            optimizer.step()
        return model.eval()

    def train(recipe: Recipe, epochs: int, outputs: Callable, **plan: Any) -> Bank:
        return retrain(
            lambda picked, seed: fit(picked, seed, recipe=recipe, epochs=epochs),
            outputs,
            num_train=recipe.num_train,
            **plan,
        )

    return train


def rows(recipe: Recipe) -> Setting:
    """Few images: Fashion-MNIST, as it is bundled, with its true labels."""
    data = load_data(corrupted_share=0.0, seed=0)
    order = torch.Generator().manual_seed(DATA_SEED)
    train = torch.randperm(len(data.images), generator=order)[: recipe.num_train]
    targets = torch.randperm(len(data.test_images), generator=order)[: recipe.num_targets]

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, recipe.width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(recipe.width, 2 * recipe.width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * recipe.width * 7 * 7, 10),
        )

    train_set = (data.images[train], data.labels[train])
    return Setting(
        name="rows",
        words="images of Fashion-MNIST in 10 classes, a ConvNet of two layers and a linear one, log loss",
        recipe=recipe,
        task=trak.ImageClassification(),
        build=build,
        train_set=train_set,
        targets=(data.test_images[targets], data.test_labels[targets]),
        loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"),
        train=sgd(build, train_set, F.cross_entropy),
    )


def regression(recipe: Recipe) -> Setting:
    """Diabetes of scikit-learn: how far the disease went in a year, from ten measurements; all of mean 0 and deviation 1 over the training rows.

    Raises:
        SystemExit: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_diabetes
    except ImportError:
        raise SystemExit(
            "--setting regression needs the data that come with scikit-learn: pip install scikit-learn"
        ) from None
    inputs, values = (torch.tensor(part, dtype=torch.float64) for part in load_diabetes(return_X_y=True))
    both = torch.cat([inputs, values[:, None]], dim=1)
    both = both[torch.randperm(len(both), generator=torch.Generator().manual_seed(DATA_SEED))]
    seen = both[: recipe.num_train]
    both = ((both - seen.mean(0)) / seen.std(0)).float()
    train, targets = both[: recipe.num_train], both[recipe.num_train :][: recipe.num_targets]

    def build() -> nn.Module:
        width = recipe.width
        return nn.Sequential(
            nn.Linear(10, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1), nn.Flatten(0)
        )  # fmt: skip

    train_set = (train[:, :10], train[:, 10])
    return Setting(
        name="regression",
        words="diabetes data of scikit-learn, ten numbers to one, a perceptron with two hidden layers, squared error",
        recipe=recipe,
        task=trak.Regression(),
        build=build,
        train_set=train_set,
        targets=(targets[:, :10], targets[:, 10]),
        loss=lambda model, batch: F.mse_loss(model(batch[0]), batch[1], reduction="none"),
        train=sgd(build, train_set, half_square),
    )


def half_square(predictions: Tensor, values: Tensor) -> Tensor:
    """Mean of ½ (ŷ − y)², the loss of trak.Regression."""
    return 0.5 * F.mse_loss(predictions, values)


def read_sentences(data: Path) -> list[tuple[str, ...]]:
    """Different sentences of 6 to 14 words that state T-REx facts with at least three such sentences, the sentences of a fact together.

    Raises:
        SystemExit: there is no such file.
    """
    file = data / "lama_trex_28rel.jsonl.xz"
    if not file.is_file():
        raise SystemExit(
            f"There is no {file}. --setting language needs sentences of T-REx (a fact a line, with ev: sentence, subject and object as "
            "written): pass --data with the folder that holds lama_trex_28rel.jsonl.xz."
        )
    with lzma.open(file, "rt", encoding="utf-8") as lines:
        facts = [json.loads(line) for line in lines]
    found: dict[tuple[str, ...], None] = {}
    for index in torch.randperm(len(facts), generator=torch.Generator().manual_seed(DATA_SEED)).tolist():
        sentences = {split_words(sentence) for sentence, *_ in facts[index]["ev"]}
        short = sorted(words for words in sentences if 6 <= len(words) <= 14)
        if len(short) >= 3:
            found.update(dict.fromkeys(short[:6]))
    return list(found)


class LanguageModel(nn.Module):
    """A transformer of one layer, before which it normalises, that sees words to the left.

    Args:
        num_words: V.
        width: D.
        length: of the longest sentence.
    """

    def __init__(self, num_words: int, width: int, length: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(num_words, width), nn.Embedding(length, width)
        self.norm, self.query = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.mixed = nn.Linear(width, width)
        self.second_norm, self.up = nn.LayerNorm(width), nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.last_norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_words)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [B, L, V]. Padding is on the right, where no word looks."""
        hidden = self.words(input_ids) + self.places(
            torch.arange(input_ids.shape[1], device=input_ids.device)
        )
        parts = self.query(self.norm(hidden)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.mixed(mixed.transpose(1, 2).flatten(2))
        hidden = hidden + self.down(F.gelu(self.up(self.second_norm(hidden))))
        return self.head(self.last_norm(hidden))


def encode(sentences: Sequence[tuple[str, ...]], known: Mapping[str, int]) -> dict[str, Tensor]:
    """A batch of the task; rare words are read as UNKNOWN and not asked for."""
    length = 1 + max(len(words) for words in sentences)
    tokens = torch.full((len(sentences), length), PAD)
    for row, words in enumerate(sentences):
        tokens[row, : 1 + len(words)] = torch.tensor([START, *(known.get(word, UNKNOWN) for word in words)])
    labels = tokens.masked_fill((tokens == PAD) | (tokens == UNKNOWN), -100)
    return {"input_ids": tokens, "attention_mask": (tokens != PAD).long(), "labels": labels}


def language(recipe: Recipe, sentences: Sequence[tuple[str, ...]]) -> Setting:
    """Short sentences, and a small causal language model with a vocabulary of its own; the loss of a sentence is a sum over its words."""
    chosen = sentences[: recipe.num_train + recipe.num_targets]
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(DATA_SEED)).tolist()
    train = [chosen[index] for index in order[: recipe.num_train]]
    targets = [chosen[index] for index in order[recipe.num_train :]]
    counts = Counter(word for words in train for word in words)
    often = sorted(word for word, count in counts.items() if count > 1)
    known = {word: number for number, word in enumerate(often, start=UNKNOWN + 1)}
    train_set, task = encode(train, known), trak.CausalLM()
    length = 1 + max(len(words) for words in chosen)

    def build() -> nn.Module:
        return LanguageModel(UNKNOWN + 1 + len(known), recipe.width, length)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return -task.for_training().output(model, batch)

    return Setting(
        name="language",
        words=f"sentences that state facts of T-REx, a transformer of one layer over {len(known):,} words, log loss summed over words",
        recipe=recipe,
        task=task,
        build=build,
        train_set=train_set,
        targets=encode(targets, known),
        loss=loss,
        train=adamw(build, train_set, loss),
    )
