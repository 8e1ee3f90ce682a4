"""Every source of gradients against the oracle, over a crossed table of layers and models."""

import pytest
import torch

from trak.gradients import Auto, Functional, Gradients, Hooked, Reference
from trak.testing.cases import CASES, LOCAL_CASES, Case
from trak.testing.gradients import GradientsContract, collect


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small take longer in two
    yield
    torch.set_num_threads(threads)


class TestReference(GradientsContract):
    def make(self) -> Gradients:
        return Reference()


class TestFunctional(GradientsContract):
    def make(self) -> Gradients:
        return Functional()


class TestFunctionalInChunks(GradientsContract):
    def make(self) -> Gradients:
        return Functional(chunk_size=2)


class TestAuto(GradientsContract):
    """Local passes and expanded parameters, that is; layers with rules are tested above."""

    def make(self) -> Gradients:
        return Auto()

    def cases(self):
        return LOCAL_CASES


class TestHooked(GradientsContract):
    def make(self) -> Gradients:
        return Hooked()

    def cases(self):
        return [case for case in CASES if case.hooked]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(
    "gradients", [Functional(), Functional(2), Hooked()], ids=["functional", "chunks", "hooked"]
)
def test_gradients_are_those_of_the_reference(gradients: Gradients, case: Case) -> None:
    if isinstance(gradients, Hooked) and not case.hooked:
        pytest.skip("no layer rules for this one")
    model, batch = case.build(batch_size=4, seed=1)
    outputs, got = collect(gradients, model, batch)
    expected, wanted = collect(Reference(), model, batch)
    torch.testing.assert_close(outputs.f, expected.f, rtol=1e-10, atol=1e-12)
    for name, values in wanted.items():
        assert values.abs().max() > 1e-6, f"the case gives {name} no gradient to compare"
        torch.testing.assert_close(got[name], values, rtol=1e-10, atol=1e-10 * float(values.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "gradients", [Functional(), Hooked(), Reference(), Auto()], ids=lambda g: type(g).__name__
)
@pytest.mark.parametrize("name", ["residual network", "tied language model"])
def test_lower_precisions(gradients: Gradients, name: str, dtype: torch.dtype) -> None:
    case = next(case for case in CASES if case.name == name)
    exact_model, exact_batch = case.build()
    model, batch = case.build(dtype=dtype)
    _, wanted = collect(Reference(), exact_model, exact_batch)
    outputs, got = collect(gradients, model, batch)
    assert outputs.f.dtype == dtype
    total = sum(float(values.square().sum()) for values in wanted.values())
    error = sum(float((got[name].double() - values).square().sum()) for name, values in wanted.items())
    assert (error / total) ** 0.5 < (1e-4 if dtype == torch.float32 else 0.2)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_auto_is_hooked_alone_where_rules_cover_everything(case: Case) -> None:
    model, _ = case.build()
    first = Auto().candidates(model, [name for name, _ in model.named_parameters()])[0]
    assert isinstance(first, Hooked)
    assert (first == Hooked()) == (case.hooked or case.name == "weight used outside its layer")
