"""EK-FAC, Arnoldi and LiSSA against dense matrices, against each other and against the library's own inverses."""

import builtins
import math

import pytest
import torch
from torch import nn

import trak
from trak.methods.arnoldi import ArnoldiInfluence
from trak.methods.curvature import import_curvlinops, lent_loss
from trak.methods.ekfac import EKFACInfluence, find_layers, precondition
from trak.methods.gradient_passes import start_passes
from trak.methods.influence_function import InfluenceFunction
from trak.methods.lissa import LiSSAInfluence, draw_batch, lissa
from trak.methods.outer_products import OuterProducts
from trak.methods.samples import spread_rows
from trak.methods.whole_gradients import WholeGradients
from trak.projector import Projector
from trak.setting import prepare

N, T, LAMBDA = 24, 3, 0.05


def make(kind, count=2, **settings):
    model = {
        "logistic": nn.Linear(3, 1),
        "regression": nn.Linear(3, 1),
        "softmax": nn.Linear(3, 4),
        "two classes": nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
        "classifier": nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)),
        "images": nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3, bias=False)
        ),
    }[kind].double()
    checkpoints = [
        {name: value + 0.3 * torch.randn_like(value) for name, value in model.state_dict().items()}
        for _ in range(count)
    ]
    shape = (2, 4, 4) if kind == "images" else (3,)
    sets = []
    for n in (N, T):
        labels = torch.randint({"logistic": 2, "two classes": 2}.get(kind, 3), (n,))
        if kind == "regression":
            labels = torch.randn(n, dtype=torch.float64)
        sets.append((torch.randn(n, *shape, dtype=torch.float64), labels))
    task = "regression" if kind == "regression" else "image_classification"
    return {"model": model, "task": task, "batch_size": 7, **settings}, *sets, checkpoints


def scores(method, train, targets, checkpoints):
    return method.fit(train, checkpoints).attribute(targets).scores.tensor()


# EK-FAC


