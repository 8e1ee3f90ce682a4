"""Gradients in the eigenbasis of their Kronecker factors, through the whole way: fitting, store, targets, TRAKer."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trak
from trak.datasets import as_rows, token_budget_rows
from trak.errors import (
    CorruptShardError,
    FingerprintError,
    InputError,
    NonFiniteError,
    ProtocolError,
    StoreError,
)
from trak.methods import factors as fitting
from trak.methods.samples import some_rows, spread_rows
from trak.store import verify
from trak.tasks import CustomTask
from trak.testing.cases import LAYER_CASES, LOCAL_CASES, MODEL_CASES
from trak.testing.factors import reference_factors, reference_features, reference_kernel
from trak.testing.models import Readout

N, T = 40, 5
EVERYTHING = trak.Eigenbasis(sample=None, whitening=1.0)


def make(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(27, 4), nn.Tanh(), nn.Linear(4, 3)
    )
    model = model.to(dtype)
    train, targets = (
        (torch.randn(count, 1, 4, 4, dtype=dtype), torch.randint(3, (count,))) for count in (N, T)
    )
    states = [
        {name: value + 0.3 * torch.randn_like(value) for name, value in model.state_dict().items()}
        for _ in range(2)
    ]
    return model, train, targets, states


def stored(model, data, projection, task="image_classification", **options):
    fitted = trak.TRAK(model=model, task=task, projection=projection, **options).fit(data)
    rows = fitted.run.store.rows(0)
    return rows.read(0, rows.num_rows).features, rows.weights()


def shapes_of(model):
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("factors", ["ekfac", "kfac"])
@pytest.mark.parametrize("largest_side", [2048, 5])
def test_features_are_those_of_the_dense_formula(factors, largest_side):
    model, train, _, _ = make()
    gradients_NP, q_N = stored(model, train, trak.Identity())
    shapes = shapes_of(model)
    weights_N = (q_N * (1 - q_N)) ** 0.5
    reference = reference_factors(gradients_NP, weights_N, shapes, kind=factors, largest_side=largest_side)
    options = {"factors": factors, "largest_side": largest_side, "whitening": 0.3, "sample": None}
    expected_NN = reference_kernel(gradients_NP, reference, shapes, whitening=0.3)
    for projection in (trak.Eigenbasis(**options), trak.Whitened(trak.Identity(), **options)):
        found, _ = stored(model, train, projection)
        torch.testing.assert_close(found @ found.T, expected_NN, rtol=1e-8, atol=1e-8)
    some, _ = stored(model, train, trak.Eigenbasis(17, **options))
    expected_NK = reference_features(gradients_NP, reference, shapes, dim=17, whitening=0.3)
    torch.testing.assert_close(some.abs(), expected_NK.abs(), rtol=1e-7, atol=1e-9)


LAYERS = {
    "linear",
    "linear over positions",
    "conv1d stride, padding, dilation",
    "conv2d",
    "conv2d groups",
    "conv2d reflect",
    "conv3d",
    "embedding with padding",
    "embedding of index tables",
    "batch norm 2d",
    "layer norm",
    "group norm",
    "rms norm",
}
SOME_LAYERS = [case for case in LAYER_CASES if case.name in LAYERS]
# The mask of the attention across sequences is not for so many examples.
MODELS = [
    case for case in (*MODEL_CASES, *LOCAL_CASES) if case.name != "attention across sequences, time first"
]


@pytest.mark.parametrize("case", [*SOME_LAYERS, *MODELS], ids=lambda case: case.name)
def test_every_kind_of_layer_and_of_use(case):
    model, batch = case.build(batch_size=9)
    gradients_NP, _ = stored(model, batch, trak.Identity(), Readout(), batch_size=4)
    # Columns of one layer lie together there, whose parameters may be named apart.
    state = trak.Identity().init(shapes_of(model))
    order = sorted(shapes_of(model), key=lambda name: state.placements[name].start)
    shapes = {name: shapes_of(model)[name] for name in order}
    outputs_N = stored_outputs(model, batch)
    q_N = torch.sigmoid(-outputs_N)
    reference = reference_factors(gradients_NP, (q_N * (1 - q_N)) ** 0.5, shapes)
    expected_NN = reference_kernel(gradients_NP, reference, shapes, whitening=1.0)
    found, _ = stored(model, batch, EVERYTHING, Readout(), batch_size=4)
    assert found.shape == gradients_NP.shape
    torch.testing.assert_close(found @ found.T, expected_NN, rtol=1e-6, atol=1e-7)


def stored_outputs(model, batch):
    with torch.no_grad():
        return Readout().output(model.eval(), batch)


def test_a_task_without_a_probability_counts_every_example_alike():
    torch.manual_seed(0)
    model = nn.Linear(4, 1).double()
    data = (torch.randn(N, 4, dtype=torch.float64), torch.randn(N, dtype=torch.float64))
    gradients_NP, _ = stored(model, data, trak.Identity(), "regression")
    shapes = shapes_of(model)
    reference = reference_factors(gradients_NP, torch.ones(N), shapes)
    expected_NN = reference_kernel(gradients_NP, reference, shapes, whitening=1.0)
    found, _ = stored(model, data, EVERYTHING, "regression")
    torch.testing.assert_close(found @ found.T, expected_NN)


def test_the_same_whatever_the_batches():
    model, train, _, _ = make()
    first, _ = stored(model, train, trak.Eigenbasis(20, sample=15), batch_size=40)
    other, _ = stored(model, train, trak.Eigenbasis(20, sample=15), batch_size=7)
    torch.testing.assert_close(first, other)


def test_attribution_is_kept_reused_and_the_same_in_memory(tmp_path, monkeypatch):
    model, train, targets, states = make()
    options = {"task": "image_classification", "checkpoints": states, "projection": trak.Eigenbasis(20)}
    kept = trak.attribute(model, train, targets, save_dir=tmp_path / "kept", **options)
    in_memory = trak.attribute(model, train, targets, **options)
    torch.testing.assert_close(kept.scores.tensor(), in_memory.scores.tensor())

    def never(*args, **kwargs):
        raise AssertionError("factors are fitted again")

    monkeypatch.setattr(fitting, "fit_factors", never)
    others = (targets[0] + 0.1, targets[1])
    again = trak.attribute(model, train, others, save_dir=tmp_path / "kept", **options)
    monkeypatch.undo()
    fresh = trak.attribute(model, train, others, **options)
    torch.testing.assert_close(again.scores.tensor(), fresh.scores.tensor())


def test_another_process_uses_the_same_factors(tmp_path):
    script = """
