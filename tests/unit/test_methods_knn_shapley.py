"""KNN-Shapley against Shapley values from their definition: every subset, every target."""

import itertools
import math

import pytest
import torch
from torch import nn

import trak
from trak.methods.knn_shapley import KNNShapley


def value(subset, distances, matches, k):
    nearest = sorted(subset, key=lambda row: float(distances[row]))[:k]
    return sum(float(matches[row]) for row in nearest) / k


def brute_force(distances, matches, k):
    count = len(matches)
    values = torch.zeros(count, dtype=torch.float64)
    for row in range(count):
        others = [other for other in range(count) if other != row]
        for size in range(count):
            weight = math.factorial(size) * math.factorial(count - size - 1) / math.factorial(count)
            for subset in itertools.combinations(others, size):
                gain = value((*subset, row), distances, matches, k) - value(subset, distances, matches, k)
                values[row] += weight * gain
    return values


def expected(train, targets, train_labels, target_labels, k, distance="euclidean"):
    if distance == "cosine":
        train, targets = (x / x.norm(dim=1, keepdim=True) for x in (train, targets))
    columns = [
        brute_force((train - target).norm(dim=1), train_labels == label, k)
        for target, label in zip(targets, target_labels)
    ]
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("k", [1, 2, 5, 6, 9])
def test_equals_brute_force_on_inputs(k, distance):
    train = (torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 2, 1, 0]))
    targets = (torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0]))
    attribution = KNNShapley(k=k, distance=distance, batch_size=4).fit(train).attribute(targets)
    scores = expected(train[0], targets[0], train[1], targets[1], k, distance)
    torch.testing.assert_close(attribution.scores.tensor(), scores, rtol=1e-10, atol=1e-12)
    assert attribution.info == {
        "method": "KNN-Shapley",
        "k": k,
        "distance": distance,
        "features": "inputs",
    }


def test_equals_brute_force_on_representations_averaged_over_checkpoints():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    checkpoints = [
        {name: torch.randn_like(value) for name, value in model.state_dict().items()} for _ in range(2)
    ]
    train = (torch.randn(6, 3, dtype=torch.float64), torch.randint(2, (6,)))
    targets = (torch.randn(3, 3, dtype=torch.float64), torch.randint(2, (3,)))
    fitted = KNNShapley(k=2, model=model, task="image_classification", batch_size=4).fit(train, checkpoints)
    total = 0
    for state in checkpoints:
        model.load_state_dict(state)
        with torch.no_grad():
            one, other = model[:2](train[0]), model[:2](targets[0])
        total = total + expected(one, other, train[1], targets[1], 2) / 2
    torch.testing.assert_close(fitted.attribute(targets).scores.tensor(), total, rtol=1e-10, atol=1e-12)


def test_scores_add_up_to_the_vote_and_blocks_of_targets_do_not_matter(monkeypatch):
    train = (torch.randn(50, 3), torch.randint(3, (50,)))
    targets = (torch.randn(20, 3), torch.randint(3, (20,)))
    fitted = KNNShapley(k=7).fit(train)
    scores = fitted.attribute(targets).scores.tensor()
    nearest = torch.cdist(targets[0], train[0]).topk(7, largest=False).indices
    vote = (train[1][nearest] == targets[1][:, None]).double().mean(1)
    torch.testing.assert_close(scores.sum(0).double(), vote, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr("trak.methods.knn_shapley._BLOCK_PAIRS", 150)
    assert torch.equal(fitted.attribute(targets).scores.tensor(), scores)


def test_labels_and_images_of_integers_in_mappings():
    pixels = torch.randint(256, (6, 1, 2, 2), dtype=torch.uint8)
    data = {"pixels": pixels, "kind": torch.tensor([0, 1, 0, 1, 0, 1])}
    method = KNNShapley(
        k=2, transform=lambda batch: batch["pixels"].double(), labels=lambda batch: batch["kind"]
    )
    flat = pixels.double().flatten(1)
    scores = expected(flat, flat, data["kind"], data["kind"], 2)
    torch.testing.assert_close(method.fit(data).attribute(data).scores.tensor(), scores)
    plain = KNNShapley(k=2).fit((pixels, data["kind"])).attribute((pixels, data["kind"]))
    torch.testing.assert_close(plain.scores.tensor(), scores.float())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k must be"),
        ({"distance": "dot"}, '"cosine"; got'),
        ({"layer": "0"}, "needs the model"),
        ({"model": nn.Linear(3, 2)}, "needs a task"),
        ({"labels": lambda batch: batch[0]}, "integer class labels"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(trak.InputError, match=message):
        KNNShapley(**settings).fit((torch.randn(6, 3), torch.randint(2, (6,))))


def test_data_without_labels_or_of_another_size_are_refused():
    with pytest.raises(trak.InputError, match=r"train_set: .*labels="):
        KNNShapley().fit(torch.randn(6, 3))
    fitted = KNNShapley().fit((torch.randn(6, 3), torch.randint(2, (6,))))
    with pytest.raises(trak.InputError, match="3 numbers and targets 2"):
        fitted.attribute((torch.randn(4, 2), torch.randint(2, (4,))))
