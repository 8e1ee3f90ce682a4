"""Damping rules of ridge regression, against their definitions written out with N × N matrices."""

import pytest
import torch

from trak.errors import InputError
from trak.precondition import CrossValidationDamping, EffectiveDimensionDamping, EvidenceDamping
from trak.precondition.damping import GroupMoments
from trak.precondition.data_driven import Spectrum

N, K = 40, 6


def data(noise, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(N, K, generator=generator, dtype=torch.float64)
    outputs = features @ torch.randn(K, generator=generator, dtype=torch.float64)
    return features, outputs + noise * torch.randn(N, generator=generator, dtype=torch.float64)


def moments(features, outputs):
    return GroupMoments(features.T @ features, features.T @ outputs, N, float(outputs.square().sum()))


def hat(features, damping):
    return features @ torch.linalg.solve(
        features.T @ features + damping * torch.eye(K, dtype=torch.float64), features.T
    )


def test_criteria_are_their_definitions():
    features, outputs = data(noise=1.0)
    spectrum, eye = Spectrum.of(moments(features, outputs)), torch.eye(N, dtype=torch.float64)
    grid = torch.tensor([0.03, 1.0, 50.0], dtype=torch.float64)
    for index, damping in enumerate(grid):
        h = hat(features, damping)
        gcv = ((eye - h) @ outputs).square().sum() / (1 - h.trace() / N) ** 2
        torch.testing.assert_close(CrossValidationDamping().criterion(spectrum, grid)[index], gcv)
        covariance = features @ features.T / damping + eye
        noise = outputs @ torch.linalg.solve(covariance, outputs) / N
        evidence = N * noise.log() + torch.logdet(covariance)
        torch.testing.assert_close(EvidenceDamping().criterion(spectrum, grid)[index], evidence)
        torch.testing.assert_close(spectrum.effective_dimension(grid)[index], h.trace())


@pytest.mark.parametrize("rule", [CrossValidationDamping(), EvidenceDamping()])
def test_noise_asks_for_more_damping(rule):
    chosen = [rule.value(moments(*data(noise))) for noise in (0.1, 1.0, 10.0)]
    assert chosen == sorted(chosen) and chosen[0] < 0.1 * chosen[-1]


@pytest.mark.parametrize("rule", [CrossValidationDamping(), EvidenceDamping(), EffectiveDimensionDamping(3)])
def test_damping_scales_with_the_features(rule):
    # λ has the units of the Gram matrix.
    features, outputs = data(noise=1.0)
    assert rule.value(moments(10 * features, outputs)) == pytest.approx(
        100 * rule.value(moments(features, outputs))
    )


def test_effective_dimension_is_met():
    features, outputs = data(noise=1.0)
    damping = EffectiveDimensionDamping(2.5).value(moments(features, outputs))
    assert float(hat(features, damping).trace()) == pytest.approx(2.5, rel=0.05)


def test_refusals():
    with pytest.raises(InputError, match="dimension must be a positive number; got 0"):
        EffectiveDimensionDamping(0)
    with pytest.raises(InputError, match="features that are all zero"):
        EvidenceDamping().value(
            moments(torch.zeros(N, K, dtype=torch.float64), torch.ones(N, dtype=torch.float64))
        )


def test_rules_have_fingerprints_of_their_own():
    prints = [
        rule.fingerprint()
        for rule in (CrossValidationDamping(), EvidenceDamping(), EffectiveDimensionDamping())
    ]
    assert len({tuple(p.items()) for p in prints}) == 3
