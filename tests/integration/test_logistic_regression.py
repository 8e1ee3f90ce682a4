"""TRAK on logistic regression, where everything can be written down (Pregibon 1981, "Logistic Regression Diagnostics")."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from torch import nn

import trak

N, D = 80, 4


class Logistic(nn.Module):
    """One logit per example, no intercept."""

    def __init__(self, coefficients):
        super().__init__()
        self.coefficients = nn.Parameter(torch.as_tensor(coefficients, dtype=torch.float64).reshape(-1))

    def forward(self, x):
        return x @ self.coefficients


def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, D))
    y = (rng.random(N) < 1 / (1 + np.exp(-x @ np.array([1.0, -2.0, 0.5, 0.0])))).astype(int)
    return x, y


def fitted(x, y):
    return LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-12, max_iter=1000).fit(x, y).coef_[0]


def scores_at(coefficients, x, y, targets, **options):
    rows = (torch.tensor(x), torch.tensor(y))
    method = trak.TRAK(
        model=Logistic(coefficients),
        task="image_classification",
        projection=trak.Identity(),
        damping=0.0,
        gradients="functional",
        **{"gram": "uniform", "weight_exponent": 1.0, **options},
    )
    return method.fit(rows).attribute(targets).scores.tensor()


def newton_steps(coefficients, x, y):
    """Change of the coefficients when row i comes in, by one Newton step without the leverage: (XᵀRX)⁻¹ x_i (y_i − p_i), [N, D]."""
    p = 1 / (1 + np.exp(-x @ coefficients))
    hessian = x.T @ (x * (p * (1 - p))[:, None])
    return np.linalg.solve(hessian, (x * (y - p)[:, None]).T).T


def test_is_the_newton_step_where_all_probabilities_are_equal():
    # The paper drops R = p(1 − p) from the Hessian. At θ = 0 it is 1/4 for every row, so the two differ by that factor exactly.
    x, y = data()
    rng = np.random.default_rng(1)
    targets = (torch.tensor(rng.normal(size=(5, D))), torch.tensor([0, 1, 1, 0, 1]))
    sign = 2 * targets[1].numpy() - 1
    expected = newton_steps(np.zeros(D), x, y) @ (targets[0].numpy() * sign[:, None]).T
    np.testing.assert_allclose(scores_at(np.zeros(D), x, y, targets), expected / 4, rtol=1e-10)


def test_is_the_papers_step_at_the_fitted_coefficients():
    x, y = data()
    theta = fitted(x, y)
    targets = (torch.tensor(x[:6]), torch.tensor(y[:6]))
    s = 2 * y - 1
    p_correct = 1 / (1 + np.exp(-s * (x @ theta)))
    kernel = (x * s[:, None]) @ np.linalg.solve(x.T @ x, (x[:6] * s[:6, None]).T)
    np.testing.assert_allclose(scores_at(theta, x, y, targets), kernel * (1 - p_correct)[:, None], rtol=1e-8)


def test_is_the_textbooks_step_with_the_logistic_gram():
    x, y = data()
    theta = fitted(x, y)
    z = np.random.default_rng(2).normal(size=(6, D))
    targets = (torch.tensor(z), torch.ones(6, dtype=torch.int64))
    newton = newton_steps(theta, x, y) @ z.T
    np.testing.assert_allclose(scores_at(theta, x, y, targets, gram="logistic"), newton, rtol=1e-8)
    # Pregibon's one-step estimate of leaving row i out divides by 1 − h_i, the leverage of the weighted regression.
    p = 1 / (1 + np.exp(-x @ theta))
    r = p * (1 - p)
    leverage = r * np.einsum("ni,ij,nj->n", x, np.linalg.inv(x.T @ (x * r[:, None])), x)
    corrected = scores_at(theta, x, y, targets, gram="logistic", leverage_correction=True)
    np.testing.assert_allclose(corrected, newton / (1 - leverage)[:, None], rtol=1e-8)
    change = np.stack([(theta - fitted(np.delete(x, i, 0), np.delete(y, i))) @ z.T for i in range(N)])

    def error(scores):
        return np.linalg.norm(np.asarray(scores) - change) / np.linalg.norm(change)

    assert error(corrected) < 0.1 < error(scores_at(theta, x, y, targets))


def test_predicts_true_leave_one_out_retraining():
    x, y = data()
    theta = fitted(x, y)
    rng = np.random.default_rng(2)
    z = rng.normal(size=(6, D))
    targets = (torch.tensor(z), torch.ones(6, dtype=torch.int64))
    scores = scores_at(theta, x, y, targets).numpy()
    change = np.stack([(theta - fitted(np.delete(x, i, 0), np.delete(y, i))) @ z.T for i in range(N)])
    correlation = np.array([spearmanr(scores[:, t], change[:, t]).statistic for t in range(6)])
    # Not 1, because the paper's step leaves R and the leverage out.
    assert correlation.min() > 0.85, correlation
    assert correlation.mean() > 0.93, correlation
    newton = newton_steps(theta, x, y) @ z.T
    assert np.corrcoef(newton.ravel(), change.ravel())[0, 1] > 0.98


def test_regression_is_the_leave_one_out_formula_of_least_squares():
    # θ − θ_(−i) = (XᵀX)⁻¹ x_i (y_i − ŷ_i) / (1 − h_i): TRAK with f = ŷ and q = y − ŷ is this without the leverage h_i.
    rng = np.random.default_rng(3)
    x = rng.normal(size=(40, 3))
    y = x @ [1.0, 2.0, 3.0] + rng.normal(size=40)
    theta = np.linalg.lstsq(x, y, rcond=None)[0]
    z = rng.normal(size=(4, 3))
    attribution = trak.attribute(
        Logistic(theta),
        (torch.tensor(x), torch.tensor(y)),
        (torch.tensor(z), torch.zeros(4, dtype=torch.float64)),
        task="regression",
        projection=trak.Identity(),
        damping=0.0,
        gradients="functional",
    )
    leverage = np.einsum("ni,ij,nj->n", x, np.linalg.inv(x.T @ x), x)
    left_out = np.stack(
        [
            (theta - np.linalg.lstsq(np.delete(x, i, 0), np.delete(y, i), rcond=None)[0]) @ z.T
            for i in range(40)
        ]
    )
    np.testing.assert_allclose(
        np.asarray(attribution.scores, dtype=np.float64) / (1 - leverage)[:, None],
        left_out,
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.parametrize("damping", [0.0, 1.0])
def test_self_influence_is_the_leverage_times_the_weight(damping):
    x, y = data()
    theta = fitted(x, y)
    attribution = trak.attribute(
        Logistic(theta),
        (torch.tensor(x), torch.tensor(y)),
        (torch.tensor(x), torch.tensor(y)),
        task="image_classification",
        projection=trak.Identity(),
        damping=damping,
        weight_exponent=1,
        gram="uniform",
        gradients="functional",
    )
    leverage = np.einsum("ni,ij,nj->n", x, np.linalg.inv(x.T @ x + damping * np.eye(D)), x)
    p_correct = 1 / (1 + np.exp(-(2 * y - 1) * (x @ theta)))
    np.testing.assert_allclose(attribution.self_influence(), leverage * (1 - p_correct), rtol=1e-8)
