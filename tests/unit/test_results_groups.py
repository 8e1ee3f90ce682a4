"""Scores summed over groups of training rows."""

import numpy as np
import pytest
import torch

import trak


@pytest.fixture
def attribution():
    return trak.Attribution(trak.ArrayScores(torch.arange(8.0).reshape(4, 2)))


@pytest.mark.parametrize(
    "labels",
    [
        ["b", "a", "b", "a"],
        np.array(["b", "a", "b", "a"]),
        [torch.tensor(1), torch.tensor(0), torch.tensor(1), torch.tensor(0)],
        torch.tensor([1, 0, 1, 0]),
        [(1, "x"), (0, "y"), (1, "x"), (0, "y")],
    ],
    ids=["strings", "array", "tensors of one number", "tensor", "tuples"],
)
def test_labels_of_any_one_kind(attribution, labels):
    groups = attribution.group(labels)
    assert groups.sizes.tolist() == [2, 2]
    assert groups.scores.tolist() == [[2 + 6, 3 + 7], [0 + 4, 1 + 5]]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", None, "b", "a"], "NoneType, str"),
        (torch.zeros(4, 2), "list"),
        ([0.0, float("nan"), 1.0, float("nan")], "NaN"),
        (["a", "b"], "each of the 4 training rows; got 2"),
    ],
)
def test_labels_that_cannot_be_told_apart_are_refused(attribution, labels, message):
    with pytest.raises(trak.InputError, match=message):
        attribution.group(labels)
