"""TracIn and GAS against their sums over checkpoints, written out with autograd."""

import pytest
import torch
from torch import nn

import trak
from trak.methods.tracin import TracIn

N, T, M = 23, 5, 3
RATES = (0.1, 0.03, 0.2)


def make(outputs=3):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()
    checkpoints = [
        {name: value + 0.4 * torch.randn_like(value) for name, value in model.state_dict().items()}
        for _ in range(M)
    ]
    if outputs == 1:
        train, targets = (
            (torch.randn(n, 4, dtype=torch.float64), torch.randn(n, dtype=torch.float64)) for n in (N, T)
        )
    else:
        train, targets = (
            (torch.randn(n, 4, dtype=torch.float64), torch.randint(outputs, (n,))) for n in (N, T)
        )
    return model, train, targets, checkpoints


def loss(model, x, y):
    prediction = model(x[None])
    if prediction.shape[1] == 1:
        return 0.5 * (prediction[0, 0] - y) ** 2
    return nn.functional.cross_entropy(prediction, y[None])


def output(model, x, y):
    prediction = model(x[None])
    if prediction.shape[1] == 1:
        return prediction[0, 0]
    p = prediction.softmax(1)[0, y]
    return torch.log(p / (1 - p))


def gradients(model, batch, function):
    rows = []
    for x, y in zip(*batch):
        parts = torch.autograd.grad(function(model, x, y), list(model.parameters()))
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


def by_hand(model, train, targets, checkpoints, *, normalise, target):
    total = 0
    for state, rate in zip(checkpoints, RATES):
        model.load_state_dict(state)
        one = -gradients(model, train, loss)
        other = -gradients(model, targets, loss) if target == "loss" else gradients(model, targets, output)
        if normalise:
            one, other = one / one.norm(dim=1, keepdim=True), other / other.norm(dim=1, keepdim=True)
        total = total + rate * one @ other.T
    return total


@pytest.mark.parametrize("outputs", [3, 1], ids=["classification", "regression"])
@pytest.mark.parametrize("target", ["loss", "output"])
@pytest.mark.parametrize("normalise", [False, True])
def test_equals_the_sum_over_checkpoints(normalise, target, outputs):
    model, train, targets, checkpoints = make(outputs)
    fitted = TracIn(
        model=model,
        task="regression" if outputs == 1 else "image_classification",
        projection=trak.Identity(),
        learning_rates=RATES,
        normalise=normalise,
        target=target,
        batch_size=7,
    ).fit(train, checkpoints)
    attribution = fitted.attribute(targets)
    expected = by_hand(model, train, targets, checkpoints, normalise=normalise, target=target)
    torch.testing.assert_close(attribution.scores.tensor(), expected, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(
        attribution.scores[3:9, [4, 1]], expected[3:9][:, [4, 1]], rtol=1e-8, atol=1e-12
    )
    assert attribution.info["method"] == ("GAS" if normalise else "TracIn")
    assert attribution.info["learning_rates"] == list(RATES)
    if normalise:
        with pytest.raises(trak.InputError, match="self-influence"):
            attribution.self_influence()
    else:
        own = by_hand(model, train, train, checkpoints, normalise=False, target=target).diagonal()
        torch.testing.assert_close(attribution.self_influence(), own, rtol=1e-8, atol=1e-12)


def test_positive_scores_lower_the_targets_loss():
    model, train, targets, checkpoints = make()
    scores = TracIn(
        model=model, task="image_classification", projection=trak.Identity(), learning_rates=[1.0]
    ).fit(train, checkpoints[:1])
    scores = scores.attribute(targets).scores.tensor()
    model.load_state_dict(checkpoints[0])
    before = torch.stack([loss(model, x, y) for x, y in zip(*targets)])
    rate = 1e-6
    for row in (0, 11):
        model.load_state_dict(checkpoints[0])
        parts = torch.autograd.grad(loss(model, train[0][row], train[1][row]), list(model.parameters()))
        with torch.no_grad():
            for parameter, part in zip(model.parameters(), parts):
                parameter -= rate * part
        after = torch.stack([loss(model, x, y) for x, y in zip(*targets)])
        torch.testing.assert_close((before - after) / rate, scores[row], rtol=1e-4, atol=1e-6)


def test_a_projection_estimates_the_same_scores():
    model, train, targets, checkpoints = make()
    options = {"model": model, "task": "image_classification", "learning_rates": RATES}
    exact = TracIn(projection=trak.Identity(), **options).fit(train, checkpoints).attribute(targets)
    rough = TracIn(projection=trak.Rademacher(dim=4096), **options).fit(train, checkpoints).attribute(targets)
    error = rough.scores.tensor() - exact.scores.tensor()
    assert 0 < float(error.norm() / exact.scores.tensor().norm()) < 0.1


def test_normalised_gradients_that_underflow_still_count():
    # At f = 60 the weight q is 9e-27: the loss gradient's square is zero in float32, its direction is known.
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[60.0, 0.0]]))
    train = (torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([1, 1]))
    fitted = TracIn(model=model, task="image_classification", projection=trak.Identity(), normalise=True).fit(
        train
    )
    torch.testing.assert_close(fitted.attribute(train).scores.tensor(), torch.eye(2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rates": [0.1, 0.2]}, "2 for 3 checkpoints"),
        ({"learning_rates": 0.1}, "must be a list"),
        ({"learning_rates": [0.1, 0.0, 0.1]}, "positive"),
        ({"learning_rates": [0.1, float("nan"), 0.1]}, "positive"),
        ({"target": "logit"}, '"loss" or "output"'),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    model, train, _, checkpoints = make()
    with pytest.raises(trak.InputError, match=message):
        TracIn(model=model, task="image_classification", **settings).fit(train, checkpoints)


def test_a_single_checkpoint_outside_a_list_is_refused():
    model, train, _, _ = make()
    with pytest.raises(trak.InputError, match=r"write \[checkpoint\]"):
        TracIn(model=model, task="image_classification", learning_rates=[0.1]).fit(train, model)
