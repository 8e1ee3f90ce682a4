"""Representation similarity against layers called by hand."""

import pytest
import torch
from torch import nn

import trak
from trak.methods.representation_similarity import RepresentationSimilarity

N, T = 19, 4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        # Registered first and called last: order in the module tree is not order in the forward pass.
        self.head = nn.Linear(6, 3)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Dropout(0.5))
        self.spare = nn.Linear(2, 2)
        self.twice = nn.Identity()

    def forward(self, x):
        return self.head(self.twice(self.twice(self.body(x))))


class Again:
    """Batches to be read again and again."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def make():
    model = Net().double()
    checkpoints = [
        {name: value + 0.4 * torch.randn_like(value) for name, value in model.state_dict().items()}
        for _ in range(2)
    ]
    train, targets = ((torch.randn(n, 4, dtype=torch.float64), torch.randint(3, (n,))) for n in (N, T))
    return model, train, targets, checkpoints


def by_hand(states, train, targets, represent, compare):
    total = 0
    for state in states:
        net = Net().double().eval()
        net.load_state_dict(state)
        with torch.no_grad():
            one, other = represent(net, train[0]), represent(net, targets[0])
        total = total + torch.stack([torch.stack([compare(a, b) for b in other]) for a in one])
    return total / len(states)


COMPARE = {
    "dot": lambda a, b: a @ b,
    "cosine": lambda a, b: a @ b / (a.norm() * b.norm()),
    "euclidean": lambda a, b: -((a - b) ** 2).sum(),
}


@pytest.mark.parametrize("similarity", list(COMPARE))
@pytest.mark.parametrize("layer", [None, "body.0", "head", ""])
def test_equals_layers_called_by_hand(layer, similarity):
    model, train, targets, checkpoints = make()
    represent = {
        None: lambda net, x: net.body(x),
        "body.0": lambda net, x: net.body[0](x).clone(),
        "head": lambda net, x: net(x),
        "": lambda net, x: net(x),
    }[layer]
    expected = by_hand(checkpoints, train, targets, represent, COMPARE[similarity])
    method = RepresentationSimilarity(
        model=model, task="image_classification", layer=layer, similarity=similarity, batch_size=5
    )
    attribution = method.fit(train, checkpoints).attribute(targets)
    torch.testing.assert_close(attribution.scores.tensor(), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        attribution.scores[2:7, [3, 0]], expected[2:7][:, [3, 0]], rtol=1e-10, atol=1e-12
    )
    assert attribution.info["method"] == f"representation {similarity}"


def test_the_model_comes_back_as_it_was():
    model, train, targets, checkpoints = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    RepresentationSimilarity(model=model, task="image_classification").fit(train, checkpoints).attribute(
        targets
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_euclidean_distances_of_neighbours_far_from_zero_are_right():
    train = (torch.tensor([[1e4, 0.0], [1e4, 0.01]]), torch.tensor([0, 1]))
    method = RepresentationSimilarity(
        model=nn.Linear(2, 2), task="image_classification", similarity="euclidean"
    )
    scores = method.fit(train).attribute(train).scores.tensor()
    torch.testing.assert_close(scores, torch.tensor([[0.0, -1e-4], [-1e-4, 0.0]]), rtol=1e-3, atol=0)


def test_transform_pools_what_differs_in_length():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 3)
            self.pair = nn.Module()
            self.pair.forward = lambda x: (x, "state")
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.pair(self.embed(x))[0].mean(1))

    model = Tokens()
    lengths = (3, 5)
    pairs = [(torch.randint(10, (4, length)), torch.randint(2, (4,))) for length in lengths]
    batches = Again(pairs)
    options = {"model": model, "task": "image_classification"}
    with pytest.raises(trak.InputError, match="9 numbers in the first batch and 15"):
        RepresentationSimilarity(layer="embed", **options).fit(batches)
    with pytest.raises(trak.InputError, match=r"got \(Tensor.*transform"):
        RepresentationSimilarity(layer="pair", **options).fit(batches)
    fitted = RepresentationSimilarity(layer="pair", transform=lambda out: out[0].mean(1), **options).fit(
        batches
    )
    vectors = torch.cat([model.embed(x).mean(1) for x, _ in pairs]).detach()
    torch.testing.assert_close(fitted.attribute(batches).scores.tensor(), vectors @ vectors.T)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": "bodi.0"}, r"layer 'bodi.0' is no module of the model. Did you mean 'body.0'"),
        ({"layer": "zzz"}, "has the modules 'head', 'body'"),
        ({"layer": "spare"}, "'spare' is reached"),
        ({"layer": "twice"}, "called 2 times"),
        ({"similarity": "manhattan"}, "'euclidean'; got 'manhattan'"),
        ({"transform": lambda x: x.argmax(1)}, "floating-point"),
        ({"transform": lambda x: x.sum(0)}, "row for each of the 19"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    model, train, _, checkpoints = make()
    with pytest.raises(trak.InputError, match=message):
        RepresentationSimilarity(model=model, task="image_classification", **settings).fit(train, checkpoints)


def test_a_model_without_linear_layers_needs_a_layer():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    train = (torch.randn(5, 1, 6, 6), torch.randint(2, (5,)))
    with pytest.raises(trak.InputError, match=r"no torch.nn.Linear is reached.*name a layer"):
        RepresentationSimilarity(model=model, task="image_classification").fit(train)
    scores = RepresentationSimilarity(model=model, task="image_classification", layer="1").fit(train)
    assert scores.attribute(train).scores.shape == (5, 5)


def test_a_checkpoint_that_changes_and_values_that_are_not_finite_are_refused():
    model, train, targets, checkpoints = make()
    fitted = RepresentationSimilarity(model=model, task="image_classification").fit(train, checkpoints)
    checkpoints[1]["body.0.weight"] += 1
    with pytest.raises(trak.CheckpointError, match="changed"):
        fitted.attribute(targets)
    broken = (train[0].clone(), train[1])
    broken[0][7, 0] = float("nan")
    with pytest.raises(trak.NonFiniteError, match="rows 5 to 9"):
        RepresentationSimilarity(model=model, task="image_classification", batch_size=5).fit(broken)


@pytest.mark.parametrize("method", [trak.RepresentationSimilarity, trak.KNNShapley])
def test_autocast_around_the_call_is_refused(method):
    model, train, targets, checkpoints = make()
    attributor = method(model=model, task="image_classification", device="cpu")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(trak.InputError, match="enter autocast"):
        attributor.fit(train, checkpoints)
    fitted = attributor.fit(train, checkpoints)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(trak.InputError, match="enter autocast"):
        fitted.attribute(targets)
