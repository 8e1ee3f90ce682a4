"""Influence functions against dense inverses and against retraining."""

import pytest
import torch
from torch import nn

import trak
from trak.methods.influence_function import InfluenceFunction, conjugate_gradients

N, T, LAMBDA = 30, 4, 0.05


def make(kind, count=2):
    model = {
        "logistic": nn.Linear(3, 1),
        "regression": nn.Linear(3, 1),
        "classifier": nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)),
    }[kind].double()
    checkpoints = [
        {name: value + 0.3 * torch.randn_like(value) for name, value in model.state_dict().items()}
        for _ in range(count)
    ]
    sets = []
    for n in (N, T):
        inputs = torch.randn(n, 3, dtype=torch.float64)
        labels = {
            "logistic": torch.randint(2, (n,)),
            "regression": torch.randn(n, dtype=torch.float64),
            "classifier": torch.randint(3, (n,)),
        }[kind]
        sets.append((inputs, labels))
    task = "regression" if kind == "regression" else "image_classification"
    return model, *sets, checkpoints, task


def hessian_of(function):
    return torch.func.jacrev(torch.func.jacrev(function))


def damping_of(kind, hessian):
    # Far from a minimum the Hessian of a network has negative eigenvalues.
    return 1.0 if kind == "classifier" and hessian == "exact" else LAMBDA


def losses(kind, logits, labels):
    if kind == "logistic":
        return nn.functional.binary_cross_entropy_with_logits(logits[:, 0], labels.double(), reduction="none")
    if kind == "regression":
        return 0.5 * (logits[:, 0] - labels) ** 2
    return nn.functional.cross_entropy(logits, labels, reduction="none")


def outputs(kind, logits, labels):
    if kind == "regression":
        return logits[:, 0]
    if kind == "logistic":
        return logits[:, 0] * (2 * labels - 1)
    p = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    return torch.log(p / (1 - p))


def dense(kind, model, train, targets, checkpoints, hessian):
    """−1/(M N) Σ ∇f (H + λI)⁻¹ ∇L by torch.func on flat parameters and torch.linalg.solve."""
    total = 0
    shapes = {name: value.shape for name, value in model.state_dict().items()}

    def logits(theta, x):
        parts = theta.split([shape.numel() for shape in shapes.values()])
        weights = {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts)}
        return torch.func.functional_call(model, weights, (x,))

    def loss(theta):
        return losses(kind, logits(theta, train[0]), train[1])

    def f(theta, data):
        return outputs(kind, logits(theta, data[0]), data[1])

    for state in checkpoints:
        theta = torch.cat([value.flatten() for value in state.values()])
        jacobian = torch.func.jacrev(f)
        if hessian == "exact":
            H = hessian_of(lambda theta: loss(theta).mean())(theta)
        else:
            p = torch.sigmoid(f(theta, train))
            curvature = torch.ones(N, dtype=torch.float64) if kind == "regression" else p * (1 - p)
            own = jacobian(theta, train)
            H = own.T @ (curvature[:, None] * own) / N
        damped = H + damping_of(kind, hessian) * torch.eye(len(theta), dtype=torch.float64)
        solved = torch.linalg.solve(damped, jacobian(theta, targets).T)
        total = total - torch.func.jacrev(loss)(theta) @ solved / N / len(checkpoints)
    return total


@pytest.mark.parametrize("hessian", ["gauss_newton", "exact"])
@pytest.mark.parametrize("kind", ["logistic", "regression", "classifier"])
def test_equals_the_dense_inverse(kind, hessian):
    model, train, targets, checkpoints, task = make(kind)
    damping = damping_of(kind, hessian)
    method = InfluenceFunction(
        model=model, task=task, damping=damping, hessian=hessian, tolerance=1e-10, batch_size=8
    )
    attribution = method.fit(train, checkpoints).attribute(targets)
    expected = dense(kind, model, train, targets, checkpoints, hessian)
    torch.testing.assert_close(attribution.scores.tensor(), expected, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(
        attribution.scores[4:9, [3, 1]], expected[4:9][:, [3, 1]], rtol=1e-7, atol=1e-10
    )


def test_the_two_matrices_are_one_where_f_is_linear():
    model, train, targets, checkpoints, task = make("logistic")
    scores = [
        InfluenceFunction(model=model, task=task, damping=0.1, hessian=hessian, tolerance=1e-10)
        .fit(train, checkpoints)
        .attribute(targets)
        .scores.tensor()
        for hessian in ("gauss_newton", "exact")
    ]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-7, atol=1e-10)


def fit_logistic(model, train, weights):
    """The minimiser of 1/N Σ w_i L_i + λ/2 ‖θ‖², by Newton's method."""
    flat = torch.zeros(4, dtype=torch.float64)

    def objective(theta):
        logits = train[0] @ theta[:3, None] + theta[3]
        return (weights * losses("logistic", logits, train[1])).sum() / N + LAMBDA / 2 * theta @ theta

    for _ in range(20):
        flat = flat - torch.linalg.solve(hessian_of(objective)(flat), torch.func.grad(objective)(flat))
    return {"weight": flat[None, :3], "bias": flat[3:]}


def test_predicts_what_retraining_without_an_example_does():
    model, train, targets, _, task = make("logistic")
    everything = torch.ones(N, dtype=torch.float64)
    minimiser = fit_logistic(model, train, everything)
    method = InfluenceFunction(model=model, task=task, damping=LAMBDA, tolerance=1e-10)
    scores = method.fit(train, [minimiser]).attribute(targets).scores.tensor()

    def f(state):
        return outputs("logistic", targets[0] @ state["weight"].T + state["bias"], targets[1])

    step = 1e-4
    for row in (0, 7, 20):
        weights = everything.clone()
        weights[row] -= step
        change = (f(minimiser) - f(fit_logistic(model, train, weights))) / step
        torch.testing.assert_close(change, scores[row], rtol=1e-3, atol=1e-7)


def test_indefinite_matrices_and_too_few_steps_are_refused():
    matrix = torch.diag(torch.tensor([3.0, 1.0, -0.5], dtype=torch.float64))
    rhs = torch.ones(2, 3, dtype=torch.float64)
    settings = {"tolerance": 1e-8, "max_iter": 10, "where": "checkpoint 1 of 1"}
    with pytest.raises(trak.SingularGramError, match="checkpoint 1 of 1: the damped Hessian is not positive"):
        conjugate_gradients(lambda v: v @ matrix, rhs, damping=0.1, **settings)
    solved = conjugate_gradients(lambda v: v @ matrix, rhs, damping=1.0, **settings)
    torch.testing.assert_close(solved, torch.tensor([[0.25, 0.5, 2.0]] * 2, dtype=torch.float64))
    with pytest.raises(trak.SingularGramError, match="in 2 steps"):
        conjugate_gradients(lambda v: v @ matrix, rhs, damping=1.0, **(settings | {"max_iter": 2}))
    zero = torch.zeros(1, 3, dtype=torch.float64)
    assert torch.equal(conjugate_gradients(lambda v: v @ matrix, zero, damping=1.0, **settings), zero)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hessian": "fisher"}, '"exact"; got'),
        ({"damping": -1.0}, "damping must be"),
        ({"tolerance": 0.0}, "tolerance must lie"),
        ({"projection": trak.Sparse(dim=4)}, "no projection"),
        ({"task": trak.ImageClassification(temperature=3.0)}, "no function of f alone"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    model, train, _, checkpoints, task = make("classifier")
    with pytest.raises(trak.InputError, match=message):
        InfluenceFunction(**({"model": model, "task": task} | settings)).fit(train, checkpoints)
