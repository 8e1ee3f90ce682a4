"""Lexical overlap of texts: what a search engine would return.

Robertson, Walker, Jones, Hancock-Beaulieu, Gatford: "Okapi at TREC-3", 1994; variants as in Kamphuis, de Vries, Boytsov, Lin: "Which BM25 Do
You Mean?", ECIR 2020, by bm25s (Lù: "BM25S: Orders of magnitude faster lexical search via eager sparse scoring", 2024).

Shape legend: N training texts, T targets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trak.batches import describe
from trak.datasets import RowSource, as_rows
from trak.errors import InputError, MissingDependencyError
from trak.methods.base import Attributor, FittedAttributor
from trak.progress import bar
from trak.results import Attribution
from trak.scores import ArrayScores

_VARIANTS = ("robertson", "lucene", "atire", "bm25l", "bm25+")


@dataclass(frozen=True, eq=False, kw_only=True)
class BM25(Attributor):
    """Scores of training texts for target texts as queries, the baseline that attribution of language models is compared with.

        τ(d, z) = Σ_{t ∈ z} idf(t) · n_t(d) / (n_t(d) + k1 (1 − b + b |d| / mean |d|)),    idf(t) = log(1 + (N − N_t + ½) / (N_t + ½))

    (variant "lucene"; n_t counts token t in text d, N_t the texts that hold it). Tokens are lower-case words of two letters or more. Needs
    bm25s, and PyStemmer for a stemmer by name. No model and no checkpoint is read; scores are ≥ 0.

    Attributes:
        column: texts are row[column] of a dataset with named columns; None for lists of strings.
        k1: where repeated tokens saturate.
        b: how much long texts are discounted, 0 to 1.
        variant: "lucene", "robertson", "atire", "bm25l" or "bm25+".
        delta: of the last two variants.
        stopwords: a language whose stop words are left out, or a list of such words; None keeps all.
        stemmer: a language of PyStemmer, or list of tokens -> list of stems; None for none.
        tokenizer: text -> tokens, in place of the library's tokenizer, stop words and stemmer.
        progress: True or False to force a progress bar over targets.
    """

    column: str | None = None
    k1: float = 1.5
    b: float = 0.75
    variant: str = "lucene"
    delta: float = 0.5
    stopwords: str | list[str] | tuple[str, ...] | None = "english"
    stemmer: str | Callable[[list[str]], list[str]] | None = None
    tokenizer: Callable[[str], Sequence[str]] | None = None
    progress: bool | None = None

    def fit(self, train_set: Any, checkpoints: Sequence[Any] | None = None) -> FittedBM25:
        """Index the training texts; checkpoints are not read.

        Raises:
            InputError: impossible settings, no texts, or texts without a single token.
            MissingDependencyError: bm25s is not installed, or PyStemmer where it is needed.
        """
        try:
            import bm25s
        except ImportError as error:
            raise MissingDependencyError("BM25 needs bm25s: pip install 'trak-attribution[text]'") from error
        self._check_settings()
        texts = read_texts(train_set, self.column, "train_set")
        tokens = self.tokens(texts)
        if not any(tokens):
            raise InputError(
                f"train_set: none of the {len(texts)} texts holds a token: pass stopwords=None, or a tokenizer= of your own"
            )
        index = bm25s.BM25(k1=self.k1, b=self.b, delta=self.delta, method=self.variant, dtype="float64")
        index.index(tokens, show_progress=False)
        return FittedBM25(self, as_rows(train_set, what="train_set"), index)

    def tokens(self, texts: Sequence[str]) -> list[list[str]]:
        """Tokens of each text.

        Raises:
            InputError: an own tokenizer gives no strings, or a stop word list or stemmer is unknown.
            MissingDependencyError: PyStemmer is needed.
        """
        if self.tokenizer is not None:
            found = [list(self.tokenizer(text)) for text in texts]
            strange = next(
                (token for tokens in found for token in tokens if not isinstance(token, str)), None
            )
            if strange is not None:
                raise InputError(f"tokenizer must give strings; got {describe(strange)}")
            return found
        import bm25s

        stemmer, stopwords = self._stem(), self.stopwords
        if stopwords is not None and not isinstance(stopwords, str):
            stopwords = list(stopwords)
        try:
            return bm25s.tokenize(
                list(texts), stopwords=stopwords, stemmer=stemmer, return_ids=False, show_progress=False
            )
        except ValueError as error:
            raise InputError(f"stopwords={self.stopwords!r} cannot be used: {error}") from error

    def _stem(self) -> Any:
        if not isinstance(self.stemmer, str):
            return self.stemmer
        try:
            import Stemmer
        except ImportError as error:
            raise MissingDependencyError(
                f"stemmer={self.stemmer!r} needs PyStemmer: pip install PyStemmer"
            ) from error
        if self.stemmer not in Stemmer.algorithms():
            raise InputError(
                f"stemmer must be one of {', '.join(Stemmer.algorithms())}, or a function; got {self.stemmer!r}"
            )
        return Stemmer.Stemmer(self.stemmer)

    def _check_settings(self) -> None:
        if self.variant not in _VARIANTS:
            raise InputError(f"variant must be one of {', '.join(_VARIANTS)}; got {self.variant!r}")
        if not (self.k1 >= 0 and 0 <= self.b <= 1 and self.delta >= 0):
            raise InputError(
                f"k1 and delta must be ≥ 0 and b lie between 0 and 1; got {self.k1!r}, {self.delta!r} and {self.b!r}"
            )


@dataclass(frozen=True, eq=False)
class FittedBM25(FittedAttributor):
    """See `BM25`."""

    method: BM25
    train: RowSource
    index: Any

    def attribute(self, targets: Any) -> Attribution:
        """Scores [N, T] float64; 0 for targets that share no token with the training texts.

        Raises:
            InputError: no texts.
        """
        method = self.method
        queries = method.tokens(read_texts(targets, method.column, "targets"))
        scores_NT = np.zeros((self.train.num_rows, len(queries)))
        with bar(len(queries), "BM25", unit="targets", enabled=method.progress) as shown:
            for position, tokens in enumerate(queries):
                known = [token for token in tokens if token in self.index.vocab_dict]
                if known:
                    scores_NT[:, position] = self.index.get_scores(known)
                shown.update(1)
        info = {
            "method": "BM25",
            "variant": method.variant,
            "k1": method.k1,
            "b": method.b,
            "delta": method.delta,
            "stopwords": list(method.stopwords)
            if isinstance(method.stopwords, (list, tuple))
            else method.stopwords,
            "own_tokenizer": method.tokenizer is not None,
            "stemmer": method.stemmer if isinstance(method.stemmer, str) else None,
        }
        return Attribution(
            scores=ArrayScores(torch.from_numpy(scores_NT)),
            info=info,
            train_rows=self.train,
            target_rows=as_rows(targets, what="targets"),
        )


def read_texts(data: Any, column: str | None, what: str) -> list[str]:
    """The texts of a list of strings, or of a dataset's column.

    Raises:
        InputError: something else.
    """
    if isinstance(data, (str, bytes, Mapping)) or not (
        hasattr(data, "__getitem__") and hasattr(data, "__len__")
    ):
        raise InputError(
            f"{what} must be a list of strings, or a dataset with __len__ and __getitem__ and its column=; got {describe(data)}"
        )
    texts = []
    for position in range(len(data)):
        row = data[position]
        if column is not None:
            if not isinstance(row, Mapping) or column not in row:
                raise InputError(f"{what}: row {position} has no column {column!r}; got {describe(row)}")
            row = row[column]
        if not isinstance(row, str):
            advice = "" if column is not None else ". Name the column that holds the text: column="
            raise InputError(f"{what}: row {position} is no string; got {describe(row)}{advice}")
        texts.append(row)
    if not texts:
        raise InputError(f"{what} is empty")
    return texts
