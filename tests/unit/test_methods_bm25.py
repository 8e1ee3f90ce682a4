"""BM25 against its formula, and against the library's own retrieval."""

import builtins
import math
import sys

import pytest
import torch

from trak.errors import InputError, MissingDependencyError
from trak.methods.bm25 import BM25

TEXTS = [
    "the cat sat on the mat",
    "a dog sat on the cat, the dog!",
    "birds fly south",
    "cats and dogs fly",
    "nothing to see",
]
QUERIES = ["Cat on a mat", "dog dog fly", "zebra"]


def by_formula(texts, queries, k1, b):
    """Robertson's sum with Lucene's idf, word by word."""
    length = sum(map(len, texts)) / len(texts)
    scores = torch.zeros(len(texts), len(queries), dtype=torch.float64)
    for i, text in enumerate(texts):
        for t, query in enumerate(queries):
            for token in query:
                holding = sum(token in other for other in texts)
                idf = math.log(1 + (len(texts) - holding + 0.5) / (holding + 0.5))
                count = text.count(token)
                scores[i, t] += idf * count / (count + k1 * (1 - b + b * len(text) / length))
    return scores


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.0), (1e-3, 1.0)])
def test_equals_the_formula(k1, b):
    attribution = BM25(k1=k1, b=b, tokenizer=lambda text: text.lower().split()).fit(TEXTS).attribute(QUERIES)
    split = [text.lower().split() for text in TEXTS], [query.lower().split() for query in QUERIES]
    torch.testing.assert_close(attribution.scores.tensor(), by_formula(*split, k1, b), rtol=1e-10, atol=1e-12)
    assert attribution.info["k1"] == k1
    assert int(attribution.scores.tensor()[:, 2].count_nonzero()) == 0
    assert attribution.top(1).rows[0, 0] == 0


@pytest.mark.parametrize("variant", ["robertson", "lucene", "atire", "bm25l", "bm25+"])
def test_ranks_as_the_library_retrieves(variant):
    import bm25s

    attribution = BM25(variant=variant, k1=1.2).fit(TEXTS).attribute(QUERIES[:2])
    index = bm25s.BM25(method=variant, k1=1.2)
    index.index(
        bm25s.tokenize(TEXTS, stopwords="english", return_ids=False, show_progress=False), show_progress=False
    )
    tokens = bm25s.tokenize(QUERIES[:2], stopwords="english", return_ids=False, show_progress=False)
    rows, values = index.retrieve(tokens, k=len(TEXTS), show_progress=False)
    scores = attribution.scores.tensor()
    for t in range(2):
        found = scores[torch.from_numpy(rows[t].astype("int64")), t]
        torch.testing.assert_close(found, torch.from_numpy(values[t]).double(), rtol=1e-5, atol=1e-6)


def test_tokens_are_what_is_asked_for():
    plain = BM25(stopwords=None).tokens(TEXTS[:1])[0]
    assert plain == ["the", "cat", "sat", "on", "the", "mat"]
    assert BM25().tokens(TEXTS[:1])[0] == ["cat", "sat", "mat"]
    assert BM25(stopwords=["cat"]).tokens(TEXTS[:1])[0] == ["the", "sat", "on", "the", "mat"]
    assert BM25(stemmer="english").tokens(["cats and dogs"])[0] == ["cat", "dog"]
    assert BM25(stemmer=lambda words: [word[0] for word in words]).tokens(["cats dogs"])[0] == ["c", "d"]
    stemmed = BM25(stemmer="english").fit(TEXTS).attribute(["a cat"])
    assert stemmed.scores.tensor()[3, 0] > 0
    assert stemmed.info["stemmer"] == "english"


def test_columns_of_datasets():
    rows = [{"text": text, "label": 0} for text in TEXTS]
    found = BM25(column="text").fit(rows).attribute(rows[:2])
    expected = BM25().fit(TEXTS).attribute(TEXTS[:2])
    torch.testing.assert_close(found.scores.tensor(), expected.scores.tensor())
    # An empty text is a text.
    assert BM25().fit([*TEXTS, ""]).attribute(["", "cat"]).scores.tensor()[5].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("settings", "texts", "message"),
    [
        ({"variant": "tfidf"}, TEXTS, "variant must be one of"),
        ({"k1": -1.0}, TEXTS, "k1 and delta"),
        ({"b": 1.5}, TEXTS, "b lie between"),
        ({"stemmer": "klingon"}, TEXTS, "stemmer must be one of"),
        ({"stopwords": "klingon"}, TEXTS, "stopwords='klingon'"),
        ({"tokenizer": lambda text: [1, 2]}, TEXTS, "tokenizer must give strings"),
        ({}, [], "is empty"),
        ({}, "one text", "must be a list of strings"),
        ({}, ["one", 2], "row 1 is no string; got int. Name the column"),
        ({"column": "body"}, [{"text": "one"}], "row 0 has no column 'body'"),
        ({}, ["the", "of the"], "holds a token"),
    ],
)
def test_wrong_settings_and_texts_are_refused(settings, texts, message):
    with pytest.raises(InputError, match=message):
        BM25(**settings).fit(texts)


@pytest.mark.parametrize(
    ("package", "advice"), [("bm25s", r"trak-attribution\[text\]"), ("Stemmer", "pip install PyStemmer")]
)
def test_it_says_which_package_it_needs(package, advice, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=advice):
        BM25(stemmer="english").fit(TEXTS)