@pytest.mark.parametrize("factors", ["ekfac", "kfac"])
def test_kronecker_factors_are_exact_for_linear_regression(factors):
    # One output with constant curvature: the Gauss-Newton matrix is the inputs' second moment, one factor of size one.
    options, train, targets, checkpoints = make("regression")
    damping = trak.FixedDamping(LAMBDA)
    method = EKFACInfluence(**options, factors=factors, fisher="exact", damping=damping)
    attribution = method.fit(train, checkpoints).attribute(targets)
    exact = (
        InfluenceFunction(**options, damping=LAMBDA, tolerance=1e-12)
        .fit(train, checkpoints)
        .attribute(targets)
    )
    torch.testing.assert_close(attribution.scores.tensor(), exact.scores.tensor(), rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(attribution.weights, exact.weights)
    torch.testing.assert_close(attribution.outputs, exact.outputs)


@pytest.mark.parametrize("exponent", [0.5, 0.0, None])
def test_weights_have_the_exponent_asked_for(exponent):
    options, train, targets, checkpoints = make("classifier", 1)
    plain = EKFACInfluence(**options).fit(train, checkpoints).attribute(targets)
    flat = EKFACInfluence(**options, weight_exponent=exponent).fit(train, checkpoints).attribute(targets)
    power = 0.5 if exponent is None else exponent
    weights_N = plain.weights**power
    torch.testing.assert_close(flat.weights, weights_N)
    expected_NT = plain.scores.tensor() / plain.weights.unsqueeze(1) * weights_N.unsqueeze(1)
    torch.testing.assert_close(flat.scores.tensor(), expected_NT)
    assert flat.info["weight_exponent"] == power
    with pytest.raises(trak.InputError, match="weight_exponent must be a number"):
        EKFACInfluence(**options, weight_exponent=-1).fit(train, checkpoints)


def test_more_samples_come_nearer_to_the_exact_fisher():
    options, train, targets, checkpoints = make("classifier", 1)
    settings = {"damping": trak.FixedDamping(LAMBDA)}
    exact = scores(EKFACInfluence(**options, fisher="exact", **settings), train, targets, checkpoints)
    errors = [
        float(
            (
                scores(EKFACInfluence(**options, samples=samples, **settings), train, targets, checkpoints)
                - exact
            ).norm()
            / exact.norm()
        )
        for samples in (1, 100)
    ]
    assert errors[1] < 0.15 and errors[1] < errors[0] / 3


def by_definition(options, train, targets, state, ratio, fisher):
    """EK-FAC of the two-layer classifier written out: moments, eigenvectors, second moments in their basis, a division."""
    first, second = (options["model"][index] for index in (0, 2))
    first.load_state_dict({key[2:]: value for key, value in state.items() if key.startswith("0.")})
    second.load_state_dict({key[2:]: value for key, value in state.items() if key.startswith("2.")})

    def passed(inputs):
        hidden = torch.tanh(first(inputs))
        return second(hidden), hidden

    def blocks(inputs, weights):
        """Per-example gradients [n, O, I + 1] of weightsᵀlogits in both layers."""
        hidden = passed(inputs)[1]
        back = (weights @ second.weight) * (1 - hidden**2)
        ones = torch.ones(len(inputs), 1, dtype=torch.float64)
        return [
            (back, torch.cat([inputs, ones], 1)),
            (weights, torch.cat([hidden, ones], 1)),
        ]

    inputs, labels = train
    probabilities = passed(inputs)[0].softmax(1).detach()
    one_hot = torch.eye(3, dtype=torch.float64)
    if fisher == "exact":
        draws = [(probabilities[:, c], one_hot[c] - probabilities) for c in range(3)]
    else:
        draws = [(torch.ones(N, dtype=torch.float64), one_hot[labels] - probabilities)]
    f_weights = torch.func.vmap(
        torch.func.grad(
            lambda logits, label: (
                logits @ label - torch.logsumexp(logits.masked_fill(label > 0, -math.inf), 0)
            )
        )
    )(passed(targets[0])[0].detach(), one_hot[targets[1]])
    loss_weights = probabilities - one_hot[labels]
    total = 0
    for layer in range(2):
        moments = [(share, *blocks(inputs, weights)[layer]) for share, weights in draws]
        covariance_in = moments[0][2].T @ moments[0][2] / N
        covariance_out = sum((share[:, None] * g).T @ g for share, g, _ in moments) / N
        q_in, q_out = torch.linalg.eigh(covariance_in)[1], torch.linalg.eigh(covariance_out)[1]
        values = sum(
            (share[:, None, None] * ((g @ q_out)[:, :, None] * (a @ q_in)[:, None, :]) ** 2).sum(0)
            for share, g, a in moments
        )
        values = values / N
        g, a = blocks(targets[0], f_weights)[layer]
        wanted = (g @ q_out)[:, :, None] * (a @ q_in)[:, None, :]
        g, a = blocks(inputs, loss_weights)[layer]
        own = (g @ q_out)[:, :, None] * (a @ q_in)[:, None, :]
        solved = wanted / (values + ratio * values.mean())
        total = total - torch.einsum("noi,toi->nt", own, solved) / N
    return total.detach()


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_equals_the_definition(fisher):
    options, train, targets, checkpoints = make("classifier")
    method = EKFACInfluence(**options, fisher=fisher, damping=trak.RelativeDamping(0.3))
    expected = sum(by_definition(options, train, targets, state, 0.3, fisher) for state in checkpoints) / 2
    torch.testing.assert_close(scores(method, train, targets, checkpoints), expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("factors", ["ekfac", "kfac"])
@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        ("images", None),
        ("classifier", None),
        ("classifier", ["*.weight"]),
        ("classifier", ["0.*", "2.bias"]),
        ("softmax", None),
    ],
)
def test_the_solve_equals_the_librarys(kind, parameters, factors):
    options, train, _, checkpoints = make(kind, 1, device="cpu")
    method = EKFACInfluence(**options, parameters=parameters, fisher="exact", factors=factors)
    fitted = method.fit(train, checkpoints)
    library = import_curvlinops("the test")
    vectors = torch.randn(T, fitted.passes.num_parameters, dtype=torch.float64)
    (state,) = fitted.passes.states()
    with lent_loss(fitted.passes, state, "the test") as loss:
        kind_of = {"ekfac": library.EKFACLinearOperator, "kfac": library.KFACLinearOperator}[factors]
        operator = kind_of(
            loss.predictions,
            loss.loss,
            loss.parameters,
            loss.data(False),
            fisher_type="type-2",
            separate_weight_and_bias=False,
            num_data=N,
            num_per_example_loss_terms=1,
            check_deterministic=False,
            batch_size_fn=lambda inputs: len(inputs["batch"][0]),
        )
        inverse = library.KFACInverseLinearOperator(operator, damping=LAMBDA, use_exact_damping=True)
        expected = (inverse @ vectors.T).T
    found = precondition(fitted.factors[0], vectors, trak.FixedDamping(LAMBDA), fitted.passes.setting.shapes)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_each_layer_has_its_own_damping():
    options, train, _, checkpoints = make("classifier", 1)
    fitted = EKFACInfluence(**options, fisher="exact").fit(train, checkpoints)
    shapes = fitted.passes.setting.shapes
    vectors = torch.randn(T, fitted.passes.num_parameters, dtype=torch.float64)
    found = precondition(fitted.factors[0], vectors, trak.RelativeDamping(0.1), shapes)
    for block, columns in zip(fitted.factors[0], (slice(0, 16), slice(16, 31))):
        value = 0.1 * float(block.eigenvalues.mean())
        alone = precondition([block], vectors, trak.FixedDamping(value), shapes)
        torch.testing.assert_close(found[:, columns], alone[:, columns])


