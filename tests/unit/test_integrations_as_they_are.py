"""Datasets, loaders, checkpoints and quantised layers of other libraries, taken as they are."""

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

import trak
from trak.datasets import as_rows
from trak.errors import InputError

datasets = pytest.importorskip("datasets")


def test_lists_of_numbers_in_mappings_are_tensors():
    rows = datasets.Dataset.from_dict(
        {
            "input_ids": [[1, 2, 3], [4, 5, 6]],
            "label": [0, 1],
            "scores": [[[0.5], [1.0]], [[0.0], [2.0]]],
            "text": ["a", "b"],
        }
    )
    ((_, batch),) = as_rows(rows).batches()
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 6]] and batch["label"].tolist() == [0, 1]
    assert batch["scores"].shape == (2, 2, 1) and batch["text"] == ["a", "b"]
    ((_, same),) = as_rows(rows.with_format("torch")).batches()
    assert torch.equal(same["input_ids"], batch["input_ids"])


def test_lists_of_unequal_length_need_a_collator():
    with pytest.raises(InputError, match="collate_fn"):
        next(iter(as_rows(datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]]})).batches()))


def test_a_plain_batch_sampler_is_looked_through():
    data = TensorDataset(torch.arange(10.0))
    for sampler in (RandomSampler(data), SequentialSampler(data)):
        rows = as_rows(DataLoader(data, batch_sampler=BatchSampler(sampler, 4, False)))
        assert [len(numbers) for numbers, _ in rows.batches()] == [4, 4, 2]
    with pytest.raises(InputError, match="draws its rows with"):
        as_rows(DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data, replacement=True), 4, False)))

    class Own(BatchSampler):
        pass

    with pytest.raises(InputError, match="batch sampler of its own"):
        as_rows(DataLoader(data, batch_sampler=Own(SequentialSampler(data), 4, False)))


def test_checkpoints_are_fitted_to_the_model(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    torch.save(
        {"state_dict": {f"net.{k}": v + 1 for k, v in model.state_dict().items()}}, tmp_path / "step=1.ckpt"
    )
    data = (torch.randn(8, 3), torch.arange(8) % 2)
    settings = {"task": "image_classification", "device": "cpu"}
    found = trak.attribute(
        model, data, data, checkpoints=trak.list_checkpoints(tmp_path), **settings
    ).scores.tensor()
    wanted = trak.attribute(
        model, data, data, checkpoints=[{k: v + 1 for k, v in model.state_dict().items()}], **settings
    ).scores.tensor()
    assert torch.equal(found, wanted)


class Weight(nn.Parameter):
    pass


class Quantised(nn.Module):
    def __init__(self, source):
        super().__init__()
        scale = source.weight.detach().abs().amax(1) / 127
        self.weight = Weight(
            (source.weight.detach() / scale[:, None]).round().to(torch.int8), requires_grad=False
        )
        self.weight.scale = scale

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.weight.scale.to(x.dtype)[:, None]).T


@pytest.mark.parametrize("gradients", ["auto", "hooked", "functional", "reference"])
def test_quantised_weights_keep_what_hangs_on_them(gradients):
    torch.manual_seed(0)
    model = nn.Sequential(Quantised(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))
    data = (torch.randn(8, 3), torch.arange(8) % 2)
    own = model[0].weight
    scores = trak.attribute(
        model, data, data, task="image_classification", device="cpu", gradients=gradients
    ).scores.tensor()
    assert scores.isfinite().all() and model[0].weight is own
