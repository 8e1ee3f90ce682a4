"""Margins in blocks, compared with `margin_as_written`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, hessian, jacrev, vmap

import trak
from trak.tasks import blocked, margins
from trak.tasks.blocked import blocked_margin
from trak.tasks.margins import margin_as_written


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocked, "CPU_BLOCK", 20)


def logits_and_labels(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, dtype=torch.float64, generator=generator) * 3
    return logits, torch.randint(shape[-1], shape[:-1], generator=generator)


@given(rows=st.integers(1, 20), classes=st.integers(2, 30), seed=st.integers(0, 1000))
def test_margins_and_gradients_are_the_reference(rows, classes, seed):
    logits, labels = logits_and_labels(rows, classes, seed=seed)
    factors = torch.randn(rows, dtype=torch.float64)
    results = []
    for margin in (blocked_margin, margin_as_written):
        own = logits.clone().requires_grad_()
        values = margin(own, labels)
        results.append((values.detach(), *torch.autograd.grad(values @ factors, own)))
    torch.testing.assert_close(*results)


# torch's forward mode compiles functions in a way that it calls deprecated, when it is first used.
FORWARD_MODE = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


@FORWARD_MODE
def test_derivatives_of_every_kind():
    logits, labels = logits_and_labels(7, 5)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: blocked_margin(x, labels), logits, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: blocked_margin(x, labels), logits)


@FORWARD_MODE
@pytest.mark.parametrize("derivative", [grad, hessian])
def test_it_can_be_mapped(derivative):
    logits, labels = logits_and_labels(3, 7, 5)
    of = [
        vmap(derivative(lambda x, y, margin=margin: margin(x, y).sigmoid().sum()))(logits, labels)
        for margin in (blocked_margin, margin_as_written)
    ]
    torch.testing.assert_close(*of)


@FORWARD_MODE
def test_many_directions_at_one_place():
    logits, labels = logits_and_labels(6, 5)
    torch.testing.assert_close(
        jacrev(lambda x: blocked_margin(x, labels))(logits),
        jacrev(lambda x: margin_as_written(x, labels))(logits),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(dtype):
    logits, labels = logits_and_labels(6, 5000)
    exact = logits.to(dtype).double().requires_grad_()
    halved = logits.to(dtype).requires_grad_()
    values = blocked_margin(halved, labels)
    assert values.dtype == dtype
    reference = margin_as_written(exact, labels)
    # Rounded once, at the end.
    torch.testing.assert_close(values, reference.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)
    values.sum().backward()
    reference.sum().backward()
    assert halved.grad.dtype == dtype
    torch.testing.assert_close(
        halved.grad.double(), exact.grad, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny
    )


def test_certain_and_impossible_classes():
    logits = torch.tensor([[800.0, 0.0, -float("inf")], [0.0, 800.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([0, 2])
    values = blocked_margin(logits.requires_grad_(), labels)
    torch.testing.assert_close(values, torch.tensor([800.0, -800.0], dtype=torch.float64))
    values.sum().backward()
    expected = torch.tensor([[1.0, -1.0, 0.0], [0.0, -1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(logits.grad, expected)


class Tokens(nn.Module):
    """Logits of 23 words from the word before."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(23, 4)
        self.head = nn.Linear(4, 23)
        self.double()

    def forward(self, input_ids):
        return self.head(self.table(input_ids))


@pytest.mark.parametrize("gradients", [trak.Hooked(), trak.Functional()])
def test_features_of_a_language_model(monkeypatch, gradients):
    ids = torch.randint(23, (5, 9))
    features = []
    for large in (0, 10**9):
        monkeypatch.setattr(margins, "LARGE", large)
        traker = trak.TRAKer(
            Tokens(), "causal_lm", 5, save_dir=None, projector=trak.Identity(), gradient_computer=gradients
        )
        traker.load_checkpoint(Tokens().state_dict(), model_id=0)
        traker.featurize({"input_ids": ids, "labels": ids}, num_samples=5)
        traker.finalize_features()
        traker.start_scoring_checkpoint("ids", Tokens().state_dict(), model_id=0, num_targets=5)
        traker.score({"input_ids": ids, "labels": ids}, num_samples=5)
        features.append(traker.finalize_scores("ids"))
    torch.testing.assert_close(*(torch.as_tensor(x) for x in features), rtol=1e-5, atol=1e-8)