def test_layers_without_factors_are_listed():
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 3), nn.Embedding(4, 2)
    )
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(trak.UnsupportedLayerError) as error:
        find_layers(model, names)
    for part in ("0.weight (Conv2d)", "2.weight (LayerNorm)", "4.weight (Embedding)", "parameters=['3.*']"):
        assert part in str(error.value)
    with pytest.raises(trak.UnsupportedLayerError, match="It covers none"):
        find_layers(nn.Sequential(nn.LayerNorm(3)), ["0.weight"])
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(trak.UnsupportedLayerError, match="used by several layers"):
        find_layers(tied, ["0.weight", "1.bias"])


def test_layers_called_twice_are_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.body(self.body(x)))

    train = (torch.randn(N, 3), torch.randint(2, (N,)))
    with pytest.raises(trak.UnsupportedLayerError, match="'body' is called 2 times"):
        EKFACInfluence(model=Twice(), task="image_classification").fit(train)


def test_layers_that_nothing_reaches_need_fixed_damping():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    nn.init.zeros_(model[1].weight)
    train = (torch.randn(N, 3, dtype=torch.float64), torch.randint(2, (N,)))
    options = {"model": model, "task": "image_classification", "fisher": "exact"}
    with pytest.raises(trak.SingularGramError, match="layer '0'"):
        EKFACInfluence(**options).fit(train).attribute(train)
    found = EKFACInfluence(**options, damping=trak.FixedDamping(0.1)).fit(train).attribute(train)
    assert found.scores.tensor().isfinite().all()


