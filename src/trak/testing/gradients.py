"""A contract suite for sources of per-example gradients.

    from trak.testing.gradients import GradientsContract

    class TestMine(GradientsContract):
        def make(self):
            return MyGradients()

pytest collects the inherited tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trak.batches import batch_size
from trak.blocks import Block, upcast
from trak.gradients import Gradients, Outputs, Reference, model_state, select_parameters
from trak.testing.cases import CASES, Case
from trak.testing.models import Readout


def collect(
    gradients: Gradients,
    model: nn.Module,
    batch: Any,
    names: Sequence[str] | None = None,
    *,
    task: Any = None,
) -> tuple[Outputs, dict[str, Tensor]]:
    """Outputs and the dense gradients [B, *shape] of every attributed parameter, blocks of one name summed.

    names: canonical names; by default of all parameters, frozen or not.
    """
    state = model_state(model, None, "cpu")
    shapes = select_parameters(model, "*" if names is None else list(names))
    found = {name: state[name].new_zeros(batch_size(batch), *shape) for name, shape in shapes.items()}

    def consume(block: Block) -> None:
        if block.shape != shapes[block.name]:
            raise AssertionError(
                f"block {block.name!r} says {block.shape}, its parameter has {shapes[block.name]}"
            )
        found[block.name] += upcast(block, found[block.name].dtype).dense()

    outputs = gradients.compute(model, state, task or Readout(), batch, list(shapes), consume)
    return outputs, found


def snapshot(model: nn.Module) -> list[Any]:
    """Everything about a model that attribution must leave alone, comparable with ==.

    Identities, values, flags, hooks.
    """
    facts: list[Any] = []
    for name, module in model.named_modules():
        hooks = {key: list(value) for key, value in vars(module).items() if key.endswith("_hooks")}
        facts.append((name, module.training, sorted(vars(module)), hooks))
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                gradient = None if tensor.grad is None else (id(tensor.grad), tensor.grad.tolist())
                facts.append(
                    (key, id(tensor), tensor._version, tensor.tolist(), tensor.requires_grad, gradient)
                )
    return facts


class GradientsContract:
    """What any `Gradients` must do.

    Subclass, give `make`, and leave out cases that the source does not cover.
    """

    rtol = 1e-10

    def make(self) -> Gradients:
        """The source under test."""
        raise NotImplementedError

    def cases(self) -> Sequence[Case]:
        """Cases that the source covers."""
        return CASES

    def test_agrees_with_reference(self) -> None:
        """Gradients, f and q are those of one example at a time, in float64."""
        for case in self.cases():
            model, batch = case.build()
            got, wanted = collect(self.make(), model, batch), collect(Reference(), model, batch)
            for name in wanted[1]:
                self._close(got[1][name], wanted[1][name], f"{case.name}: {name}")
            self._close(got[0].f, wanted[0].f, f"{case.name}: f")
            self._close(got[0].q, wanted[0].q, f"{case.name}: q")

    def test_subset_of_parameters(self) -> None:
        """Attributing a few parameters gives the same numbers as attributing all, and no other blocks."""
        for case in self.cases():
            model, batch = case.build()
            _, every = collect(self.make(), model, batch)
            chosen = list(every)[-1:]
            _, some = collect(self.make(), model, batch, chosen)
            for name in chosen:
                self._close(some[name], every[name], f"{case.name}: {name}")

    def test_split_of_the_batch(self) -> None:
        """A batch of five gives what two and three give."""
        for case in self.cases():
            model, (inputs,) = case.build(batch_size=5)
            _, whole = collect(self.make(), model, (inputs,))
            parts = [collect(self.make(), model, (part,))[1] for part in (inputs[:2], inputs[2:])]
            for name, values in whole.items():
                self._close(torch.cat([part[name] for part in parts]), values, f"{case.name}: {name}")

    def test_frozen_parameters(self) -> None:
        """Selected parameters have gradients also if they do not require any."""
        for case in self.cases():
            model, batch = case.build()
            _, wanted = collect(self.make(), model, batch)
            _, got = collect(self.make(), model.requires_grad_(False), batch)
            for name, values in wanted.items():
                self._close(got[name], values, f"{case.name}: {name}")

    def test_model_and_generator_untouched(self) -> None:
        """Parameters, flags, gradients, hooks, buffers, modes and the random state are as before."""
        for case in self.cases():
            model, batch = case.build()
            model.train()
            next(model.modules()).training = False
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            before, random_before = snapshot(model), torch.get_rng_state()
            collect(self.make(), model, batch)
            if snapshot(model) != before:
                raise AssertionError(f"{case.name}: the model was changed")
            if not torch.equal(torch.get_rng_state(), random_before):
                raise AssertionError(f"{case.name}: the random state was changed")

    def _close(self, got: Tensor, wanted: Tensor, what: str) -> None:
        scale = float(wanted.abs().max()) if wanted.numel() else 0.0
        torch.testing.assert_close(
            got, wanted, rtol=self.rtol, atol=self.rtol * scale, msg=lambda message: f"{what}: {message}"
        )
