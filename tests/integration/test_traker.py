"""The protocol of the paper's slides and of the released package, its order of calls, and its known traps."""

import inspect
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import trak
from trak import TRAKer

N, T = 50, 6


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def make(scale=1.0):
    torch.manual_seed(0)
    model = Net()
    train = (torch.randn(N, 1, 6, 6) * scale, torch.randint(3, (N,)))
    val = (torch.randn(T, 1, 6, 6) * scale, torch.randint(3, (T,)))
    checkpoints = []
    for seed in range(2):
        torch.manual_seed(seed)
        checkpoints.append({k: v.clone() for k, v in Net().state_dict().items()})
    return model, train, val, checkpoints


def loader(data, batch_size=16, order=None):
    rows = torch.arange(len(data[0])) if order is None else order
    for chunk in rows.split(batch_size):
        yield [t[chunk] for t in data]


def reference(model, train, val, checkpoints, **options):
    options = {"damping": "auto", **options}
    attribution = trak.attribute(
        model, train, val, task="image_classification", checkpoints=checkpoints, **options
    )
    return np.asarray(attribution.scores)


def featurize_and_score(traker, train, val, checkpoints, exp_name="val"):
    for model_id, checkpoint in enumerate(checkpoints):
        traker.load_checkpoint(checkpoint, model_id=model_id)
        for batch in loader(train):
            traker.featurize(batch=batch, num_samples=len(batch[0]))
    traker.finalize_features()
    for model_id, checkpoint in enumerate(checkpoints):
        traker.start_scoring_checkpoint(exp_name, checkpoint, model_id, T)
        for batch in loader(val, 4):
            traker.score(batch=batch, num_samples=len(batch[0]))
    return traker.finalize_scores(exp_name)


def test_the_slides_run_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, train_data, val_data, (checkpoint, _) = make()
    batch_size = 16
    train_loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*train_data), batch_size=batch_size
    )
    val_loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*val_data), batch_size=batch_size)

    traker = TRAKer(model=model, task="image_classification", train_set_size=N)
    traker.load_checkpoint(checkpoint)
    for batch in train_loader:
        traker.featurize(batch=batch, num_samples=batch_size)
    traker.finalize_features()
    traker.start_scoring_checkpoint(checkpoint, num_targets=T)
    for batch in val_loader:
        traker.score(batch=batch, num_samples=batch_size)
    scores = traker.finalize_scores()

    assert scores.shape == (N, T)
    np.testing.assert_allclose(
        scores, reference(model, train_data, val_data, [checkpoint]), rtol=1e-3, atol=1e-5
    )
    assert (tmp_path / "trak_results" / "manifest.json").exists()


def test_the_released_packages_protocol(tmp_path):
    model, train, val, checkpoints = make()
    traker = TRAKer(
        model=model,
        task="image_classification",
        train_set_size=N,
        save_dir=str(tmp_path),
        load_from_save_dir=True,
        device="cpu",
        proj_dim=32,
        projector_seed=7,
        use_half_precision=True,
        proj_max_batch_size=16,
        grad_wrt=["conv.weight", "head.weight"],
        lambda_reg=0.5,
    )
    scores = featurize_and_score(traker, train, val, checkpoints)
    shapes = {"conv.weight": (4, 1, 3, 3), "head.weight": (3, 4)}
    parameters = 36 + 12
    expected = reference(
        model,
        train,
        val,
        checkpoints,
        projection=trak.projection.default_projection(shapes, dim=32, seed=7),
        damping=0.5 * parameters / 32,
        gram="uniform",
        weight_exponent=1,
        parameters=["conv.weight", "head.weight"],
    )
    np.testing.assert_allclose(scores, expected, rtol=2e-2, atol=np.abs(expected).max() * 5e-3)