def test_the_model_comes_back_and_generators_too():
    options, train, targets, checkpoints = make("images", 1)
    before = {name: value.clone() for name, value in options["model"].state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = scores(EKFACInfluence(**options), train, targets, checkpoints)
    assert torch.equal(torch.rand(1), expected)
    for name, value in options["model"].state_dict().items():
        assert torch.equal(value, before[name])
    assert all(isinstance(parameter, nn.Parameter) for parameter in options["model"].parameters())
    assert not options["model"][0]._forward_hooks and not options["model"][0]._forward_pre_hooks
    assert torch.equal(scores(EKFACInfluence(**options), train, targets, checkpoints), first)
    assert not torch.equal(scores(EKFACInfluence(**options, seed=1), train, targets, checkpoints), first)


# Arnoldi


@pytest.mark.parametrize(
    ("kind", "hessian"),
    [
        ("logistic", "exact"),
        ("logistic", "gauss_newton"),
        ("regression", "exact"),
        ("regression", "gauss_newton"),
        ("classifier", "exact"),
    ],
)
def test_all_eigenpairs_are_the_inverse(kind, hessian):
    options, train, targets, checkpoints = make(kind, device="cpu")
    damping = 1.0 if kind == "classifier" else LAMBDA
    rank = sum(parameter.numel() for parameter in options["model"].parameters())
    found = ArnoldiInfluence(**options, rank=rank, damping=damping, hessian=hessian)
    expected = InfluenceFunction(**options, damping=damping, hessian=hessian, tolerance=1e-12)
    torch.testing.assert_close(
        scores(found, train, targets, checkpoints),
        scores(expected, train, targets, checkpoints),
        rtol=1e-7,
        atol=1e-10,
    )


@pytest.mark.parametrize("hessian", ["exact", "gauss_newton"])
def test_few_eigenpairs_are_the_largest(hessian):
    options, train, targets, checkpoints = make("classifier", 1, device="cpu")
    rank = 6  # of 31: by ARPACK
    method = ArnoldiInfluence(**options, rank=rank, hessian=hessian, tolerance=1e-12)
    fitted = method.fit(train, checkpoints)
    (state,) = fitted.passes.states()
    with lent_loss(fitted.passes, state, "the test") as loss:
        matrix = loss.operator(hessian) @ torch.eye(31, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(matrix)
    order = values.abs().argsort(descending=True)[:rank]
    torch.testing.assert_close(fitted.members[0].values, values[order], rtol=1e-8, atol=1e-12)
    inverse = vectors[:, order] @ torch.diag(1 / values[order]) @ vectors[:, order].T
    wanted = fitted.passes.products(state, trak.datasets.as_rows(targets), label="targets").values
    own = fitted.passes.products(state, fitted.passes.train, label="training set")
    expected = (own.weights[:, None] * own.values) @ inverse @ wanted.T / N
    attribution = fitted.attribute(targets)
    torch.testing.assert_close(attribution.scores.tensor(), expected, rtol=1e-7, atol=1e-10)
    assert len(attribution.info["eigenvalues"][0]) == rank
    if hessian == "gauss_newton":
        assert min(attribution.info["eigenvalues"][0]) > 0


def test_the_hessian_may_be_of_some_rows():
    options, train, targets, checkpoints = make("classifier")
    settings = {"rank": 5, "damping": 0.1, "tolerance": 1e-12}
    rows = spread_rows(N, 9)
    some = ArnoldiInfluence(**options, **settings, hessian_rows=9).fit(train, checkpoints)
    alone = ArnoldiInfluence(**options, **settings).fit(tuple(part[rows] for part in train), checkpoints)
    found, reference = some.attribute(targets), alone.attribute(targets)
    assert found.info["hessian_rows"] == 9 and found.scores.shape == (N, T)
    torch.testing.assert_close(
        torch.tensor(found.info["eigenvalues"]), torch.tensor(reference.info["eigenvalues"])
    )
    # Scores are means over the training set: 1/N of the whole one.
    expected = reference.scores.tensor() * 9 / N
    torch.testing.assert_close(found.scores.tensor()[rows], expected, rtol=1e-7, atol=1e-10)


def test_eigenpairs_that_cannot_be_had_are_refused():
    options, train, _, checkpoints = make("softmax", 1)
    with pytest.raises(trak.InputError, match="more than the 16 attributed parameters"):
        ArnoldiInfluence(**options, rank=17).fit(train, checkpoints)
    # Adding a constant to all logits changes nothing: four of sixteen eigenvalues are zero.
    with pytest.raises(trak.SingularGramError, match="set rank to 12 or less"):
        ArnoldiInfluence(**options, rank=16).fit(train, checkpoints)
    options, train, _, checkpoints = make("images", 1)
    with pytest.raises(trak.SingularGramError, match="raise max_iter"):
        ArnoldiInfluence(**options, rank=20, max_iter=1, tolerance=0.0).fit(train, checkpoints)


# LiSSA


def test_the_series_converges_to_the_solve():
    root = torch.randn(6, 9, dtype=torch.float64)
    matrix = root @ root.T / 9
    rhs = torch.randn(T, 6, dtype=torch.float64)
    scale = float(torch.linalg.matrix_norm(matrix, 2)) + LAMBDA
    products = iter([lambda vectors: vectors @ matrix] * 3000)
    found = lissa(products, rhs, damping=LAMBDA, scale=scale, where="here")
    damped = matrix + LAMBDA * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(found, torch.linalg.solve(damped, rhs.T).T, rtol=1e-8, atol=1e-10)


def test_lissa_agrees_with_conjugate_gradients():
    # Equal inputs: every draw has the curvature of the whole set, so that chance has no part.
    options, train, targets, checkpoints = make("classifier", 1)
    train = (train[0][:1].expand(N, 3).clone(), train[1])
    method = LiSSAInfluence(**options, hessian="gauss_newton", damping=0.3, scale=2.0, depth=120, batch=2)
    attribution = method.fit(train, checkpoints).attribute(targets)
    assert max(attribution.info["residuals"]) < 1e-6
    exact = ArnoldiInfluence(**options, rank=31, damping=0.3, hessian="gauss_newton")
    torch.testing.assert_close(
        attribution.scores.tensor(), scores(exact, train, targets, checkpoints), rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("kind", ["logistic", "regression", "two classes"])
def test_outer_products_are_the_librarys_matrix(kind):
    options, train, _, checkpoints = make(kind, 1, device="cpu")
    passes = start_passes(LiSSAInfluence(**options), train, checkpoints)
    (state,) = passes.states()
    outer = OuterProducts(passes, state)
    vectors = torch.randn(5, passes.num_parameters, dtype=torch.float64)
    batch = prepare(passes.setting, tuple(part[[3, 3, 8, 1]] for part in train))
    ours, added = outer.product(batch)(vectors), vectors.clone()
    outer.product(batch).add(added, to=added, keep=0.5, factor=-2.0)
    torch.testing.assert_close(added, 0.5 * vectors - 2 * ours)
    mean = outer.mean_product(vectors)
    with lent_loss(passes, state, "the test") as loss:
        torch.testing.assert_close(ours, loss.product("gauss_newton", batch)(vectors))
        torch.testing.assert_close(mean, loss.product("gauss_newton")(vectors))


def test_either_way_lissa_steps_alike(monkeypatch):
    options, train, targets, checkpoints = make("two classes")
    method = LiSSAInfluence(**options, depth=30, batch=4, repeats=2)
    fast = method.fit(train, checkpoints).attribute(targets)
    used = []
    monkeypatch.setattr(
        "trak.methods.lissa.OuterProducts", lambda *given: used.append(given) or pytest.fail("used")
    )
    monkeypatch.setattr("trak.methods.lissa.MOST_PREDICTIONS", 0)
    slow = method.fit(train, checkpoints).attribute(targets)
    assert not used
    torch.testing.assert_close(fast.scores.tensor(), slow.scores.tensor())
    torch.testing.assert_close(torch.tensor(fast.info["residuals"]), torch.tensor(slow.info["residuals"]))


def test_draws_average_out():
    options, train, targets, checkpoints = make("logistic", 1)
    exact = scores(InfluenceFunction(**options, damping=0.2), train, targets, checkpoints)
    method = LiSSAInfluence(**options, damping=0.2, scale=4.0, depth=100, batch=32, repeats=2)
    attribution = method.fit(train, checkpoints).attribute(targets)
    found = attribution.scores.tensor()
    assert float((found - exact).norm() / exact.norm()) < 0.15
    assert 0 < attribution.info["residuals"][0] < 0.15
    short = LiSSAInfluence(**options, depth=5)
    assert torch.equal(*(scores(short, train, targets, checkpoints) for _ in range(2)))


def test_divergence_says_what_would_converge():
    options, train, targets, checkpoints = make("logistic", 1)
    short = {"depth": 20, "batch": N}
    with pytest.raises(trak.SingularGramError, match=r"diverges with scale=0.1 .* set scale=") as error:
        LiSSAInfluence(**options, scale=0.1, **short).fit(train, checkpoints).attribute(targets)
    advised = float(str(error.value).split("set scale=")[1].split(",")[0])
    LiSSAInfluence(**options, scale=advised, **short).fit(train, checkpoints).attribute(targets)

    matrix = torch.diag(torch.tensor([1.0, -0.5], dtype=torch.float64))
    rhs = torch.ones(1, 2, dtype=torch.float64)
    with pytest.raises(trak.SingularGramError, match=r"eigenvalue of -0\.\d+ or below: set damping="):
        lissa(iter([lambda v: v @ matrix] * 200), rhs, damping=0.1, scale=2.0, where="here")


def test_the_automatic_scale_is_the_largest_eigenvalue_of_some_draws(monkeypatch):
    options, train, targets, checkpoints = make("two classes", 1, device="cpu")
    large = 20 * train[0], train[1]  # far beyond the authors' scale
    with pytest.raises(trak.SingularGramError, match=r"diverges with scale=0\.5"):
        LiSSAInfluence(**options, scale=0.5, depth=30).fit(large, checkpoints).attribute(targets)
    method = LiSSAInfluence(**options, scale="auto", depth=30, batch=4)
    fitted = method.fit(large, checkpoints)
    (fast,) = fitted.attribute(targets).info["scales"]
    passes = fitted.passes
    (state,) = passes.states()
    outer, generator = OuterProducts(passes, state), torch.Generator().manual_seed(0)
    eye = torch.eye(passes.num_parameters, dtype=torch.float64)
    largest = max(
        float(
            torch.linalg.eigvalsh(
                outer.product(prepare(passes.setting, draw_batch(passes.train, 4, generator)))(eye)
            )[-1]
        )
        for _ in range(8)
    )
    assert fast == pytest.approx(max(10, largest + method.damping))
    monkeypatch.setattr("trak.methods.lissa.MOST_PREDICTIONS", 0)
    assert fitted.attribute(targets).info["scales"] == pytest.approx([fast], rel=1e-3)
    # Small ones keep the authors' ten.
    assert method.fit(train, checkpoints).attribute(targets).info["scales"] == [10.0]


def test_lissa_needs_random_access():
    batch = torch.randn(4, 3), torch.randint(3, (4,))

    class Stream:
        def __iter__(self):
            yield batch

    options = {"model": nn.Linear(3, 3), "task": "image_classification"}
    with pytest.raises(trak.InputError, match="only be read from the front"):
        LiSSAInfluence(**options).fit(Stream())
    rows = [(torch.randn(3), 1) for _ in range(N)]
    found = LiSSAInfluence(**options, depth=3).fit(rows).attribute(rows[:T])
    assert found.scores.shape == (N, T)


# What they share


@pytest.mark.parametrize("method", [EKFACInfluence, ArnoldiInfluence, LiSSAInfluence])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"projection": trak.Sparse(dim=4)}, "takes no projection"),
        ({"save_dir": "features"}, "leave out save_dir"),
        ({"task": trak.ImageClassification(temperature=3.0)}, "temperature=1"),
        (
            {"task": trak.CustomTask(lambda model, batch: model(batch[0])[:, 0], torch.exp)},
            "weights of its own",
        ),
    ],
)
def test_shared_settings_are_checked(method, settings, message):
    options, train, _, checkpoints = make("softmax", 1)
    with pytest.raises(trak.InputError, match=message):
        method(**(options | settings)).fit(train, checkpoints)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (EKFACInfluence, {"factors": "shampoo"}, "factors must be"),
        (EKFACInfluence, {"fisher": "type-2"}, "fisher must be one of"),
        (EKFACInfluence, {"samples": 0}, "samples must be"),
        (EKFACInfluence, {"samples": 2, "fisher": "exact"}, "samples are drawn"),
        (EKFACInfluence, {"damping": 0.1}, "RelativeDamping"),
        (ArnoldiInfluence, {"hessian": "fisher"}, "hessian must be"),
        (ArnoldiInfluence, {"rank": 0}, "rank must be"),
        (ArnoldiInfluence, {"hessian_rows": 0}, "hessian_rows must be"),
        (ArnoldiInfluence, {"damping": math.nan}, "damping must be"),
        (ArnoldiInfluence, {"tolerance": 1.0}, "tolerance must lie"),
        (LiSSAInfluence, {"hessian": "fisher"}, "hessian must be"),
        (LiSSAInfluence, {"depth": 1.5}, "depth must be"),
        (LiSSAInfluence, {"scale": 0.0}, "scale must be"),
        (LiSSAInfluence, {"damping": -1.0}, "damping must be"),
    ],
)
def test_wrong_settings_are_refused(method, settings, message):
    options, train, _, checkpoints = make("softmax", 1)
    with pytest.raises(trak.InputError, match=message):
        method(**options, **settings).fit(train, checkpoints)


