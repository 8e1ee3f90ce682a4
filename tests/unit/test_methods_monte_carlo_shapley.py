"""Monte Carlo Shapley values against the definition over all subsets."""

import itertools
import math

import pytest
import torch
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import LinearSVC

import trak
from trak.methods.monte_carlo_shapley import (
    TruncatedMonteCarloShapley,
    estimator_utility,
    permutation_values,
)


def exact_values(utility, count):
    """Σ over subsets without i of |S|! (N − |S| − 1)! / N! · (v(S ∪ i) − v(S))."""
    values = torch.zeros(count, len(utility(torch.arange(0))), dtype=torch.float64)
    for row in range(count):
        others = [other for other in range(count) if other != row]
        for size in range(count):
            share = math.factorial(size) * math.factorial(count - size - 1) / math.factorial(count)
            for subset in itertools.combinations(others, size):
                with_row = torch.tensor(sorted((*subset, row)))
                gain = utility(with_row) - utility(torch.tensor(subset, dtype=torch.int64))
                values[row] += share * gain
    return values


def game(count=4, targets=3):
    """A utility of any kind: a number drawn for each subset."""
    table = torch.randn(2**count, targets, dtype=torch.float64)
    return lambda rows: table[int((2**rows).sum())]


def test_all_orders_give_the_shapley_values():
    utility = game()
    orders = [torch.tensor(order) for order in itertools.permutations(range(4))]
    values, _ = permutation_values(utility, orders, 4, tolerance=0.0)
    torch.testing.assert_close(values, exact_values(utility, 4), rtol=1e-10, atol=1e-12)


def test_sampled_orders_come_near_with_the_error_they_state():
    utility = game()
    method = TruncatedMonteCarloShapley(train=lambda rows, targets: utility(rows), permutations=2000)
    attribution = method.fit(torch.zeros(4, 1)).attribute(torch.zeros(3, 1))
    difference = attribution.scores.tensor() - exact_values(utility, 4)
    stated = attribution.info["standard_error"]
    assert 0 < stated < 0.1
    # Twelve errors of one standard error each, in the mean of squares.
    assert 0.3 * stated < float(difference.square().mean().sqrt()) < 2 * stated
    # Efficiency holds for every order.
    everything = utility(torch.arange(4)) - utility(torch.arange(0))
    torch.testing.assert_close(attribution.scores.tensor().sum(0), everything)
    assert attribution.info["num_trainings"] == 2000 * 3 + 1


def test_chains_are_cut_where_nothing_is_left_to_gain():
    sizes = []

    def utility(rows):
        sizes.append(len(rows))
        return torch.full((2,), min(len(rows), 3) / 3, dtype=torch.float64)

    values, _ = permutation_values(utility, [torch.arange(50), torch.arange(50).flip(0)], 50, tolerance=0.01)
    assert max(sizes[2:]) == 3 and len(sizes) == 2 + 6
    expected = torch.zeros(50, dtype=torch.float64)
    expected[[0, 1, 2, 47, 48, 49]] = 1 / 6
    torch.testing.assert_close(values, expected[:, None].expand(50, 2))


@pytest.mark.parametrize(
    "estimator", [LogisticRegression(), KNeighborsClassifier(1), LinearSVC(), LinearRegression()]
)
def test_estimators_equal_the_definition(estimator):
    # Every subset's model is fitted once, for orders and definition alike.
    inputs = torch.randn(5, 2, dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 2, 0])
    if isinstance(estimator, LinearRegression):
        labels = labels.double()
    train, targets = (inputs, labels), (torch.randn(3, 2, dtype=torch.float64), labels[:3])
    compute = estimator_utility(
        estimator, *[tuple(part.numpy() for part in data) for data in (train, targets)]
    )
    kept = {}

    def utility(rows):
        key = tuple(rows.tolist())
        if key not in kept:
            kept[key] = compute(rows).double()
        return kept[key]

    orders = [torch.tensor(order) for order in itertools.permutations(range(5))]
    found, _ = permutation_values(utility, orders, 5, tolerance=0.0)
    torch.testing.assert_close(found, exact_values(utility, 5), rtol=1e-8, atol=1e-10)
    method = TruncatedMonteCarloShapley(estimator=estimator, permutations=4, seed=3)
    scores = method.fit(train).attribute(targets).scores.tensor()
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randperm(5, generator=generator) for _ in range(4)]
    expected, _ = permutation_values(utility, drawn, 5, tolerance=0.0)
    torch.testing.assert_close(scores, expected, rtol=1e-8, atol=1e-10)


def test_utilities_of_few_examples():
    import numpy as np

    train = (np.zeros((4, 1)), np.array([0, 1, 2, 2]))
    targets = (np.zeros((2, 1)), np.array([2, 7]))
    utility = estimator_utility(LogisticRegression(), train, targets)
    assert utility(torch.arange(0)).tolist() == [1 / 3, 0]
    assert utility(torch.tensor([2, 3])).tolist() == [1, 0]
    assert utility(torch.tensor([0, 1])).tolist() == [0, 0]
    squared = estimator_utility(LinearRegression(), train, targets)
    assert squared(torch.arange(0)).tolist() == [-4, -49]


DATA = (torch.randn(6, 2), torch.randint(2, (6,)))


@pytest.mark.parametrize(
    ("settings", "data", "message"),
    [
        ({}, DATA, "either estimator="),
        ({"estimator": LogisticRegression(), "train": print}, DATA, "either estimator="),
        ({"estimator": LogisticRegression}, DATA, "an object and not a class"),
        ({"estimator": LogisticRegression()}, [1, 2], "tensors \\(inputs, labels\\)"),
        ({"estimator": LogisticRegression()}, (DATA[0], DATA[0]), "one label for each input"),
        ({"train": print, "permutations": 0}, DATA, "permutations must be"),
        ({"train": print, "tolerance": -1.0}, DATA, "tolerance must be"),
    ],
)
def test_wrong_settings_are_refused(settings, data, message):
    with pytest.raises(trak.InputError, match=message):
        TruncatedMonteCarloShapley(**settings).fit(data)


def test_utilities_are_checked():
    def attribute(values):
        method = TruncatedMonteCarloShapley(train=lambda rows, targets: values, permutations=1)
        return method.fit(DATA).attribute(DATA)

    with pytest.raises(trak.InputError, match="one utility for each of the 6 targets; got shape"):
        attribute(torch.zeros(3))
    with pytest.raises(trak.NonFiniteError, match="after training on 6 rows"):
        attribute([math.nan] * 6)
    assert attribute([1.0] * 6).info["standard_error"] is None
