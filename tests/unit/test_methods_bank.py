"""Empirical influence and datamodels against loops and closed forms."""

import builtins
import itertools

import numpy as np
import pytest
import torch

import trak
from trak.methods.datamodel import Datamodel
from trak.methods.empirical_influence import EmpiricalInfluence

N, T, S = 9, 4, 40
TRAIN, TARGETS = torch.zeros(N, 2), torch.zeros(T, 2)


def make():
    masks = trak.evaluation.random_subsets(N, S, 0.6, seed=1)
    outputs = torch.randn(S, 2, T, dtype=torch.float64) + 50
    return masks, outputs


@pytest.mark.parametrize("form", ["tensors", "arrays"])
def test_empirical_influence_equals_a_loop(form):
    masks, outputs = make()
    expected = torch.empty(N, T, dtype=torch.float64)
    for i, t in itertools.product(range(N), range(T)):
        values = outputs[:, :, t].mean(1)
        expected[i, t] = values[masks[:, i]].mean() - values[~masks[:, i]].mean()
    given = (masks, outputs) if form == "tensors" else (masks.numpy().astype(int), outputs.numpy())
    attribution = EmpiricalInfluence(masks=given[0], outputs=given[1]).fit(TRAIN).attribute(TARGETS)
    torch.testing.assert_close(attribution.scores.tensor(), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(attribution.scores[[5, 2], 1:3], expected[[5, 2], 1:3], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(attribution.outputs, outputs.mean((0, 1)))
    assert attribution.info["num_models_per_subset"] == 2


def test_empirical_influence_recovers_an_additive_output():
    # Over a half and its complement, f = Σ w_i differs by Σ ± w_i; over all subsets of one size differences of means are
    # w_i − mean of the others.
    masks = torch.tensor([[i in chosen for i in range(5)] for chosen in itertools.combinations(range(5), 2)])
    weights = torch.randn(5, 3, dtype=torch.float64)
    attribution = EmpiricalInfluence(masks=masks, outputs=masks.double() @ weights)
    scores = attribution.fit(torch.zeros(5, 1)).attribute(torch.zeros(3, 1)).scores.tensor()
    others = (weights.sum(0) - weights) / 4
    torch.testing.assert_close(scores, weights - others)


def test_datamodel_is_the_lasso_solution_where_it_is_known():
    # Over all subsets the centred columns are orthogonal with variance 1/4, so that each coefficient is soft-thresholded at 4 α.
    masks = torch.tensor(list(itertools.product([False, True], repeat=7)))
    weights = torch.zeros(7, 2, dtype=torch.float64)
    weights[1, 0], weights[4, 0], weights[:, 1] = 2.0, -1.0, torch.linspace(-1, 1, 7)
    outputs = masks.double() @ weights + 3 + 0.5 * torch.randn(len(masks), 2, dtype=torch.float64)
    attribution = Datamodel(masks=masks, outputs=outputs).fit(torch.zeros(7, 1)).attribute(torch.zeros(2, 1))
    centred = masks.double() - 0.5
    least_squares = 4 * centred.T @ (outputs - outputs.mean(0)) / len(masks)
    penalties = torch.tensor(attribution.info["penalties"])
    expected = least_squares.sign() * (least_squares.abs() - 4 * penalties).clamp_min(0)
    torch.testing.assert_close(attribution.scores.tensor(), expected, rtol=1e-6, atol=1e-6)
    assert (penalties > 0).all()
    assert float((attribution.scores.tensor() - weights).abs().max()) < 0.4


def test_datamodel_says_which_package_it_needs(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    masks, outputs = make()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(trak.MissingDependencyError, match=r"trak-attribution\[baselines\]"):
        Datamodel(masks=masks, outputs=outputs).fit(TRAIN)


MASKS, OUTPUTS = make()
WITHOUT_A_CHANGE = MASKS.clone()
WITHOUT_A_CHANGE[:, 3] = True


@pytest.mark.parametrize("method", [EmpiricalInfluence, Datamodel])
@pytest.mark.parametrize(
    ("masks", "outputs", "error", "message"),
    [
        (MASKS[0], OUTPUTS, trak.InputError, r"\[subsets, training rows\]"),
        (MASKS.int() * 2, OUTPUTS, trak.InputError, "booleans"),
        (MASKS, OUTPUTS[:-1], trak.InputError, "39 subsets and masks of 40"),
        (MASKS, OUTPUTS[:, 0, 0], trak.InputError, "outputs must be"),
        (MASKS, OUTPUTS * np.nan, trak.NonFiniteError, "NaN"),
        (MASKS[:, 1:], OUTPUTS, trak.InputError, "train_set has 9 rows.*with 8"),
    ],
)
def test_impossible_banks_are_refused(method, masks, outputs, error, message):
    with pytest.raises(error, match=message):
        method(masks=masks, outputs=outputs).fit(TRAIN)


def test_rows_without_a_contrast_other_targets_and_too_many_folds_are_refused():
    with pytest.raises(trak.InputError, match="1 training rows, first 3"):
        EmpiricalInfluence(masks=WITHOUT_A_CHANGE, outputs=OUTPUTS).fit(TRAIN)
    with pytest.raises(trak.InputError, match="targets has 3 rows"):
        EmpiricalInfluence(masks=MASKS, outputs=OUTPUTS).fit(TRAIN).attribute(TARGETS[1:])
    with pytest.raises(trak.InputError, match="40 subsets; got 41"):
        Datamodel(masks=MASKS, outputs=OUTPUTS, folds=41).fit(TRAIN)
