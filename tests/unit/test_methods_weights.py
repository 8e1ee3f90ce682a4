"""The weights of training examples: exponents, trajectories, and what they refuse."""

import pytest
import torch
from torch import nn

import trak
from trak.methods.weights import flattened, resolve_exponent


def make(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


generator = torch.Generator().manual_seed(0)
TRAIN = (
    torch.randn(30, 5, generator=generator, dtype=torch.float64),
    torch.randint(3, (30,), generator=generator),
)
TARGETS = torch.randn(4, 5, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
CHECKPOINTS = [make(seed).state_dict() for seed in range(6)]


def fit(checkpoints=CHECKPOINTS[:2], **options):
    method = trak.TRAK(
        model=make(9), task="image_classification", projection=trak.Identity(), damping=0.1, **options
    )
    return method.fit(TRAIN, checkpoints)


def loss_weights(checkpoint):
    model = make(9)
    model.load_state_dict(checkpoint)
    return 1 - model(TRAIN[0]).softmax(1).detach()[torch.arange(30), TRAIN[1]]


def test_exponents_raise_the_weights_of_each_checkpoint():
    q = torch.stack([loss_weights(checkpoint) for checkpoint in CHECKPOINTS[:2]])
    for exponent, expected in {
        None: q.sqrt().mean(0),
        1: q.mean(0),
        0: torch.ones(30),
        0.3: (q**0.3).mean(0),
    }.items():
        attribution = fit(weight_exponent=exponent).attribute(TARGETS)
        torch.testing.assert_close(attribution.weights.double(), expected.double(), rtol=1e-5, atol=1e-6)
    plain, flat = (
        fit(weight_exponent=exponent, gram="uniform").attribute(TARGETS).scores.tensor()
        for exponent in (1, 0)
    )
    torch.testing.assert_close(plain, flat * q.mean(0)[:, None], rtol=1e-5, atol=1e-8)


def test_signs_of_weights_stay():
    torch.testing.assert_close(flattened(torch.tensor([-4.0, 0.0, 9.0]), 0.5), torch.tensor([-2.0, 0.0, 3.0]))


def test_default_exponent_is_the_square_root_for_probabilities_only():
    known = {
        "image_classification": 0.5,
        "text_classification": 0.5,
        "regression": 1.0,
    }
    for task, exponent in known.items():
        assert resolve_exponent(None, trak.tasks.resolve_task(task)) == exponent
    tasks = trak.tasks
    assert resolve_exponent(None, tasks.ImageClassification(temperature=2.0)) == 1.0
    assert resolve_exponent(None, tasks.CustomTask(lambda model, batch: model(batch))) == 0.5
    assert (
        resolve_exponent(None, tasks.CustomTask(lambda model, batch: model(batch), weight=torch.tanh)) == 1.0
    )

    class OwnWeights(tasks.Task):
        def output(self, model, batch):
            return model(batch)

        def loss_weight(self, outputs):
            return -outputs

    assert resolve_exponent(None, OwnWeights()) == 1.0
    assert resolve_exponent(None, tasks.resolve_task("image_classification"), has_trajectories=True) == 1.0
    assert resolve_exponent(0, OwnWeights()) == 0.0


def test_trajectories_average_the_weights_of_each_run():
    runs = [[CHECKPOINTS[2], CHECKPOINTS[3]], []]
    q = [loss_weights(checkpoint) for checkpoint in CHECKPOINTS]
    fitted = fit(trajectories=runs, gram="uniform")
    expected = ((q[0] + q[2] + q[3]) / 3 + q[1]) / 2
    attribution = fitted.attribute(TARGETS)
    torch.testing.assert_close(attribution.weights.double(), expected, rtol=1e-5, atol=1e-6)
    assert attribution.info["trajectories"] == [2, 0]
    # The kernel is that of the ensemble alone.
    flat = fit(weight_exponent=0, gram="uniform").attribute(TARGETS).scores.tensor()
    torch.testing.assert_close(attribution.scores.tensor(), flat * expected[:, None], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_along_a_run_under_another_default_dtype(dtype):
    options = {"trajectories": [CHECKPOINTS[:2]], "checkpoints": CHECKPOINTS[2:3]}
    expected = fit(**options).weights
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(fit(**options).weights[0], expected[0])
    finally:
        torch.set_default_dtype(torch.float32)


def test_self_influence_has_the_same_weights():
    attribution = fit(trajectories=[[CHECKPOINTS[2]], [CHECKPOINTS[3]]], leverage_correction=True).attribute(
        TRAIN
    )
    torch.testing.assert_close(
        attribution.self_influence(), attribution.scores.tensor().diagonal().double(), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("exponent", [1, 0.5])
def test_logistic_gram_and_leverage_against_dense_algebra(exponent):
    model = make(9)
    model.load_state_dict(CHECKPOINTS[0])

    def gradients(data):
        rows = []
        for x, y in zip(*data):
            logits = model(x)
            f = logits[y] - torch.cat([logits[:y], logits[y + 1 :]]).logsumexp(0)
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(f, list(model.parameters()))]))
        return torch.stack(rows)

    train, targets, q = gradients(TRAIN), gradients(TARGETS), loss_weights(CHECKPOINTS[0])
    r = (q * (1 - q)) ** exponent
    inverse = torch.linalg.inv(
        train.T @ (train * r[:, None]) + 0.1 * torch.eye(train.shape[1], dtype=torch.float64)
    )
    leverage = r * torch.einsum("ni,ij,nj->n", train, inverse, train)
    expected = train @ inverse @ targets.T * (q**exponent / (1 - leverage))[:, None]
    fitted = fit(CHECKPOINTS[:1], weight_exponent=exponent, gram="logistic", leverage_correction=True)
    torch.testing.assert_close(
        fitted.attribute(TARGETS).scores.tensor().double(), expected, rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_exponent": -1}, "weight_exponent must be a number ≥ 0"),
        ({"weight_exponent": "half"}, "weight_exponent must be a number ≥ 0"),
        ({"gram": "fisher"}, 'gram must be "uniform" or "logistic"'),
        ({"trajectories": [[]]}, "list of 2 lists of earlier checkpoints.*got 1 of them"),
        ({"trajectories": [CHECKPOINTS[2], []]}, r"trajectories\[0\] must be a list of checkpoints; got"),
        ({"trajectories": 3}, "list of 2 lists.*got int"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(trak.InputError, match=message):
        fit(**options)


def test_a_model_that_is_certain_of_every_row_has_scores():
    certain = {name: 1e4 * value for name, value in CHECKPOINTS[0].items()}
    weights = loss_weights(certain)
    assert bool((weights * (1 - weights) == 0).all())
    method = trak.TRAK(model=make(9), task="image_classification", projection=trak.Identity())
    assert method.fit(TRAIN, [certain]).attribute(TARGETS).scores.tensor().isfinite().all()


def test_logistic_gram_is_the_default_for_probabilities():
    for gram, same in (("logistic", True), ("uniform", False)):
        given, default = (fit(gram=word).attribute(TARGETS).scores.tensor() for word in (gram, None))
        assert torch.equal(given, default) == same


def test_papers_formula_through_attribute():
    paper = fit(gram="uniform", weight_exponent=1).attribute(TARGETS)
    called = trak.attribute(
        make(9),
        TRAIN,
        TARGETS,
        task="image_classification",
        checkpoints=CHECKPOINTS[:2],
        projection=trak.Identity(),
        damping=0.1,
        gram="uniform",
        weight_exponent=1,
    )
    assert torch.equal(paper.scores.tensor(), called.scores.tensor())
    assert paper.info["gram"] == "uniform" and paper.info["weight_exponent"] == 1


def test_logistic_gram_is_for_probabilities():
    with pytest.raises(trak.InputError, match='gram="logistic" needs a task whose weights are q = 1 − p'):
        trak.TRAK(model=nn.Linear(5, 1).double(), task="regression", gram="logistic").fit(
            (TRAIN[0], TRAIN[0].sum(1))
        )
