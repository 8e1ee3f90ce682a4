"""The whole way on a CUDA device: the same scores as on the CPU, and the same refusals."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import trak
from trak import batches
from trak.gradients import model_state, select_parameters
from trak.projection import pieces
from trak.projector import Projector
from trak.setting import Setting, prepare
from trak.tasks import resolve_task

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

N, TARGETS = 70, 5


class Words(nn.Module):
    """Logits of words from the word before."""

    def __init__(self, words):
        super().__init__()
        self.table = nn.Embedding(words, 8)
        self.head = nn.Linear(8, words)

    def forward(self, input_ids):
        return self.head(self.table(input_ids))


def images():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3)
    )
    return model, (torch.randn(N, 3, 8, 8), torch.randint(3, (N,))), "image_classification"


def texts(words=5000, rows=N, length=32):
    """By default enough words for margins in blocks."""
    torch.manual_seed(0)
    ids = torch.randint(words, (rows, length))
    return Words(words), {"input_ids": ids, "labels": ids}, "causal_lm"


def few_texts():
    return texts(words=60, rows=6, length=5)


def attribute(model, train, task, device, **options):
    targets = (
        {name: part[:TARGETS] for name, part in train.items()}
        if isinstance(train, dict)
        else tuple(part[:TARGETS] for part in train)
    )
    options = {"batch_size": 16, "device": device, "progress": False, "dtype": torch.float64} | options
    return trak.attribute(model, train, targets, task=task, **options).scores[:]


@pytest.mark.parametrize("example", [images, texts])
@pytest.mark.parametrize(
    "projection", [trak.Sparse(64), trak.Kronecker(64), trak.Rademacher(64), trak.Eigenbasis(64, sample=64)]
)
def test_scores_are_those_of_the_cpu(example, projection):
    model, train, task = example()
    got, expected = (
        np.asarray(attribute(model, train, task, device, projection=projection)) for device in ("cuda", "cpu")
    )
    # Eigenvectors of near-equal eigenvalues may differ.
    tolerance = 1e-2 if isinstance(projection, trak.Eigenbasis) else 1e-6
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("model_on", ["cpu", "cuda"])
@pytest.mark.parametrize("data_on", ["cpu", "cuda"])
@pytest.mark.parametrize("example", [images, few_texts])
def test_models_and_data_may_be_anywhere(example, data_on, model_on, device):
    model, train, task = example()
    expected = np.asarray(attribute(model, train, task, "cpu", projection=trak.Sparse(32)))
    if model_on == "cuda":
        model.cuda()
    got = np.asarray(attribute(model, batches.move(train, data_on), task, device, projection=trak.Sparse(32)))
    assert np.abs(got - expected).max() <= 1e-6 * np.abs(expected).max()
    assert {tensor.device.type for tensor in model.state_dict().values()} == {model_on}


def test_results_are_asked_for_by_tensors_anywhere():
    model, train, task = images()
    found = trak.attribute(model, train, train, task=task, projection=trak.Sparse(32), progress=False)
    by_threshold, few = found.scores.soft_threshold(torch.full((N,), 0.1)), torch.tensor([3, 1])
    plain = found.scores.tensor()
    thresholded = by_threshold.tensor()
    rows = found.top(2).rows
    masks = torch.rand(4, N) < 0.5
    pairs = [
        (found.scores[few.cuda()], plain[few]),
        (found.scores[list(few.cuda())], plain[few]),
        (found.scores[:, (torch.arange(N) < 2).cuda()], plain[:, :2]),
        (found.scores.at(rows.cuda()), plain.T.gather(1, rows)),
        (found.scores.select_targets(few.cuda()).tensor(), plain[:, few]),
        (
            by_threshold.select_targets(few.cuda()).select_targets(few[:1].cuda() - 2).tensor(),
            thresholded[:, [1]],
        ),
        (by_threshold.soft_threshold(torch.full((N,), 0.0).cuda()).tensor(), thresholded),
        (found.predict(masks.cuda()), found.predict(masks)),
        (found.group(train[1].cuda()).scores, found.group(train[1]).scores),
    ]
    for got, expected in pairs:
        torch.testing.assert_close(got, expected)
    outputs = torch.randn(4, N)
    measured = [
        trak.evaluation.lds(plain.cuda(), list(masks.cuda()), outputs.cuda()),
        trak.evaluation.lds(plain, masks, outputs),
    ]
    assert str(measured[0]) == str(measured[1])


def test_the_papers_protocol_with_rows_anywhere(tmp_path):
    model, train, task = images()
    scores = []
    for on in ("cpu", "cuda"):
        model.to(on)
        traker = trak.TRAKer(
            model=model, task=task, train_set_size=N, save_dir=tmp_path / str(len(scores)), proj_dim=32
        )
        traker.load_checkpoint(model.state_dict(), model_id=0)
        for rows in torch.arange(N).flip(0).split(16):
            batch = batches.move(batches.take(train, rows), on)
            traker.featurize(batch=batch, inds=rows.to(on))
        traker.finalize_features()
        traker.start_scoring_checkpoint("targets", model.state_dict(), 0, num_targets=TARGETS)
        traker.score(
            batch=batches.move(batches.take(train, slice(0, TARGETS)), on), inds=torch.arange(TARGETS).to(on)
        )
        scores.append(np.asarray(traker.finalize_scores("targets")))
    assert np.abs(scores[1] - scores[0]).max() <= 1e-3 * np.abs(scores[0]).max()


@pytest.mark.parametrize("row", [0, 40, N - 1])
def test_labels_that_do_not_exist(row):
    model, (inputs, labels), task = images()
    labels[row] = 9
    with pytest.raises(trak.InputError, match=r"needs labels 0 to 2 .* got 9"):
        attribute(model, (inputs, labels), task, "cuda")


@pytest.mark.parametrize("small_table", [0, 1 << 18])
@pytest.mark.parametrize("source", [trak.Hooked(), trak.Functional()], ids=repr)
@pytest.mark.parametrize("projection", [trak.Sparse(64), trak.Kronecker(64), trak.Rademacher(64)], ids=repr)
@pytest.mark.parametrize("example", [images, few_texts])
def test_starting_a_batch_waits_for_nothing(example, projection, source, small_table, monkeypatch):
    monkeypatch.setattr(pieces, "SMALL_TABLE", small_table)
    model, batch, task = example()
    model.cuda()
    shapes, device = select_parameters(model, None), torch.device("cuda")
    setting = Setting(model, resolve_task(task), source, projection, shapes, device)
    projector = Projector(setting, model_state(model, None, device), 0)
    batch = prepare(setting, batch)
    expected, _ = projector(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        finish = projector.start(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(finish()[0], expected)


def waits(example, rows, projection, gradients):
    """How often the device is waited for while that many rows are featurized, 8 at a time."""
    model, train, task = example()
    train = batches.take(train, torch.arange(rows) % N)
    method = trak.TRAK(
        model=model,
        task=task,
        projection=projection,
        gradients=gradients,
        batch_size=8,
        device="cuda",
        progress=False,
    )
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            method.fit(train)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def some_texts():
    return texts(words=60, rows=N, length=3)


@pytest.mark.parametrize("gradients", ["auto", "functional"])
@pytest.mark.parametrize(
    "projection",
    [trak.Sparse(24), trak.Kronecker(24), trak.Rademacher(24), trak.Eigenbasis(24, sample=32)],
    ids=repr,
)
@pytest.mark.parametrize("example", [images, some_texts])
def test_waiting_does_not_grow_with_the_batches(example, projection, gradients, monkeypatch):
    monkeypatch.setattr(pieces, "SMALL_TABLE", 0)
    # One wait in a batch would make eight more.
    assert waits(example, 128, projection, gradients) - waits(example, 64, projection, gradients) < 8