import sys, torch, trak
sys.path.insert(0, {tests!r})
from test_eigenbasis import make
model, train, targets, states = make()
scores = trak.attribute(
    model, train, targets, task="image_classification", checkpoints=states, projection=trak.Eigenbasis(20), save_dir={folder!r}
).scores
scores.save({out!r})
"""
    model, train, targets, states = make()
    options = {"task": "image_classification", "checkpoints": states, "projection": trak.Eigenbasis(20)}
    method = trak.TRAK(
        model=model, **{k: v for k, v in options.items() if k != "checkpoints"}, save_dir=tmp_path / "kept"
    )
    method.fit(train, states)
    text = script.format(
        tests=os.path.dirname(__file__), folder=str(tmp_path / "kept"), out=str(tmp_path / "scores.npy")
    )
    subprocess.run([sys.executable, "-c", text], check=True)
    expected = trak.attribute(model, train, targets, **options).scores.tensor()
    np.testing.assert_allclose(np.load(tmp_path / "scores.npy"), expected, rtol=1e-5, atol=1e-8)


def test_a_run_that_died_while_fitting_fits_again(tmp_path, monkeypatch):
    model, train, targets, states = make()
    options = {"task": "image_classification", "checkpoints": states, "projection": trak.Eigenbasis(20)}

    class Killed(Exception):
        pass

    real = fitting.fit_factors

    def killed(setting, state, source, *, label):
        if label.startswith("Checkpoint 2"):
            raise Killed
        return real(setting, state, source, label=label)

    monkeypatch.setattr(fitting, "fit_factors", killed)
    with pytest.raises(Killed):
        trak.attribute(model, train, targets, save_dir=tmp_path / "kept", **options)
    monkeypatch.undo()
    labels = []
    monkeypatch.setattr(
        fitting, "fit_factors", lambda *a, label: (labels.append(label), real(*a, label=label))[1]
    )
    went_on = trak.attribute(model, train, targets, save_dir=tmp_path / "kept", **options)
    assert labels == ["Checkpoint 2 of 2"]
    monkeypatch.undo()
    expected = trak.attribute(model, train, targets, **options)
    torch.testing.assert_close(went_on.scores.tensor(), expected.scores.tensor())


def test_factors_that_are_gone_are_not_replaced(tmp_path):
    model, train, targets, states = make()
    options = {
        "task": "image_classification",
        "projection": trak.Eigenbasis(20),
        "save_dir": tmp_path / "kept",
    }
    method = trak.TRAK(model=model, **options)
    fitted = method.fit(train, states)
    index = tmp_path / "kept" / "checkpoints" / "1" / "factors.json"
    text = index.read_text()
    index.unlink()
    with pytest.raises(ProtocolError, match=r"checkpoint 1 .* no factors that they were made with"):
        fitted.attribute(targets)
    # Nor where some training rows are left to do.
    for shard in (tmp_path / "kept" / "checkpoints" / "1" / "train").glob("rows-*"):
        shard.unlink()
    index.write_text(text)
    method.fit(train, states).attribute(targets)
    (tmp_path / "kept" / "checkpoints" / "1" / json.loads(text)["file"]).unlink()
    with pytest.raises(StoreError, match="and it is gone"):
        method.fit(train, states).attribute((targets[0] + 1, targets[1]))


def test_rows_that_were_featurized_keep_their_factors_to_themselves(tmp_path):
    model, train, _, states = make()
    options = {
        "task": "image_classification",
        "projection": trak.Eigenbasis(20),
        "save_dir": tmp_path / "kept",
    }
    store = trak.TRAK(model=model, **options).fit(train, states[:1]).run.store
    (tmp_path / "kept" / "checkpoints" / "0" / "factors.json").unlink()
    folder = tmp_path / "kept" / "checkpoints" / "0" / "train"
    rows = store.rows(0).read(0, 10)
    for shard in folder.glob("rows-*"):
        shard.unlink()
    with store.rows(0).writer() as writer:
        writer.add(torch.arange(10), rows.features, rows.outputs, rows.weights)
    with pytest.raises(ProtocolError, match="may differ in sign and order"):
        trak.TRAK(model=model, **options).fit(train, states[:1])


def test_factors_of_another_checkpoint_are_refused(tmp_path):
    model, train, targets, states = make()
    options = {
        "task": "image_classification",
        "projection": trak.Eigenbasis(20),
        "save_dir": tmp_path / "kept",
    }
    fitted = trak.TRAK(model=model, **options).fit(train, states)
    first, second = (tmp_path / "kept" / "checkpoints" / number for number in "01")
    (second / "factors.json").write_text((first / "factors.json").read_text())
    name = json.loads((first / "factors.json").read_text())["file"]
    (second / name).write_bytes((first / name).read_bytes())
    with pytest.raises(CorruptShardError, match="belongs to something else"):
        fitted.attribute(targets)
    report = verify(tmp_path / "kept")
    assert [damage.file for damage in report.corrupt] == [str(second / name)]


def test_of_several_that_bring_factors_the_first_decides(tmp_path):
    model, train, _, states = make()
    options = {
        "task": "image_classification",
        "projection": trak.Eigenbasis(20),
        "save_dir": tmp_path / "kept",
    }
    store = trak.TRAK(model=model, **options).fit(train, states[:1]).run.store
    assert store.kept(0, "other") is None
    first = store.keep(0, "other", {"a": torch.ones(2)})
    second = store.keep(0, "other", {"a": torch.zeros(2)})
    assert torch.equal(first["a"], second["a"])
    assert torch.equal(store.kept(0, "other")["a"], torch.ones(2))
    assert len(list((tmp_path / "kept" / "checkpoints" / "0").glob("other*"))) == 2
    assert verify(tmp_path / "kept").complete


def test_of_many_at_once_one_decides_for_all(tmp_path):
    model, train, _, states = make()
    options = {
        "task": "image_classification",
        "projection": trak.Eigenbasis(20),
        "save_dir": tmp_path / "kept",
    }
    store = trak.TRAK(model=model, **options).fit(train, states[:1]).run.store
    with ThreadPoolExecutor(8) as threads:
        found = list(
            threads.map(lambda one: store.keep(0, "race", {"a": torch.full((1000,), float(one))}), range(8))
        )
    assert len({float(one["a"][0]) for one in found}) == 1
    (tmp_path / "kept" / "checkpoints" / "0" / "race.json").write_text("{")
    with pytest.raises(StoreError, match=r"race.json is damaged"):
        store.kept(0, "race")


def test_the_store_holds_what_kept_entries_use_and_no_more(tmp_path):
    model, train, _, states = make()
    options = {"task": "image_classification", "save_dir": tmp_path / "kept"}
    store = trak.TRAK(model=model, projection=trak.Eigenbasis(6), **options).fit(train, states[:1]).run.store
    tensors = store.kept(0, "factors")
    assert {key.partition(":")[0] for key in tensors} <= {"entries", "features", "scale", "rows", "columns"}
    features = torch.cat([tensor for key, tensor in tensors.items() if key.startswith("features")])
    assert sorted(features.tolist()) == list(range(6))
    whole = trak.TRAK(model=model, projection=trak.Whitened(trak.Sparse(6)), task="image_classification").fit(
        train, states[:1]
    )
    kept_whole = whole.run.store.kept(0, "factors")
    assert sum(t.numel() for t in tensors.values()) < sum(t.numel() for t in kept_whole.values()) / 2


def test_a_store_of_an_earlier_version_is_refused(tmp_path, monkeypatch):
    model, train, targets, states = make()
    options = {
        "task": "image_classification",
        "checkpoints": states[:1],
        "projection": trak.Eigenbasis(20),
        "save_dir": tmp_path / "kept",
    }
    monkeypatch.setattr(trak.Eigenbasis, "version", 2)
    trak.attribute(model, train, targets, **options)
    monkeypatch.undo()
    with pytest.raises(FingerprintError, match="projection"):
        trak.attribute(model, train, targets, **options)


def test_other_options_in_the_same_folder_are_refused(tmp_path):
    model, train, _, states = make()
    options = {"task": "image_classification", "save_dir": tmp_path / "kept"}
    trak.TRAK(model=model, projection=trak.Eigenbasis(20), **options).fit(train, states[:1])
    for other in (
        trak.Eigenbasis(20, whitening=2.0),
        trak.Eigenbasis(20, sample=30),
        trak.Whitened(trak.Sparse(20)),
    ):
        with pytest.raises(FingerprintError):
            trak.TRAK(model=model, projection=other, **options).fit(train, states[:1])


def test_some_parameters_only_and_half_precision():
    model, train, targets, _ = make(torch.float32)
    options = {"task": "image_classification", "projection": trak.Eigenbasis(30)}
    found = trak.attribute(model, train, targets, parameters=["5.*"], **options)
    assert found.info["projection_dimension"] == 15
    half = trak.attribute(model, train, targets, dtype=torch.bfloat16, **options)
    whole = trak.attribute(model, train, targets, **options)
    assert half.scores.tensor().isfinite().all()
    assert np.corrcoef(half.scores.tensor().flatten(), whole.scores.tensor().flatten())[0, 1] > 0.9


def test_outputs_that_are_no_numbers_are_told_of():
    model, train, _, _ = make()
    task = CustomTask(lambda model, batch: model(batch[0]).sum(1) / (batch[1] != 0))
    with pytest.raises(NonFiniteError, match="factors: model outputs are NaN or infinite"):
        trak.TRAK(model=model, task=task, projection=EVERYTHING, check=False).fit(train)


@pytest.mark.parametrize("method", [trak.TracIn, trak.GradientSimilarity])
def test_other_methods_take_it_too(method):
    model, train, targets, states = make()
    options = {"learning_rates": [0.1]} if method is trak.TracIn else {"similarity": "dot"}
    fitted = method(model=model, task="image_classification", projection=EVERYTHING, **options).fit(
        train, states[:1]
    )
    assert fitted.attribute(targets).scores.tensor().isfinite().all()


# TRAKer


def with_traker(traker, train, targets, states, fit=True):
    for state in states:
        traker.load_checkpoint(state)
        if fit:
            traker.fit_factors(train)
        for rows in torch.arange(N).split(16):
            traker.featurize([tensor[rows] for tensor in train], num_samples=len(rows))
    traker.finalize_features()
    for state in states:
        traker.start_scoring_checkpoint("val", state, num_targets=T)
        traker.score(targets, num_samples=T)
    return traker.finalize_scores("val")


def test_traker_gives_what_attribute_gives(tmp_path):
    model, train, targets, states = make()
    expected = trak.attribute(
        model, train, targets, task="image_classification", checkpoints=states, projection=trak.Eigenbasis(20)
    ).scores.tensor()
    for folder in (None, tmp_path / "kept"):
        traker = trak.TRAKer(model, "image_classification", N, folder, projector=trak.Eigenbasis(20))
        np.testing.assert_allclose(
            with_traker(traker, train, targets, states), expected, rtol=1e-5, atol=1e-8
        )
    # A script that is run again: nothing is fitted.
    again = trak.TRAKer(model, "image_classification", N, tmp_path / "kept", projector=trak.Eigenbasis(20))
    np.testing.assert_allclose(
        with_traker(again, train, targets, states, fit=False), expected, rtol=1e-5, atol=1e-8
    )


def test_traker_says_what_is_missing():
    model, train, targets, states = make()
    traker = trak.TRAKer(model, "image_classification", N, None, projector=trak.Eigenbasis(20))
    with pytest.raises(ProtocolError, match="call load_checkpoint"):
        traker.fit_factors(train)
    traker.load_checkpoint(states[0])
    with pytest.raises(ProtocolError, match=r"call fit_factors\(train_set\) after load_checkpoint"):
        traker.featurize(train, num_samples=N)
    with pytest.raises(InputError, match="train_set has 5 rows, and train_set_size is 40"):
        traker.fit_factors(targets)
    traker.fit_factors(DataLoader(TensorDataset(*train), batch_size=8))
    traker.featurize(train, num_samples=N)
    plain = trak.TRAKer(model, "image_classification", N, None, projector=trak.Sparse(20))
    plain.load_checkpoint(states[0])
    with pytest.raises(ProtocolError, match="has no factors to fit"):
        plain.fit_factors(train)


# Samples


@pytest.mark.parametrize(("num_rows", "size"), [(10, 3), (1000, 999), (7, 7), (50_000, 2000)])
def test_samples_are_spread_and_the_same_each_time(num_rows, size):
    rows = spread_rows(num_rows, size)
    assert torch.equal(rows, spread_rows(num_rows, size))
    assert len(rows) == size
    assert (rows.diff() > 0).all()
    edges = torch.arange(size + 1) * num_rows // size
    assert ((rows >= edges[:-1]) & (rows < edges[1:])).all()
    assert torch.equal(spread_rows(5, None), torch.arange(5))
    assert torch.equal(spread_rows(5, 9), torch.arange(5))


def test_samples_of_rows_that_repeat_have_every_kind():
    labels = torch.arange(20_000) % 10
    counts = torch.bincount(labels[spread_rows(20_000, 2000)], minlength=10)
    assert (counts - 200).abs().max() < 60


class Batches:
    """Can only be read from the front."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return (tuple(part[rows] for part in self.data) for rows in torch.arange(N).split(7))


