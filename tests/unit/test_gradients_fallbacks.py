"""How many ways the first batch tries before one fits, and what is kept of those that did not."""

import gc
import weakref

import torch
from torch import nn

import trak
from trak.gradients import Hooked, check, model_state, select_parameters
from trak.testing.gradients import collect


class Scan(nn.Module):
    """A recurrent block that `vmap` cannot run: what it needs is decided by values."""

    def __init__(self, width):
        super().__init__()
        self.decay = nn.Parameter(torch.rand(width))

    def forward(self, x):
        state = x[:, 0]
        for step in range(1, x.shape[1]):
            state = state * self.decay + x[:, step]
            if bool((state > 1e6).any()):
                state = state / 2
        return x + state.unsqueeze(1)


def stack(make, depth=4):
    torch.manual_seed(0)
    blocks = nn.Sequential(*(nn.Sequential(make(6), nn.Tanh()) for _ in range(depth)))
    model = nn.Sequential(blocks, nn.Flatten(), nn.Linear(18, 3)).double().eval()
    return model, (torch.randn(5, 3, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1]))


def attempts(monkeypatch, model, batch):
    """The source found, and what was tried."""
    tried, compare = [], check._compare
    monkeypatch.setattr(
        check, "_compare", lambda source, *rest: (tried.append(source), compare(source, *rest))[1]
    )
    task, names = trak.ImageClassification(), list(select_parameters(model))
    source = trak.gradients.check_first_batch(
        trak.Auto(), model, model_state(model, None, "cpu"), task, batch, names
    )
    wanted = collect(trak.Reference(), model, batch, task=task)[1]
    for name, values in collect(source, model, batch, task=task)[1].items():
        torch.testing.assert_close(values, wanted[name], rtol=1e-9, atol=1e-12)
    return source, tried


def test_modules_of_a_class_that_vmap_cannot_run_move_together(monkeypatch):
    source, tried = attempts(monkeypatch, *stack(Scan))
    assert isinstance(source, Hooked)
    assert [local.one_by_one for local in source.local] == [True] * 4
    assert len(tried) == 2


class Block(nn.Module):
    """Its norm's weight is used outside of the norm, too, as much as `share` says."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.share = 1.0

    def forward(self, x):
        return self.norm(x) * (1 + self.share * self.norm.weight.sum())


def test_blocks_of_a_sequence_move_together(monkeypatch):
    model, batch = stack(Block)
    model[0][2][0].share = 0.0  # the first batch does not show what is wrong with this one
    source, _ = attempts(monkeypatch, model, batch)
    assert isinstance(source, Hooked)
    assert sorted(local.module for local in source.local) == [f"0.{i}.0" for i in range(4)]


def test_attempts_that_failed_keep_no_gradients(monkeypatch):
    kept, compare = [], check._compare

    def watched(source, model, state, task, batch, names, expected):
        held = torch.zeros(3)
        kept.append(weakref.ref(held))
        compare(source, model, state, task, batch, names, expected)

    monkeypatch.setattr(check, "_compare", watched)
    found = []
    monkeypatch.setattr(
        check.logger, "warning", lambda *words: found.append([gc.collect(), *(ref() for ref in kept)])
    )
    model, batch = stack(Block)
    trak.gradients.check_first_batch(
        trak.Auto(),
        model,
        model_state(model, None, "cpu"),
        trak.ImageClassification(),
        batch,
        list(select_parameters(model)),
    )
    assert len(kept) > 1
    assert found
    assert all(held is None for held in found[0][1:])