def test_lambda_reg_is_in_the_released_packages_units(tmp_path):
    # Its features are gᵀP/√p with entries ±1; ours are gᵀP/√K. The same λ must mean the same damping.
    model, train, val, (checkpoint, _) = make()
    projection, lam = trak.Rademacher(dim=20), 0.37
    model, train, val = model.double(), (train[0].double(), train[1]), (val[0].double(), val[1])
    checkpoint = {k: v.double() if v.is_floating_point() else v for k, v in checkpoint.items()}
    traker = TRAKer(model, "image_classification", N, save_dir=None, projector=projection, lambda_reg=lam)
    scores = featurize_and_score(traker, train, val, [checkpoint])

    model.load_state_dict(checkpoint)
    model.eval()
    names = [name for name, _ in model.named_parameters()]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    state = projection.init(shapes, dtype=torch.float64)
    signs = torch.cat([projection.matrix(state, name) for name in names]) * 20**0.5
    assert set(signs.unique().round(decimals=9).tolist()) == {-1.0, 1.0}

    def peer_features(data):
        rows, q = [], []
        for x, y in zip(*data):
            logits = model(x[None])[0]
            f = logits[y] - torch.cat([logits[:y], logits[y + 1 :]]).logsumexp(0)
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(f, list(model.parameters()))]))
            q.append(torch.sigmoid(-f).detach())
        return torch.stack(rows) @ signs / len(signs) ** 0.5, torch.stack(q)

    (g, q), (h, _) = peer_features(train), peer_features(val)
    expected = (g @ torch.linalg.inv(g.T @ g + lam * torch.eye(20, dtype=torch.float64)) @ h.T) * q[:, None]
    np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-5, atol=1e-7)


def test_signature_keeps_the_released_names():
    parameters = inspect.signature(TRAKer).parameters
    released = (
        "model task train_set_size save_dir load_from_save_dir device gradient_computer projector saver score_computer "
        "proj_dim logging_level use_half_precision proj_max_batch_size projector_seed grad_wrt lambda_reg"
    )
    assert set(released.split()) | {"gram", "weight_exponent"} == set(parameters)
    assert list(parameters)[:6] == released.split()[:6]
    for method, names in {
        "load_checkpoint": ["checkpoint", "model_id"],
        "featurize": ["batch", "inds", "num_samples"],
        "finalize_features": ["model_ids", "del_grads"],
        "start_scoring_checkpoint": ["exp_name", "checkpoint", "model_id", "num_targets"],
        "score": ["batch", "inds", "num_samples"],
        "finalize_scores": ["exp_name", "model_ids", "allow_skip"],
    }.items():
        assert list(inspect.signature(getattr(TRAKer, method)).parameters)[1:] == names


def test_inds_in_any_order(tmp_path):
    model, train, val, checkpoints = make()
    expected = reference(model, train, val, checkpoints)
    traker = TRAKer(model, "image_classification", N, save_dir=tmp_path)
    for model_id, checkpoint in enumerate(checkpoints):
        traker.load_checkpoint(checkpoint, model_id)
        order = torch.randperm(N)
        for chunk, batch in zip(order.split(7), loader(train, 7, order)):
            traker.featurize(batch=batch, inds=chunk if model_id else chunk.numpy())
    traker.finalize_features()
    for model_id, checkpoint in enumerate(checkpoints):
        traker.start_scoring_checkpoint("val", checkpoint, model_id, T)
        order = torch.tensor([5, 0, 3, 1, 2, 4])
        for chunk, batch in zip(order.split(4), loader(val, 4, order)):
            traker.score(batch=batch, inds=chunk)
    np.testing.assert_allclose(traker.finalize_scores("val"), expected, rtol=1e-3, atol=1e-5)


def test_several_checkpoints_without_ids(tmp_path):
    model, train, val, checkpoints = make()
    traker = TRAKer(model, "image_classification", N, save_dir=tmp_path)
    for checkpoint in checkpoints:
        traker.load_checkpoint(checkpoint)
        for batch in loader(train):
            traker.featurize(batch, num_samples=len(batch[0]))
    traker.finalize_features()
    for checkpoint in reversed(checkpoints):
        traker.start_scoring_checkpoint(checkpoint, num_targets=T)
        traker.score(val, num_samples=T)
    np.testing.assert_allclose(
        traker.finalize_scores(), reference(model, train, val, checkpoints), rtol=1e-3, atol=1e-5
    )


