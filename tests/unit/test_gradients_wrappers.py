"""Models that were compiled, or wrapped to run in parallel: the same numbers as the model inside."""

import pytest
import torch
from torch import nn

import trak
from trak.errors import InputError
from trak.gradients import (
    Auto,
    Functional,
    Hooked,
    Reference,
    lend,
    model_state,
    select_parameters,
    unwrapped,
)
from trak.testing.gradients import collect, snapshot
from trak.testing.models import HandwrittenRMSNorm, ResNet


def never(graph, inputs):
    """A compiler that attribution must not come to."""
    raise AssertionError("compiled")


class Net(nn.Module):
    """A convolution, a batch norm that differs between training and evaluation, dropout, and a layer without a rule."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(12, 2)
        self.mix = HandwrittenRMSNorm(2)

    def forward(self, x):
        x = self.head(self.drop(torch.relu(self.norm(self.conv(x)))).flatten(1))
        return x + self.mix(x)


def network():
    torch.manual_seed(0)
    model = Net().double().train()
    model.norm.running_mean.normal_()
    return model


def examples(count):
    generator = torch.Generator().manual_seed(count)
    inputs = torch.randn(count, 1, 4, 4, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(2, (count,), generator=generator)


def compiled(model):
    return torch.compile(model, backend=never)


def compiled_in_place(model):
    model.compile(backend=never)
    return model


def compiled_parts(model):
    model.conv = torch.compile(model.conv, backend=never)
    model.mix = torch.compile(model.mix, backend=never)
    model.norm.compile(backend=never)
    return model


WRAPPERS = {
    "compiled": compiled,
    "compiled in place": compiled_in_place,
    "compiled parts": compiled_parts,
    "parallel": nn.DataParallel,
    "compiled in parallel": lambda model: nn.DataParallel(compiled(model)),
    "parallel compiled": lambda model: compiled(nn.DataParallel(model)),
}
OPTIONS = {
    "task": "image_classification",
    "projection": trak.Rademacher(8),
    "damping": 1e-2,
    "device": "cpu",
    "progress": False,
}


def scores(model, **options):
    return trak.attribute(model, examples(12), examples(3), **{**OPTIONS, **options}).scores.tensor()


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
class TestWrapped:
    @pytest.mark.parametrize("gradients", ["auto", "functional", "reference"])
    def test_scores_are_those_of_the_model_inside(self, wrap, gradients):
        model = wrap(network())
        before = snapshot(model)
        torch.testing.assert_close(
            scores(model, gradients=gradients),
            scores(network(), gradients="reference"),
            rtol=1e-9,
            atol=1e-12,
        )
        assert snapshot(model) == before

    def test_names_are_those_of_the_model_inside(self, wrap):
        names = list(select_parameters(network()))
        assert list(select_parameters(unwrapped(wrap(network())))) == names
        torch.testing.assert_close(
            scores(wrap(network()), parameters=["conv.*", "mix.weight"]),
            scores(network(), parameters=["conv.*", "mix.weight"]),
        )

    def test_state_dicts_go_both_ways(self, wrap):
        model, trained = wrap(network()), network()
        with torch.no_grad():
            trained.head.weight += 1
        expected = scores(trained)
        torch.testing.assert_close(scores(model, checkpoints=[trained.state_dict()]), expected)
        trained = wrap(trained)
        torch.testing.assert_close(scores(network(), checkpoints=[trained.state_dict()]), expected)
        torch.testing.assert_close(scores(model, checkpoints=[trained]), expected)

    def test_features_are_kept_for_both(self, wrap, tmp_path):
        first = scores(network(), save_dir=tmp_path)
        assert torch.equal(scores(wrap(network()), save_dir=tmp_path), first)
        assert len(list((tmp_path / "checkpoints").iterdir())) == 1

    def test_step_by_step(self, wrap):
        results = []
        for model in (network(), wrap(network())):
            traker = trak.TRAKer(
                model, "image_classification", 12, save_dir=None, device="cpu", projector=trak.Rademacher(8)
            )
            traker.load_checkpoint(model.state_dict(), model_id=0)
            traker.featurize(examples(12), num_samples=12)
            traker.finalize_features()
            traker.start_scoring_checkpoint("targets", model.state_dict(), model_id=0, num_targets=3)
            traker.score(examples(3), num_samples=3)
            results.append(torch.from_numpy(traker.finalize_scores("targets")))
        torch.testing.assert_close(*results)


@pytest.mark.skipif(
    not hasattr(torch.compiler, "set_stance"), reason="torch before 2.6 cannot be told to run them as written"
)
@pytest.mark.parametrize(
    "source", [Auto(), Functional(), Reference()], ids=lambda source: type(source).__name__
)
def test_parts_that_were_compiled_as_functions(source):
    class Outer(nn.Module):
        def __init__(self, act):
            super().__init__()
            self.act, self.layer, self.out = act, nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.out(self.act(self.layer(x)))

    def act(x):
        return x * torch.sigmoid(x)

    plain, fused = Outer(act).double(), Outer(torch.compile(act, backend=never)).double()
    fused.load_state_dict(plain.state_dict())
    batch = (torch.randn(4, 3, dtype=torch.float64),)
    for name, value in collect(Reference(), plain, batch)[1].items():
        torch.testing.assert_close(collect(source, fused, batch)[1][name], value)


def test_hooks_see_compiled_layers():
    """Without being told so: the model that is given to a source directly."""
    model, batch = network(), (examples(4)[0],)
    expected = collect(Reference(), model, batch, ["conv.weight", "head.bias"])[1]
    for wrapped in (compiled(model), compiled_parts(network())):
        got = collect(Hooked(), wrapped, batch, ["conv.weight", "head.bias"])[1]
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value)


def test_a_compiled_model_stays_compiled():
    seen = []

    def backend(graph, inputs):
        seen.append(len(inputs))
        return graph

    model = torch.compile(network().eval(), backend=backend)
    inputs = examples(4)[0]
    with torch.no_grad():
        expected = model(inputs)
        times = len(seen)
        scores(model)
        assert len(seen) == times > 0
        assert torch.equal(model(inputs), expected)
    assert len(seen) == times


def test_compiled_names_are_taken_as_well():
    model = compiled_parts(network())
    for pattern in ("conv._orig_mod.*", "conv.*", ["conv._orig_mod.weight", "conv.bias"]):
        assert list(select_parameters(model, pattern)) == ["conv.weight", "conv.bias"]


def test_names_that_would_collide_stay_as_they_are():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self._orig_mod, self.weight = nn.Linear(2, 2, bias=False), nn.Parameter(torch.zeros(2, 2))

    assert list(select_parameters(Both())) == ["weight", "_orig_mod.weight"]
    assert unwrapped(both := Both()) is both


def test_lending_puts_compiled_calls_back():
    model = compiled_in_place(ResNet())
    call = model._compiled_call_impl
    with lend(model, model_state(model, None, "cpu")):
        assert model._compiled_call_impl is None
    assert model._compiled_call_impl is call


def test_distributed():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(network())
        assert torch.equal(scores(model), scores(network()))
        assert torch.equal(scores(network(), checkpoints=[model.state_dict()]), scores(network()))
    finally:
        torch.distributed.destroy_process_group()


def test_fabric():
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    model = fabric.setup(network())
    assert torch.equal(scores(model), scores(network()))
    assert torch.equal(scores(fabric.setup(compiled(network()))), scores(network()))


def test_accelerate():
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    assert torch.equal(scores(accelerator.prepare(network())), scores(network()))


def test_sharded_parameters_are_refused():
    class FullyShardedDataParallel(nn.Sequential):
        pass

    class DTensor(nn.Parameter):
        pass

    with pytest.raises(InputError, match=r"spread over processes in '1' \(FullyShardedDataParallel\)"):
        unwrapped(nn.Sequential(nn.ReLU(), FullyShardedDataParallel(nn.Linear(2, 2))))
    layer = nn.Linear(2, 2, bias=False)
    layer._parameters["weight"] = DTensor(torch.zeros(2, 2))
    with pytest.raises(InputError, match=r"pass full state dicts"):
        scores(layer)
