"""Retraining without the highest-scored rows, on models whose answer is known."""

import numpy as np
import pytest
import torch

from trak import InputError, NonFiniteError
from trak.evaluation import removal_curve

N, T = 30, 4


class Additive:
    """f_t = the sum of the effects of the kept rows, plus noise that the seed alone decides."""

    def __init__(self, noise: float = 0.0) -> None:
        self.effects = np.random.default_rng(0).normal(size=(N, T))
        self.noise = noise
        self.calls: list[tuple[list[int], int]] = []

    def __call__(self, indices: torch.Tensor, seed: int) -> torch.Tensor:
        assert indices.dtype == torch.int64
        self.calls.append((indices.tolist(), seed))
        noise = np.random.default_rng([seed, len(indices)]).normal(size=T)
        return torch.from_numpy(self.effects[indices.numpy()].sum(axis=0) + self.noise * noise)


def test_changes_are_minus_the_effects_of_the_removed_rows() -> None:
    train = Additive()
    other = np.random.default_rng(1).normal(size=(N, T))
    result = removal_curve(train, {"right": train.effects, "other": other}, k=[5, 2], num_seeds=2)
    assert result.k == (2, 5)
    np.testing.assert_allclose(result.full_outputs, np.tile(train.effects.sum(axis=0), (2, 1)))
    for name, scores in (("right", train.effects), ("other", other)):
        for index, k in enumerate((2, 5)):
            top = np.argsort(-scores, axis=0)[:k]
            expected = -np.take_along_axis(train.effects, top, axis=0).sum(axis=0)
            np.testing.assert_allclose(
                result.curves[name].changes[index], np.tile(expected, (2, 1)), atol=1e-12
            )
            estimate = result.curves[name].estimates[k]
            assert estimate.mean == pytest.approx(expected.mean())
            assert estimate.low <= estimate.mean <= estimate.high
    means = {name: curve.estimates[5].mean for name, curve in result.curves.items()}
    assert means["right"] < min(means["other"], means["random"])
    assert "right: k=2:" in str(result)


def test_each_model_is_trained_once_with_rising_rows_and_common_seeds() -> None:
    train = Additive()
    result = removal_curve(train, {"a": train.effects}, k=[1, 3], targets=[2, 0], num_seeds=2, seed=10)
    # 2 seeds × (all rows + 2 sizes × (2 targets × 1 method + random)).
    assert result.num_trainings == len(train.calls) == 2 * (1 + 2 * (2 + 1))
    assert {seed for _, seed in train.calls} == {10, 11}
    assert all(rows == sorted(set(rows)) for rows, _ in train.calls)
    assert sorted({len(rows) for rows, _ in train.calls}) == [N - 3, N - 1, N]
    assert result.targets.tolist() == [2, 0]
    expected = -np.array([train.effects[:, 2].max(), train.effects[:, 0].max()])
    np.testing.assert_allclose(result.curves["a"].changes[0, 0], expected, atol=1e-12)


def test_random_removal_is_nested_differs_by_seed_and_serves_all_targets() -> None:
    train = Additive()
    result = removal_curve(train, {"a": train.effects}, k=[2, 6], targets=[1], num_seeds=3)
    removed = [set(range(N)) - set(rows) for rows, _ in train.calls[-6:]]
    for small, large in zip(removed[::2], removed[1::2]):
        assert len(small) == 2
        assert len(large) == 6
        assert small < large
    assert len({frozenset(one) for one in removed}) == 6
    for seed, rows in enumerate(removed[::2]):
        change = -train.effects[sorted(rows), 1].sum()
        assert result.curves["random"].changes[0, seed, 0] == pytest.approx(change)
    assert "random" not in removal_curve(train, {"a": train.effects}, k=1, random=False).curves


def test_the_interval_resamples_targets_and_seeds() -> None:
    train = Additive(noise=3.0)
    result = removal_curve(train, {"a": train.effects}, k=4, num_seeds=5, num_bootstrap=4000)
    changes, estimate = result.curves["a"].changes[0], result.curves["a"].estimates[4]
    generator, samples = np.random.default_rng(7), []
    for _ in range(4000):
        seeds, targets = generator.integers(0, 5, 5), generator.integers(0, T, T)
        samples.append(changes[seeds][:, targets].mean())
    low, high = np.quantile(samples, [0.025, 0.975])
    width = high - low
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=0.1 * width)
    again = removal_curve(train, {"a": train.effects}, k=4, num_seeds=5, num_bootstrap=4000)
    assert again.curves["a"].estimates == result.curves["a"].estimates


def test_one_seed_and_one_target_have_no_interval() -> None:
    train = Additive()
    estimate = (
        removal_curve(train, {"a": train.effects}, k=1, targets=[0], num_seeds=1).curves["a"].estimates[1]
    )
    assert estimate.mean == pytest.approx(-train.effects[:, 0].max())
    assert np.isnan(estimate.low)
    assert np.isnan(estimate.high)


def test_progress_counts_every_training(capfd) -> None:
    train = Additive()
    removal_curve(train, {"a": train.effects}, k=1, num_seeds=1, progress=True)
    assert "6/6" in capfd.readouterr().err
    removal_curve(train, {"a": train.effects}, k=1, num_seeds=1, progress=False)
    assert capfd.readouterr().err == ""


def test_what_is_refused() -> None:
    train = Additive()
    scores = {"a": train.effects}
    with pytest.raises(InputError, match="train must be a function"):
        removal_curve(None, scores, k=1)
    with pytest.raises(InputError, match="scores must be a mapping from method names"):
        removal_curve(train, train.effects, k=1)
    with pytest.raises(InputError, match="A method is named 'random'"):
        removal_curve(train, {"random": train.effects}, k=1)
    with pytest.raises(InputError, match=r"got shapes \{'a': \[30, 4\], 'b': \[30, 3\]\}"):
        removal_curve(train, {"a": train.effects, "b": train.effects[:, 1:]}, k=1)
    with pytest.raises(InputError, match="nothing would be left of the 30 training rows"):
        removal_curve(train, scores, k=[1, N])
    with pytest.raises(InputError, match=r"targets must lie in \[0, 4\)"):
        removal_curve(train, scores, k=1, targets=[4])
    with pytest.raises(InputError, match="num_seeds must be an integer of at least 1"):
        removal_curve(train, scores, k=1, num_seeds=0)
    assert not train.calls, "arguments are checked before anything is trained"


def test_outputs_of_train_are_checked() -> None:
    scores = {"a": np.random.default_rng(0).normal(size=(N, T))}
    with pytest.raises(
        InputError, match=r"train\(indices of 30 rows, seed=0\) must return one output for each of the 4"
    ):
        removal_curve(lambda indices, seed: np.zeros(T + 1), scores, k=1)
    with pytest.raises(InputError, match="got dtype object"):
        removal_curve(lambda indices, seed: None, scores, k=1)
    with pytest.raises(NonFiniteError, match="returned inf for target 2"):
        removal_curve(lambda indices, seed: np.array([0, 1, np.inf, 2]), scores, k=1)
