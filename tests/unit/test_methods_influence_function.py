"""Influence functions against dense inverses and against retraining."""

import pytest
import torch
from torch import nn

import trak
from trak.methods import gram
from trak.methods.conjugate_gradients import conjugate_gradients
from trak.methods.gradient_passes import start_passes
from trak.methods.influence_function import InfluenceFunction

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


@pytest.mark.parametrize("kind", ["logistic", "regression", "classifier"])
def test_the_span_of_the_gradients_gives_the_dense_inverse(kind):
    model, train, targets, checkpoints, task = make(kind)
    settings = {"damping": LAMBDA, "tolerance": 1e-10, "batch_size": 8, "space": "gradients"}
    method = InfluenceFunction(model=model, task=task, **settings)
    attribution = method.fit(train, checkpoints).attribute(targets)
    expected = dense(kind, model, train, targets, checkpoints, "gauss_newton")
    torch.testing.assert_close(attribution.scores.tensor(), expected, rtol=1e-6, atol=1e-9)
    assert attribution.info["space"] == "gradients"


def wide(count=1):
    """More parameters than examples, whose gradients are linearly independent: 20 → 8 → 3."""
    model = nn.Sequential(nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    states = [
        {name: value + 0.3 * torch.randn_like(value) for name, value in model.state_dict().items()}
        for _ in range(count)
    ]
    sets = [(torch.randn(n, 20, dtype=torch.float64), torch.randint(3, (n,))) for n in (N, T)]
    return model, *sets, states


@pytest.mark.parametrize("tolerance", [0.3, 1e-2, 1e-9])
def test_solves_take_the_same_steps_in_either_space(tolerance):
    # A loose tolerance stops early, where the solution depends on each step: the steps, not only their end, are the same.
    model, train, targets, checkpoints = wide(2)
    found = {
        space: InfluenceFunction(
            model=model,
            task="image_classification",
            damping=LAMBDA,
            tolerance=tolerance,
            batch_size=8,
            space=space,
        )
        .fit(train, checkpoints)
        .attribute(targets)
        for space in ("parameters", "gradients")
    }
    ours, reference = found["gradients"], found["parameters"]
    torch.testing.assert_close(ours.scores.tensor(), reference.scores.tensor(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(ours.weights, reference.weights)
    torch.testing.assert_close(ours.outputs, reference.outputs)


@pytest.mark.parametrize("rows_at_once", [1, 7, 29, 30, 100])
def test_blocks_of_any_size_give_one_gram_matrix(rows_at_once):
    model, train, _, checkpoints = wide()
    passes = start_passes(
        InfluenceFunction(model=model, task="image_classification", batch_size=4), train, checkpoints
    )
    (state,) = passes.states()
    span = gram.training_span(passes, state, where="here", rows_at_once=rows_at_once)
    own = passes.products(state, passes.train, label="training set")
    torch.testing.assert_close(span.root @ span.root.T, own.values @ own.values.T, rtol=1e-9, atol=1e-10)
    assert torch.equal(span.root, span.root.tril())
    torch.testing.assert_close(span.weights, own.weights)
    torch.testing.assert_close(span.outputs, own.outputs)
    # Coordinates keep inner products with the gradients, and lengths.
    vectors = torch.randn(T, own.values.shape[1], dtype=torch.float64)
    inside = span.coordinates(own.values @ vectors.T, vectors.square().sum(1))
    torch.testing.assert_close(inside[:, :N] @ span.root.T, vectors @ own.values.T, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(inside.norm(dim=1), vectors.norm(dim=1))


def test_blocks_follow_the_memory(monkeypatch):
    monkeypatch.setattr(gram, "available_memory", lambda: 4 * 10 * 1000)
    assert gram.block_rows(25, 1000) == 9  # three blocks of ten at the most: equal ones
    assert gram.block_rows(5, 1000) == 5
    assert gram.block_rows(5, 10**6) == 1
    monkeypatch.setattr(gram, "available_memory", lambda: None)
    assert gram.block_rows(25, 1000) == 25
    monkeypatch.setattr(gram, "available_memory", lambda: 1000)
    model, train, _, checkpoints = wide()
    method = InfluenceFunction(model=model, task="image_classification", space="gradients")
    with pytest.raises(trak.InputError, match=r'inner products of 30 .* use space="parameters"'):
        method.fit(train, checkpoints)


def test_gradients_without_a_span_are_refused():
    model, train, _, _ = wide()
    zero = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    # The hidden units give zero and get zero back: without the last bias nothing has a gradient.
    method = InfluenceFunction(
        model=model,
        task="image_classification",
        space="gradients",
        parameters=["0.*", "2.weight"],
        check=False,
    )
    with pytest.raises(trak.SingularGramError, match="all training gradients are zero"):
        method.fit(train, [zero])
    with pytest.raises(trak.SingularGramError, match="without a root"):
        gram._root(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 1e-7, "here")
    with pytest.raises(trak.NonFiniteError, match="float64"):
        gram._root(torch.full((2, 2), torch.inf), 1e-7, "here")


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
        ({"space": "targets"}, "space must be"),
        ({"space": "gradients", "hessian": "exact"}, "Gauss-Newton matrix and no other"),
        ({"space": "gradients", "save_dir": "somewhere"}, "leave out save_dir"),
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
