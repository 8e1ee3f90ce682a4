"""Batches given to a device before the results of the last are waited for, as on a GPU, on the CPU."""

import pytest
import torch
from torch import nn

import trak
from trak import projector
from trak.tasks.looking import is_true, values_unseen

N, K = 23, 16


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def examples(count=N):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(count, 5, dtype=torch.float64, generator=generator),
        torch.randint(3, (count,), generator=generator),
    )


def attribute(train=None, **options):
    options = {"projection": trak.Sparse(dim=K), "batch_size": 4} | options
    return trak.attribute(
        model(), train or examples(), examples(3), task="image_classification", progress=False, **options
    )


@pytest.fixture
def queue(monkeypatch):
    """The calls of a run on a device with a queue: batches started, and batches waited for."""
    calls = []
    start, finish = projector.Projector.start, projector.Projector._finish

    def starting(self, *args, **options):
        calls.append("start")
        return start(self, *args, **options)

    def finishing(self, *args, **options):
        calls.append("finish")
        return finish(self, *args, **options)

    monkeypatch.setattr(projector, "has_queue", lambda device: True)
    monkeypatch.setattr(projector.Projector, "start", starting)
    monkeypatch.setattr(projector.Projector, "_finish", finishing)
    return calls


def test_one_batch_is_started_before_the_last_is_waited_for(queue):
    attribute()
    # The training set's six batches, then the targets' only one.
    assert queue == ["start", *(["start", "finish"] * 5), "finish", "start", "finish"]


def test_scores_are_the_same(monkeypatch):
    expected = attribute().scores[:]
    monkeypatch.setattr(projector, "has_queue", lambda device: True)
    torch.testing.assert_close(attribute().scores[:], expected, rtol=0, atol=0)


@pytest.mark.parametrize("row", [0, 9, N - 1])
def test_labels_that_do_not_exist_are_refused_as_elsewhere(queue, row):
    inputs, labels = examples()
    labels[row] = 7
    with pytest.raises(trak.InputError, match=r"needs labels 0 to 2 .* got 7"):
        attribute((inputs, labels))


def test_models_that_give_nan_are_refused_as_elsewhere(queue):
    inputs, labels = examples()
    inputs[13] = float("nan")
    with pytest.raises(trak.NonFiniteError, match="rows 12 to 15: model outputs are NaN"):
        attribute((inputs, labels))


def test_what_was_finished_is_kept_when_a_later_batch_fails(queue, monkeypatch, tmp_path):
    start = projector.Projector.start

    def failing(self, *args, **options):
        if queue.count("start") == 4:
            raise RuntimeError("out of memory")
        return start(self, *args, **options)

    with monkeypatch.context() as context:
        context.setattr(projector.Projector, "start", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            attribute(save_dir=tmp_path)
    queue.clear()
    attribute(save_dir=tmp_path)
    # Three of six were finished; the fourth was on its way.
    assert queue.count("start") == 3 + 1


def test_values_are_looked_at_outside_only():
    flag = torch.tensor(True)
    assert is_true(flag)
    with values_unseen():
        assert not is_true(flag)
    assert is_true(flag)
