"""Per-example gradients from one batched forward and backward pass.

Forward hooks keep each layer's inputs; the backward pass brings the gradient of its outputs; the layer's rule
(see `layers`) makes blocks of the two. Weight gradients themselves are never computed: the parameters do not
require gradients. The graph hangs on a scalar, the anchor, that a tap ties to the output of every attributed
layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from trak.batches import batch_size, flatten, take
from trak.blocks import DenseBlock
from trak.errors import GradientError, TrakError, UnsupportedLayerError
from trak.gradients.alone import laid_out
from trak.gradients.base import Consume, Gradients, Outputs, forward, random_state_kept
from trak.gradients.layers import RULES, LayerRule
from trak.gradients.local import Local, LocalWatch
from trak.gradients.plan import Plan, make_plan
from trak.gradients.swap import LENDING, lend
from trak.gradients.watch import Watch
from trak.tasks.base import Task


@dataclass(frozen=True)
class Hooked(Gradients):
    """Gradients by layer rules: fast, for models made of known layers.

    Rows of a layer's input belong to examples as follows. As many rows as examples, or a multiple (then
    consecutive rows belong to one example): as they are. A leading dimension of 1, no batch dimension at all,
    or position indices made in the forward pass: they serve all examples, and are expanded to one copy per
    example. Anything else is refused. `check_first_batch` verifies what comes of it.

    Attributes:
        rules: layer rules; a module is given to the first that covers any of its attributed parameters.
        local: modules with a pass of their own for the parameters named there, which no rule covers. `Auto` and
            the first-batch check find them (see `trak.gradients.mixed`).
        expanded: canonical names of parameters [1, ...] that the forward pass is given as one copy per example,
            [B, ...] (class tokens, position tables): autograd then keeps the examples apart by itself.
        routed: canonical names of parameters whose layers are given rows of several examples in any order, such as a
            mixture's experts: a second backward pass tells which row is whose (see `trak.gradients.owners`).
    """

    rules: tuple[LayerRule, ...] = field(default=RULES, repr=False)
    local: tuple[Local, ...] = ()
    expanded: tuple[str, ...] = ()
    routed: tuple[str, ...] = ()

    def candidates(self, model: nn.Module, names: Sequence[str]) -> tuple[Gradients, ...]:
        """Itself, if every parameter is covered.

        Raises:
            UnsupportedLayerError: one is not.
        """
        self._plan(model, names)
        return (self,)

    def covers(self, model: nn.Module, names: Sequence[str]) -> list[str]:
        """Those of `names` that no rule covers: an empty list says that the model can be hooked."""
        return list(self._planned(model, names).uncovered)

    def compute(
        self,
        model: nn.Module,
        state: Mapping[str, Tensor],
        task: Task,
        batch: Any,
        names: Sequence[str],
        consume: Consume,
    ) -> Outputs:
        """Blocks in the order in which the backward pass reaches the layers; see `Gradients.compute`.

        Raises:
            UnsupportedLayerError: no rule covers a parameter.
            GradientError: a layer's input cannot be split into examples, or was overwritten after the layer
                had read it.
        """
        plan = self._plan(model, names)
        size = batch_size(batch)
        expanded = [name for name in self.expanded if name in names]
        detached = {name: tensor.detach() for name, tensor in state.items()}
        leaves = {
            name: detached[name].expand(size, *state[name].shape[1:]).requires_grad_() for name in expanded
        }
        watch = Watch(
            size, consume, {leaf.untyped_storage().data_ptr() for leaf in flatten(batch)[0]}, _device(batch)
        )
        watch.blamed.extend(expanded)
        # An ordinary gradient says whether f depends on them at all: a pass through the whole model is dear.
        whole = {
            name: state[name].detach().requires_grad_()
            for local in self.local
            if not local.module
            for name in local.parameters
            if name in names
        }
        locals_ = LocalWatch(model, _wanted(self.local, names), size, watch.blamed)
        with random_state_kept(state), torch.enable_grad():
            with lend(model, {**detached, **whole, **leaves}):
                with (
                    watch.on(plan.layers),
                    watch.stepping(plan.stepped),
                    locals_.watching(watch.anchor),
                    laid_out(size),
                ):
                    f, q = watch.forward(task, model, batch)
                if f.requires_grad:
                    found = _backward(f, watch, {**whole, **leaves})
                    watch.owners.deliver(consume)
                    locals_.forget([name for name in whole if name not in found])
                    for name, gradient in found.items():
                        if name in leaves:
                            consume(DenseBlock(name, tuple(state[name].shape), gradient.unsqueeze(1)))
            if locals_.locals:
                # The state as it is, without expanded parameters: a local pass sees one example at a time.
                with lend(model, detached):
                    if size > 1:
                        _probe(locals_, task, model, batch, size)
                    locals_.pull_back(consume)
        return Outputs(f.detach(), q)

    def _planned(self, model: nn.Module, names: Sequence[str]) -> Plan:
        with LENDING:
            return make_plan(
                *(model, names, self.rules),
                elsewhere={path for local in self.local for path, _ in local.slots},
                expanded=self.expanded,
                routed=self.routed,
            )

    def _plan(self, model: nn.Module, names: Sequence[str]) -> Plan:
        plan = self._planned(model, names)
        if plan.uncovered:
            name, module = next(iter(plan.uncovered.items()))
            more = f" (and {len(plan.uncovered) - 1} more)" if len(plan.uncovered) > 1 else ""
            raise UnsupportedLayerError(
                f"no layer rule covers parameter {name!r} of {type(module).__name__}{more}. Use "
                "gradients=trak.gradients.Auto(), which gives such modules a pass of their own, or "
                "trak.gradients.Functional(), which takes any layer; or leave the parameter out "
                "with parameters=...; or write a rule and pass Hooked(rules=(MyRule(), *RULES))"
            )
        return plan


def _wanted(locals_: Sequence[Local], names: Sequence[str]) -> list[Local]:
    """The local passes that are left where only `names` are attributed."""
    wanted = set(names)
    kept = [replace(each, slots=tuple(s for s in each.slots if s[1] in wanted)) for each in locals_]
    return [local for local in kept if local.slots]


def _backward(f: Tensor, watch: Watch, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backward passes under hooks; gradients of the leaves that f depends on."""
    owners = watch.owners
    try:
        _, _, *gradients = torch.autograd.grad(
            f.sum(),
            [watch.anchor, owners.anchor, *leaves.values()],
            allow_unused=True,
            retain_graph=bool(owners.calls),
        )
        owners.trace(f)
    except CheckpointError as error:
        raise GradientError(
            "activation checkpointing (torch.utils.checkpoint) computes layers again without their "
            "hooks. Switch it off, or use gradients=trak.gradients.Reference()"
        ) from error
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise GradientError(
            "under hooks a tensor that the backward pass needs is modified in place. Avoid in-place operations "
            "(x += y, inplace=True) or use gradients=trak.gradients.Functional()"
        ) from error
    return {name: gradient for name, gradient in zip(leaves, gradients) if gradient is not None}


def _probe(watch: LocalWatch, task: Task, model: nn.Module, batch: Any, size: int) -> None:
    """Forward passes of batches of other sizes, which show what belongs to the examples."""
    with watch.probing(1):
        forward(task, model, take(batch, slice(0, 1)), 1)
    if watch.fits():
        return
    # A lone example without padding may have no mask, for instance; the batch and one more are like the batch.
    more = torch.cat([torch.arange(size), torch.zeros(1, dtype=torch.int64)])
    try:
        with watch.probing(size + 1):
            forward(task, model, take(batch, more), size + 1)
    except TrakError:
        raise
    except RuntimeError:
        # Outputs were expanded where they must not be; the comparison of shapes will tell of which module.
        return


def _device(batch: Any) -> torch.device:
    return flatten(batch)[0][0].device