@pytest.mark.parametrize("kind", ["tensors", "dataset", "loader", "budget", "prefetched", "batches"])
def test_samples_of_every_source(kind):
    data = (torch.arange(N * 3.0).reshape(N, 3), torch.arange(N))
    examples = [(data[0][row], data[1][row]) for row in range(N)]
    source = {
        "tensors": lambda: as_rows(data, batch_size=6),
        "dataset": lambda: as_rows(examples, batch_size=6),
        "loader": lambda: as_rows(DataLoader(TensorDataset(*data), batch_size=6, shuffle=True)),
        "budget": lambda: token_budget_rows(
            examples,
            torch.arange(N) % 5 + 1,
            12,
            collate=lambda rows: [torch.stack(part) for part in zip(*rows)],
        ),
        "prefetched": lambda: trak.datasets.prefetched(data, batch_size=6),
        "batches": lambda: as_rows(Batches(data)),
    }[kind]()
    rows = spread_rows(N, 9)
    sample = some_rows(source, rows)
    assert sample.num_rows == 9
    found = {
        int(number): batch[1][place]
        for numbers, batch in sample.batches()
        for place, number in enumerate(numbers)
    }
    assert [int(found[number]) for number in range(9)] == rows.tolist()
    sizes = [len(numbers) for numbers, _ in sample.batches()]
    assert sum(sizes) == 9 and (kind == "budget" or max(sizes) > 2)  # not row by row
    assert int(sample.example(4)[1][0]) == int(rows[4])
