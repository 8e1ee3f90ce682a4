"""The paper's setting for `facts.py --paper`: FTRACE-TREx (Akyürek et al., 2022), and mT5-small fine-tuned on it.

Sentences of Wikipedia with a subject or object masked, each with the facts that it states; LAMA's templates are the queries. Nothing here
is small: one model takes hours on a GPU. `--train` sentences are kept, those that state a chosen query's fact first.

Legend: N training rows, Q queries, B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from facts_task import MASK, SPECIAL, Batch, Fact, FactSet, Query, Row
from torch import Tensor, nn
from torch.utils.data import DataLoader

import trak
from trak.evaluation import seeded

DATASET, MODEL, SENTINEL = "ekinakyurek/ftrace", "google/mt5-small", "<extra_id_0>"
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class FtraceRecipe:
    """What is trained on what.

    Attributes:
        num_train: N.
        num_queries: Q.
        epochs: passes over a model's rows.
        lr: of AdamW, constant.
        batch_size: B.
        max_tokens: of a sentence.
        seed: of the choice of queries and sentences.
    """

    num_train: int = 1_000_000
    num_queries: int = 1000
    epochs: int = 2
    lr: float = 1e-3
    batch_size: int = 64
    max_tokens: int = 96
    seed: int = 0


def load_ftrace(recipe: FtraceRecipe) -> FtraceTask:
    """The dataset and the model from the Hugging Face hub.

    Raises:
        SystemExit: no GPU, a package that is missing, or no way to the hub.
    """
    if not torch.cuda.is_available():
        raise SystemExit(
            "--paper fine-tunes mT5-small (300 million parameters) dozens of times and needs a CUDA GPU, which torch does not see here. "
            "Leave the flag out for the small experiment."
        )
    try:
        import datasets
        from transformers import AutoTokenizer, MT5ForConditionalGeneration

        abstracts, queries = (
            datasets.load_dataset(DATASET, name, split="train") for name in ("abstracts", "queries")
        )
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        pretrained = MT5ForConditionalGeneration.from_pretrained(MODEL)
    except ImportError as error:
        raise SystemExit(
            f"--paper needs datasets, transformers and sentencepiece: pip install them ({error})."
        ) from error
    except OSError as error:
        raise SystemExit(
            f"{DATASET} or {MODEL} cannot be loaded from the Hugging Face hub: {error}"
        ) from error
    return FtraceTask(
        choose_ftrace(abstracts, queries, recipe), recipe, tokenizer, lambda: pretrained, "cuda"
    )


def choose_ftrace(abstracts: Iterable[dict], queries: Iterable[dict], recipe: FtraceRecipe) -> FactSet:
    """Q random queries whose fact some sentences state, these sentences, and random others up to N.

    Raises:
        SystemExit: there are not as many queries.
    """
    abstracts, queries = list(abstracts), list(queries)
    generator = torch.Generator().manual_seed(recipe.seed)
    stated: dict[str, list[int]] = {}
    for row, sentence in enumerate(abstracts):
        for fact in sentence["facts"].split(";"):
            stated.setdefault(fact, []).append(row)

    def key(query: dict) -> str:
        return f"{query['predicate_id']},{query['obj_uri']},{query['sub_uri']}"

    shuffled = [queries[index] for index in torch.randperm(len(queries), generator=generator).tolist()]
    chosen = [query for query in shuffled if key(query) in stated][: recipe.num_queries]
    if len(chosen) < recipe.num_queries:
        raise SystemExit(
            f"--queries {recipe.num_queries}: sentences state the facts of {len(chosen)} queries."
        )
    kept = dict.fromkeys(row for query in chosen for row in stated[key(query)])
    for row in torch.randperm(len(abstracts), generator=generator).tolist():
        if len(kept) >= recipe.num_train:
            break
        kept.setdefault(row)
    number = {row: index for index, row in enumerate(kept)}
    return FactSet(
        rows=tuple(
            Row(words=_words(abstracts[row]["inputs_pretokenized"]), object=_answer(abstracts[row])) for row in kept
        ),
        queries=tuple(
            Query(
                fact=Fact(relation=query["predicate_id"], subject=query["sub_surface"], object=_answer(query), masked=(),
                          answers=frozenset({_answer(query)})),
                words=_words(query["inputs_pretokenized"]),
                rivals=(),
                relevant=tuple(sorted(number[row] for row in stated[key(query)])),
            )
            for query in chosen
        ),
    )  # fmt: skip


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.replace(SENTINEL, f" {SPECIAL[MASK]} ").split())


def _answer(line: dict) -> str:
    return line["targets_pretokenized"].replace(SENTINEL, "").strip()


class FtraceTask:
    """As `facts_task.Task`: rows and queries as tokens, and one way to train on some rows.

    Args:
        facts: rows and queries.
        recipe: see there.
        tokenizer: of the model, which knows the sentinel.
        pretrained: gives the model that training starts from, which is copied.
        device: of models in training.
    """

    def __init__(
        self,
        facts: FactSet,
        recipe: FtraceRecipe,
        tokenizer: Any,
        pretrained: Callable[[], nn.Module],
        device: str,
    ) -> None:
        self.facts, self.recipe, self.tokenizer, self.device = facts, recipe, tokenizer, device
        self._pretrained = pretrained()
        self.vocabulary = range(self._pretrained.config.vocab_size)

    @property
    def explained(self) -> dict[str, Any]:
        """The output is that of the object's tokens; gradients are of the linear layers."""
        return {
            "model": self.build(),
            "task": trak.Seq2SeqLM(),
            "parameters": is_linear,
            "device": self.device,
        }

    @property
    def representation(self) -> dict[str, Any]:
        """What the decoder has made where it says the answer's first token, after the sentinel: no label is among its inputs."""
        return {
            "layer": "decoder.final_layer_norm",
            "transform": lambda out: out[:, 1],
            "device": self.device,
        }

    def train_loader(self) -> DataLoader:
        """The rows in batches, in order."""
        return self._loader([(row.words, row.object) for row in self.facts.rows])

    def query_loader(self) -> DataLoader:
        """The queries in batches, in order."""
        return self._loader([(query.words, query.fact.object) for query in self.facts.queries])

    def _loader(self, pairs: list[tuple[Sequence[str], str]]) -> DataLoader:
        return DataLoader(pairs, batch_size=self.recipe.batch_size, collate_fn=self.collate)

    def collate(self, pairs: Sequence[tuple[Sequence[str], str]]) -> Batch:
        """Inputs with the sentinel, the answer after the sentinel for labels; `target_mask` is 1 at the answer's tokens."""
        texts = [
            " ".join(SENTINEL if word == SPECIAL[MASK] else word for word in words) for words, _ in pairs
        ]
        inputs = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.recipe.max_tokens, return_tensors="pt"
        )
        outputs = self.tokenizer(
            [f"{SENTINEL} {answer}" for _, answer in pairs], padding=True, return_tensors="pt"
        )
        is_token = outputs["attention_mask"] != 0
        labels = outputs["input_ids"].masked_fill(~is_token, IGNORED)
        special = {self.tokenizer.convert_tokens_to_ids(SENTINEL), self.tokenizer.eos_token_id}
        is_answer = is_token & ~torch.isin(labels, torch.tensor(sorted(special)))
        return {
            "input_ids": inputs["input_ids"],
            "attention_mask": inputs["attention_mask"],
            "labels": labels,
            "target_mask": is_answer.long(),
        }

    def build(self, seed: int = 0) -> nn.Module:
        """A copy of the pretrained model; the seed decides nothing."""
        model = type(self._pretrained)(self._pretrained.config)
        model.load_state_dict(self._pretrained.state_dict())
        return model

    def train(
        self, rows: Tensor, seed: int, *, keep_at: Sequence[float] = ()
    ) -> tuple[nn.Module, list[tuple[float, dict]]]:
        """A model of some rows [n], and (learning rate, state) after the shares `keep_at` of the steps."""
        recipe, kept = self.recipe, []
        model = self.build(seed).to(self.device).train()
        order = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr)
        batches = [
            batch
            for _ in range(recipe.epochs)
            for batch in rows[torch.randperm(len(rows), generator=order)].split(recipe.batch_size)
        ]
        marks = {max(1, round(share * len(batches))) for share in keep_at}
        with seeded(seed):  # dropout
            for step, chosen in enumerate(batches, start=1):
                batch = self.collate(
                    [(self.facts.rows[row].words, self.facts.rows[row].object) for row in chosen.tolist()]
                )
                batch.pop("target_mask")
                optimizer.zero_grad()
                model(**{name: value.to(self.device) for name, value in batch.items()}).loss.backward()
                optimizer.step()
                if step in marks:
                    state = model.state_dict()
                    kept.append((recipe.lr, {name: state[name].cpu().clone() for name in state}))
        return model.eval(), kept

    @torch.no_grad()
    def leads(self, model: nn.Module) -> Tensor:
        """[Q] 1 where the model's own answer is the object, −1 elsewhere."""
        model, given = model.to(self.device), []
        for batch in self.query_loader():
            tokens = model.generate(
                input_ids=batch["input_ids"].to(self.device), attention_mask=batch["attention_mask"].to(self.device),
                max_new_tokens=batch["labels"].shape[1] + 1, num_beams=1, do_sample=False,
            )  # fmt: skip
            given += [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
        answers = [query.fact.object for query in self.facts.queries]
        right = [text.replace(SENTINEL, "").strip() == answer for text, answer in zip(given, answers)]
        return torch.tensor(right).double() * 2 - 1


def is_linear(name: str, parameter: nn.Parameter) -> bool:
    """Attention and feed-forward weights of the blocks: not the embeddings, which are most of mT5, nor what is shared by positions."""
    return ".layer." in name and parameter.ndim == 2 and "relative_attention_bias" not in name