SCRIPT = """
import os, sys, torch
sys.path.insert(0, {here!r})
from test_traker import *
model, train, val, checkpoints = make()
traker = TRAKer(model, "image_classification", N, save_dir={save_dir!r})
traker.load_checkpoint(checkpoints[0], model_id=0)
for index, batch in enumerate(loader(train)):
    traker.featurize(batch=batch, num_samples=len(batch[0]))
    if index == {stop}:
        {leave}
"""


@pytest.mark.parametrize("leave", ["os._exit(1)", "sys.exit(0)"])
def test_a_new_process_goes_on_where_another_stopped(tmp_path, leave):
    model, train, val, checkpoints = make()
    code = SCRIPT.format(here=os.path.dirname(__file__), save_dir=str(tmp_path), stop=1, leave=leave)
    subprocess.run([sys.executable, "-c", code], check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    traker = TRAKer(model, "image_classification", N, save_dir=tmp_path)
    if leave == "sys.exit(0)":
        # A regular exit keeps the rows that were waiting for their shard to fill.
        with pytest.raises(trak.MissingRowsError, match="32 to 49"):
            traker.finalize_features()
    traker.load_checkpoint(checkpoints[0], model_id=0)
    for batch in loader(train, batch_size=9):
        traker.featurize(batch=batch, num_samples=len(batch[0]))
    traker.finalize_features()
    del traker
    scoring = TRAKer(model, "image_classification", N, save_dir=tmp_path)
    scoring.start_scoring_checkpoint("val", checkpoints[0], 0, T)
    scoring.score(val, num_samples=T)
    np.testing.assert_allclose(
        scoring.finalize_scores("val"), reference(model, train, val, checkpoints[:1]), rtol=1e-3, atol=1e-5
    )


def test_load_from_save_dir_false_before_scoring(tmp_path):
    # In the released package this ends in a KeyError, or in features written over.
    model, train, val, checkpoints = make()
    expected = featurize_and_score(
        TRAKer(model, "image_classification", N, save_dir=tmp_path), train, val, checkpoints[:1]
    )
    other = TRAKer(model, "image_classification", N, save_dir=tmp_path, load_from_save_dir=False)
    with pytest.raises(trak.ProtocolError, match="load_checkpoint"):
        other.finalize_features()
    other.start_scoring_checkpoint("again", checkpoints[0], 0, T)
    other.score(val, num_samples=T)
    np.testing.assert_allclose(other.finalize_scores("again"), expected, rtol=1e-4, atol=1e-6)


def test_calls_out_of_order_name_the_missing_step(tmp_path):
    model, train, val, checkpoints = make()
    traker = TRAKer(model, "image_classification", N, save_dir=tmp_path)
    batch = next(loader(train))
    with pytest.raises(trak.ProtocolError, match="load_checkpoint"):
        traker.featurize(batch, num_samples=16)
    with pytest.raises(trak.ProtocolError, match="start_scoring_checkpoint"):
        traker.score(batch, num_samples=16)
    with pytest.raises(trak.ProtocolError, match="load_checkpoint and featurize"):
        traker.finalize_features()
    with pytest.raises(trak.ProtocolError, match="start_scoring_checkpoint"):
        traker.finalize_scores("val")
    with pytest.raises(trak.ProtocolError, match="never featurized"):
        traker.start_scoring_checkpoint("val", checkpoints[0], 0, T)
    traker.load_checkpoint(checkpoints[0], 0)
    traker.featurize(batch, num_samples=16)
    with pytest.raises(trak.MissingRowsError, match="16 to 49"):
        traker.finalize_features()
    with pytest.raises(trak.ProtocolError, match="16 to 49 are missing"):
        traker.start_scoring_checkpoint("val", checkpoints[0], 0, T)
    traker.load_checkpoint(checkpoints[0], 0)
    for part in loader(train):
        traker.featurize(part, num_samples=len(part[0]))
    with pytest.raises(trak.ProtocolError, match=r"finalize_features\(\)"):
        traker.start_scoring_checkpoint("val", checkpoints[0], 0, T)
    traker.finalize_features()
    traker.start_scoring_checkpoint("val", checkpoints[0], 0, T)
    traker.score([t[:4] for t in val], num_samples=4)
    with pytest.raises(trak.MissingRowsError, match="4 to 5"):
        traker.finalize_scores("val")
    with pytest.raises(trak.ProtocolError, match="no checkpoint has all its targets"):
        traker.finalize_scores("val", allow_skip=True)
    with pytest.raises(trak.ProtocolError, match="start_scoring_checkpoint"):
        traker.score(val, num_samples=T)


def test_allow_skip_leaves_out_what_was_not_scored(tmp_path, caplog):
    model, train, val, checkpoints = make()
    traker = TRAKer(model, "image_classification", N, save_dir=tmp_path)
    featurize_and_score(traker, train, val, checkpoints)
    traker.start_scoring_checkpoint("one", checkpoints[1], 1, T)
    traker.score(val, num_samples=T)
    with pytest.raises(trak.MissingRowsError, match="checkpoint 0"):
        traker.finalize_scores("one")
    skipped = traker.finalize_scores("one", allow_skip=True)
    assert "checkpoint 0" in caplog.text
    np.testing.assert_allclose(skipped, traker.finalize_scores("val", model_ids=[1]), rtol=1e-4, atol=1e-7)


def test_experiment_of_another_size_or_other_targets(tmp_path):
    model, train, val, checkpoints = make()
    traker = TRAKer(model, "image_classification", N, save_dir=tmp_path)
    featurize_and_score(traker, train, val, checkpoints[:1])
    with pytest.raises(trak.FingerprintError, match="val"):
        traker.start_scoring_checkpoint("val", checkpoints[0], 0, T + 1)
    traker.start_scoring_checkpoint("val", checkpoints[0], 0, T)
    with pytest.raises(trak.InputError, match="exp_name"):
        traker.score([val[0] + 1, val[1]], num_samples=T)
    # The same targets once more are fine, and cost one forward pass.
    traker.start_scoring_checkpoint("val", checkpoints[0], 0, T)
    traker.score(val, num_samples=T)


def test_other_training_data_or_checkpoint_in_the_same_save_dir(tmp_path):
    model, train, val, checkpoints = make()
    traker = TRAKer(model, "image_classification", N, save_dir=tmp_path)
    featurize_and_score(traker, train, val, checkpoints[:1])
    with pytest.raises(trak.FingerprintError):
        traker.load_checkpoint(checkpoints[1], model_id=0)
    traker.load_checkpoint(checkpoints[0], model_id=0)
    with pytest.raises(trak.InputError, match="save_dir"):
        traker.featurize([train[0][:16] * 2, train[1][:16]], num_samples=16)
    with pytest.raises(trak.FingerprintError, match="num_rows"):
        TRAKer(model, "image_classification", N + 1, save_dir=tmp_path)
    with pytest.raises(trak.FingerprintError, match="projection"):
        TRAKer(model, "image_classification", N, save_dir=tmp_path, proj_dim=16)


@pytest.mark.parametrize("save_dir", ["features", None])
def test_other_data_for_rows_that_wait_for_their_shard(save_dir, tmp_path):
    """Such as every batch numbered from 0 again."""
    model, train, val, checkpoints = make()
    traker = TRAKer(model, "image_classification", N, save_dir=save_dir and tmp_path / save_dir)
    traker.load_checkpoint(checkpoints[0])
    first, second, *_ = loader(train)
    traker.featurize(first, inds=range(16))
    traker.featurize(first, inds=range(16))
    with pytest.raises(trak.InputError, match="training rows 0 to 15 from other data"):
        traker.featurize(second, inds=range(16))
    for start, batch in zip(range(0, N, 16), loader(train)):
        traker.featurize(batch, inds=range(start, start + len(batch[0])))
    traker.finalize_features()
    traker.start_scoring_checkpoint("val", checkpoints[0], 0, T)
    traker.score(val, num_samples=T)
    whole = TRAKer(model, "image_classification", N, save_dir=None)
    np.testing.assert_allclose(
        traker.finalize_scores("val"),
        featurize_and_score(whole, train, val, checkpoints[:1]),
        rtol=1e-5,
        atol=1e-6,
    )


def test_sizes_that_do_not_fit(tmp_path):
    model, train, _, checkpoints = make()
    traker = TRAKer(model, "image_classification", N, save_dir=tmp_path)
    traker.load_checkpoint(checkpoints[0], 0)
    batch = next(loader(train))
    for options, match in [
        ({}, "exactly one"),
        ({"num_samples": 16, "inds": range(16)}, "exactly one"),
        ({"num_samples": 15}, "num_samples is 15"),
        ({"num_samples": 17}, "only the last batch"),
        ({"inds": range(15)}, "15 entries"),
        ({"inds": range(40, 56)}, "do not exist"),
        ({"inds": [0] * 16}, "row may come once"),
    ]:
        with pytest.raises(trak.InputError, match=match):
            traker.featurize(batch, **options)
    for part in loader(train):
        traker.featurize(part, num_samples=len(part[0]))
    with pytest.raises(trak.InputError, match="Was the loader run twice"):
        traker.featurize(batch, num_samples=16)


def test_fewer_rows_than_columns_without_damping(tmp_path):
    model, train, val, checkpoints = make()
    traker = TRAKer(
        model, "image_classification", N, save_dir=tmp_path, projector=trak.Rademacher(dim=60), lambda_reg=0.0
    )
    with pytest.raises(trak.SingularGramError, match="only 50 training rows"):
        featurize_and_score(traker, train, val, checkpoints[:1])
    finite = TRAKer(model, "image_classification", N, save_dir=tmp_path, projector=trak.Rademacher(dim=60))
    assert np.isfinite(featurize_and_score(finite, train, val, checkpoints[:1])).all()


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_large_and_small_gradients_in_half_precision(tmp_path, scale):
    # The released package stores them in float16 as they are: infinity, or zero.
    model, train, val, checkpoints = make(scale)
    half = TRAKer(model, "image_classification", N, save_dir=tmp_path / "half", use_half_precision=True)
    full = TRAKer(model, "image_classification", N, save_dir=tmp_path / "full")
    got, expected = (np.asarray(featurize_and_score(t, train, val, checkpoints[:1])) for t in (half, full))
    assert np.isfinite(got).all()
    assert np.abs(got - expected).max() < 0.02 * np.abs(expected).max()


def test_memory_only_and_attribution_of_an_experiment():
    model, train, val, checkpoints = make()
    traker = TRAKer(model, "image_classification", N, save_dir=None)
    scores = featurize_and_score(traker, train, val, checkpoints)
    assert type(scores) is np.ndarray
    attribution = traker.attribution("val")
    assert attribution.top(1).rows[:, 0].tolist() == scores.argmax(0).tolist()
    assert json.dumps(dict(attribution.info))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"train_set_size": 0}, "train_set_size"),
        ({"task": "iterative"}, "unknown task"),
        ({"saver": object()}, "saver"),
        ({"projector": trak.Identity(), "proj_dim": 8}, "either projector or proj_dim"),
        ({"lambda_reg": -1}, "damping"),
    ],
)
def test_bad_arguments(options, match):
    options = {
        "model": Net(),
        "task": "image_classification",
        "train_set_size": N,
        "save_dir": None,
    } | options
    with pytest.raises(trak.InputError, match=match):
        TRAKer(**options)


def test_the_model_is_not_changed(tmp_path):
    model, train, val, checkpoints = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    featurize_and_score(TRAKer(model, "image_classification", N, save_dir=tmp_path), train, val, checkpoints)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize("inds", [[0.5, 1.0], [True, False]])
def test_inds_that_are_no_row_numbers(inds):
    model = Net()
    traker = trak.TRAKer(model, "image_classification", 2, None)
    traker.load_checkpoint(model.state_dict())
    with pytest.raises(trak.InputError, match="inds must be whole numbers"):
        traker.featurize((torch.zeros(2, 4), torch.zeros(2).long()), inds=inds)
