"""What every method owes: an attribution that can be ranked, saved and read back, and settings that cannot change."""

import dataclasses
import json

import pytest
import torch
from torch import nn

import trak
from trak.methods.arnoldi import ArnoldiInfluence
from trak.methods.datamodel import Datamodel
from trak.methods.ekfac import EKFACInfluence
from trak.methods.empirical_influence import EmpiricalInfluence
from trak.methods.influence_function import InfluenceFunction
from trak.methods.knn_shapley import KNNShapley
from trak.methods.lissa import LiSSAInfluence
from trak.methods.monte_carlo_shapley import TruncatedMonteCarloShapley
from trak.methods.representation_similarity import RepresentationSimilarity
from trak.methods.tracin import TracIn

N, T, S = 20, 3, 30
MODEL = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
TRAIN = (torch.randn(N, 4), torch.randint(3, (N,)))
TARGETS = (torch.randn(T, 4), torch.randint(3, (T,)))
STATES = [{name: value + 0.1 * index for name, value in MODEL.state_dict().items()} for index in range(2)]
NETWORK = {"model": MODEL, "task": "image_classification"}
TEXTS = [f"word{index} word{index % 3} word{index % 5}" for index in range(N)]
BANK = {"masks": trak.evaluation.random_subsets(N, S), "outputs": torch.randn(S, T)}
METHODS = {
    "TracIn": TracIn(**NETWORK, learning_rates=(0.1, 0.2)),
    "GAS": TracIn(**NETWORK, normalise=True),
    "influence": InfluenceFunction(**NETWORK, damping=0.1),
    "EK-FAC": EKFACInfluence(**NETWORK),
    "K-FAC": EKFACInfluence(**NETWORK, factors="kfac", fisher="exact"),
    "Arnoldi": ArnoldiInfluence(**NETWORK, rank=5),
    "LiSSA": LiSSAInfluence(**NETWORK, damping=0.1, depth=5),
    "representation": RepresentationSimilarity(**NETWORK, similarity="euclidean"),
    "KNN-Shapley": KNNShapley(**NETWORK),
    "empirical": EmpiricalInfluence(**BANK),
    "datamodel": Datamodel(**BANK),
    "Shapley": TruncatedMonteCarloShapley(train=lambda rows, targets: rows.sum().expand(T), permutations=2),
    "random": trak.RandomScores(),
}


@pytest.mark.parametrize("name", [*METHODS, "BM25"])
def test_attributions_rank_save_and_load(name, tmp_path):
    method = (METHODS | {"BM25": trak.BM25()})[name]
    assert isinstance(method, trak.Attributor)
    train, targets = (TEXTS, TEXTS[:T]) if name == "BM25" else (TRAIN, TARGETS)
    attribution = method.fit(train, STATES).attribute(targets)
    scores = attribution.scores.tensor()
    assert attribution.scores.shape == scores.shape == (N, T)
    assert scores.isfinite().all()
    assert attribution.info["method"]
    json.dumps(dict(attribution.info), allow_nan=False)
    top = attribution.top(4)
    torch.testing.assert_close(top.scores, scores.T.sort(dim=1, descending=True).values[:, :4])
    parts = torch.cat([block for _, block in attribution.scores.blocks(7)])
    torch.testing.assert_close(parts, scores)
    loaded = trak.Attribution.load(attribution.save(tmp_path / "saved"))
    torch.testing.assert_close(loaded.scores.tensor(), scores.float())
    assert loaded.info["method"] == attribution.info["method"]


@pytest.mark.parametrize("name", list(METHODS))
def test_settings_cannot_be_changed(name):
    field = dataclasses.fields(METHODS[name])[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(METHODS[name], field, None)


def test_tracin_reads_the_features_that_trak_stored(tmp_path, monkeypatch):
    options = NETWORK | {"save_dir": tmp_path, "projection": trak.Sparse(dim=16)}
    trak.TRAK(**options).fit(TRAIN, STATES).attribute(TARGETS)
    again = TracIn(**options).fit(TRAIN, STATES)

    def refuse(*args, **kwargs):
        raise AssertionError("featurized again")

    monkeypatch.setattr("trak.projector.Projector.start", refuse)
    found = TracIn(**options).fit(TRAIN, STATES).attribute(TARGETS).scores.tensor()
    torch.testing.assert_close(found, again.attribute(TARGETS).scores.tensor())


def test_cosine_and_dot_of_gradients_agree_in_sign():
    # In regression the loss weight y − ŷ has a sign, and with it the loss gradient.
    model = nn.Linear(4, 1)
    train, targets = (TRAIN[0], torch.randn(N)), (TARGETS[0], torch.zeros(T))
    options = {"model": model, "task": "regression", "projection": trak.Identity()}
    cosine, dot = (
        trak.GradientSimilarity(**options, similarity=similarity)
        .fit(train)
        .attribute(targets)
        .scores.tensor()
        for similarity in ("cosine", "dot")
    )
    assert torch.equal(cosine.sign(), dot.sign())
    assert cosine.abs().max() <= 1 + 1e-6
    rows = torch.cat([TRAIN[0], torch.ones(N, 1)], 1)
    values = torch.cat([TARGETS[0], torch.ones(T, 1)], 1)
    weights = train[1] - model(TRAIN[0]).detach().squeeze(1)
    torch.testing.assert_close(dot, weights[:, None] * (rows @ values.T))
    expected = nn.functional.cosine_similarity((weights[:, None] * rows)[:, None], values[None], dim=2)
    torch.testing.assert_close(cosine, expected)


@pytest.mark.parametrize("name", ["influence", "random"])
def test_modes_around_the_call_change_nothing(name):
    expected = METHODS[name].fit(TRAIN, STATES).attribute(TARGETS).scores.tensor()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            found = METHODS[name].fit(TRAIN, STATES).attribute(TARGETS).scores.tensor()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