def test_own_tasks_with_the_default_weights_are_logistic():
    # f = the margin of two classes and L = log(1 + e^(−f)) are binary cross-entropy.
    options, train, targets, checkpoints = make("logistic", 1)
    own = options | {
        "task": trak.CustomTask(
            lambda model, batch: model(batch[0])[:, 0] * (2 * batch[1] - 1), name="margin"
        )
    }
    settings = {"fisher": "exact", "damping": trak.FixedDamping(LAMBDA)}
    torch.testing.assert_close(
        scores(EKFACInfluence(**own, **settings), train, targets, checkpoints),
        scores(EKFACInfluence(**options, **settings), train, targets, checkpoints),
    )


class Attention(nn.Module):
    """One head over four positions, by torch's fused function."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 12), nn.Linear(4, 2)

    def forward(self, x):
        query, key, value = self.body(x).unsqueeze(1).chunk(3, dim=-1)
        return self.head(nn.functional.scaled_dot_product_attention(query, key, value).mean((1, 2)))


def test_fused_attention_is_differentiated_twice():
    train = (torch.randn(N, 4, 3, dtype=torch.float64), torch.randint(2, (N,)))
    options = {"model": Attention().double(), "task": "image_classification"}
    found = scores(ArnoldiInfluence(**options, rank=58, damping=1.0), train, train, None)
    exact = InfluenceFunction(**options, hessian="exact", damping=1.0, tolerance=1e-12, gradients="reference")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = scores(exact, train, train, None)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)
    drawn = scores(LiSSAInfluence(**options, depth=3), train, train, None)
    assert drawn.isfinite().all()


def test_changed_checkpoints_are_refused():
    options, train, targets, checkpoints = make("softmax", 1)
    fitted = EKFACInfluence(**options).fit(train, checkpoints)
    checkpoints[0]["bias"].add_(1.0)
    with pytest.raises(trak.CheckpointError, match=r"has changed since fit\(\)"):
        fitted.attribute(targets)
    with pytest.raises(trak.CheckpointError, match="the same as checkpoint 0"):
        EKFACInfluence(**options).fit(train, checkpoints * 2)


@pytest.mark.parametrize("method", [EKFACInfluence, ArnoldiInfluence, LiSSAInfluence])
def test_it_says_which_package_it_needs(method, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("curvlinops"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    options, train, _, _ = make("softmax", 1)
    with pytest.raises(trak.MissingDependencyError, match=r"trak-attribution\[curvature\]"):
        method(**options).fit(train)


def test_gradients_come_in_the_order_of_the_operators_vectors():
    # Many parameters in an order that is not alphabetical: H v must speak of the same entries as ∇f does.
    options, train, _, checkpoints = make("classifier", 1, device="cpu")
    passes = start_passes(EKFACInfluence(**options), train, checkpoints)
    (state,) = passes.states()
    own = passes.products(state, passes.train, label="training set")
    with lent_loss(passes, state, "the test") as loss:
        gradient, _ = loss.operator("exact").gradient_and_loss()
    flat = torch.cat([part.flatten() for part in gradient])
    torch.testing.assert_close(flat, -(own.weights[:, None] * own.values).mean(0))


def test_whole_gradients_are_the_projectors():
    options, train, _, checkpoints = make("images", 1, device="cpu")
    passes = start_passes(LiSSAInfluence(**options), train, checkpoints)
    (state,) = passes.states()
    gradients, reference = WholeGradients(passes.setting, state), Projector(passes.setting, state, 0)
    kept = []
    # The memory is made anew for the longer batch, and is too long for the last.
    for rows in (slice(0, 5), slice(5, 12), slice(12, 14)):
        batch = prepare(passes.setting, tuple(part[rows] for part in train))
        (found, outputs), (expected, before) = gradients(batch, label="here"), reference(batch)
        assert torch.equal(found, expected)
        assert torch.equal(outputs.f, before.f) and torch.equal(outputs.q, before.q)
        kept.append(gradients(batch, label="here")[0])
    assert kept[2].data_ptr() == kept[1].data_ptr()


def test_whole_gradients_must_be_finite():
    options, train, _, checkpoints = make("regression", 1, device="cpu")
    passes = start_passes(LiSSAInfluence(**options), train, checkpoints)
    (state,) = passes.states()
    gradients = WholeGradients(passes.setting, state)
    # A sum that overflows is no sign: ∇f = (x, 1).
    large = torch.full((2, 3), 1e308, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    small = {name: 1e-10 * value for name, value in state.items()}
    assert WholeGradients(passes.setting, small)(large, label="here")[0].isfinite().all()
    bad = torch.tensor([[1.0, 2.0, 3.0], [1.0, math.nan, 3.0]], dtype=torch.float64), large[1]
    with pytest.raises(
        trak.NonFiniteError, match=r"model outputs are NaN or infinite for 1 of 2 .* position 1"
    ):
        gradients(bad, label="here")
