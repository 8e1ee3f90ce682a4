from collections import UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch

from trak import batches
from trak.errors import InputError

Pair = namedtuple("Pair", "a b")


@dataclass
class Record:
    x: torch.Tensor
    name: str


@dataclass(frozen=True)
class Frozen:
    x: torch.Tensor


def structures():
    x, y = torch.arange(12.0).reshape(4, 3), torch.arange(4)
    return [
        x,
        (x, y),
        [x, y],
        {"x": x, "y": y, "note": "text", "none": None},
        Pair(x, (y, {"deep": x})),
        Record(x, "name"),
        Frozen(x),
        UserDict({"x": x, "y": y}),
    ]


@pytest.mark.parametrize("batch", structures(), ids=lambda b: type(b).__name__)
def test_take_flatten_rebuild(batch):
    assert batches.batch_size(batch) == 4
    part = batches.take(batch, slice(1, 3))
    assert type(part) is type(batch)
    assert batches.batch_size(part) == 2
    picked = batches.take(batch, torch.tensor([3, 0]))
    for whole, few in zip(batches.flatten(batch)[0], batches.flatten(picked)[0]):
        assert torch.equal(few, whole[[3, 0]])
    leaves, rebuild = batches.flatten(batch)
    again = rebuild([leaf + 1 for leaf in leaves])
    assert type(again) is type(batch)
    for before, after in zip(leaves, batches.flatten(again)[0]):
        assert torch.equal(before + 1, after)


def test_other_leaves_are_carried_along():
    batch = batches.take({"x": torch.zeros(3), "text": "abc"}, slice(0, 1))
    assert batch["text"] == "abc"
    assert batches.take(Record(torch.zeros(3), "n"), slice(0, 1)).name == "n"


def test_cast_and_move():
    batch = batches.cast((torch.zeros(2), torch.zeros(2).long()), torch.float64)
    assert [t.dtype for t in batch] == [torch.float64, torch.int64]
    x = torch.zeros(2)
    assert batches.move([x], "cpu")[0] is x


def test_hugging_face_encoding_keeps_its_type():
    transformers = pytest.importorskip("transformers")
    encoding = transformers.BatchEncoding({"input_ids": torch.arange(6).reshape(3, 2)})
    part = batches.take(encoding, slice(0, 2))
    assert type(part) is type(encoding) and part["input_ids"].shape == (2, 2)


@pytest.mark.parametrize(
    "batch", [(), {"a": "text"}, (torch.zeros(3), torch.zeros(2)), torch.tensor(1.0), None]
)
def test_no_batch(batch):
    with pytest.raises(InputError):
        batches.batch_size(batch)
    with pytest.raises(InputError, match="cannot be rebuilt"):
        batches.flatten((torch.zeros(1),))[1]([])
