"""Which example does each row of a layer's input belong to? Found by backward passes, for layers that are given rows of several.

An expert of a mixture is given the tokens that a router sends it, whosever they are: [n, ...] with n and the order different
for every batch. That cannot be read off shapes or values (examples may have equal tokens). It can be read off gradients. With

    Σ_b f_b     and     Σ_b 2^{k_b} f_b,    k_b a number of its own for each example b,

the gradient of a row of example b in the second backward pass is 2^{k_b} times that in the first, whatever lies between: a backward
pass is linear, and a power of two changes the exponents of floating-point numbers and no digit. A row whose two gradients are
not such multiples belongs to several examples, and is refused; one without gradient contributes nothing to anybody.

The price is the part of a backward pass above these layers; two parts for more than 64 examples, and so on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from trak.errors import NonFiniteError
from trak.gradients.base import BlamedError, Consume
from trak.gradients.layers import LayerCall, LayerRule
from trak.gradients.layers.rows import SortedRows

_DIGITS = {torch.float16: 8}
_MOST_DIGITS = 64
"""Different powers of two in one backward pass, from 2^0 on: float16 overflows at 2^16, all other types beyond 2^127."""

_MIXED = {torch.float64: 1e-6, torch.float32: 1e-3}
_MIXED_HALF = 0.1
"""How far a row may be from a multiple of its gradient: sums on GPUs may have another order in the other pass."""

_NOISE = {torch.float64: 1e-13, torch.float32: 1e-6}
_NOISE_HALF = 1e-3
"""Relative to the largest row: gradients that are zero but for rounding, and so are no multiples of each other."""


@dataclass(eq=False)
class Call:
    """One call of such a layer.

    Attributes:
        name: of the layer's module.
        module, rule, names: as of the layer.
        inputs: its first argument, detached, with n rows.
        others: its further tensors, [n, ...].
        version: of the inputs, to notice that they were overwritten.
        gradient: [n, ...], of its output, row by row, in the ordinary backward pass; None before it, or where none came.
        digits: of the number of each row's example, [n] for each pass with factors; -1 for a row without an example.
    """

    name: str
    module: nn.Module
    rule: LayerRule
    names: Mapping[str, str]
    inputs: Tensor
    others: tuple[Tensor, ...]
    version: int
    gradient: Tensor | None
    digits: list[Tensor]

    def rows(self, values: Tensor) -> Tensor:
        """Inputs, or a gradient of outputs, as [n, ...]."""
        event = self.rule.event_ndim(self.module)
        if self.inputs.ndim <= event:
            return values.unsqueeze(0)
        leading = self.inputs.ndim - event if self.rule.positions_are_rows else 1
        return values.flatten(0, leading - 1)

    @property
    def text(self) -> str:
        """For messages."""
        return f"layer {self.name!r} ({type(self.module).__name__})"


class _Tap(torch.autograd.Function):
    """Identity on a layer's output, in place; hands its gradients, of every backward pass, to `owners`."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, owners: Owners, call: Call) -> Tensor:
        ctx.owners, ctx.call = owners, call
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = gradients
        if gradient is not None:
            ctx.owners.receive(ctx.call, gradient)
        return gradient, None, None, None


class Owners:
    """The calls of layers with rows of several examples within one forward pass, and the backward passes that sort the rows.

    Attributes:
        size: B, more than 1.
        base: in which examples are numbered.
        anchor: scalar on which the taps hang: passes with factors go no deeper.
        calls: in the order of the forward pass.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.base = size, 1
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.calls: list[Call] = []

    def tap(
        self,
        name: str,
        module: nn.Module,
        rule: LayerRule,
        names: Mapping[str, str],
        inputs: Tensor,
        others: tuple[Tensor, ...],
        output: Tensor,
    ) -> Tensor:
        """The output as it is, in place; its gradients will be seen."""
        call = Call(name, module, rule, names, inputs, others, inputs._version, None, [])
        self.calls.append(call)
        return _Tap.apply(output, self.anchor, self, call)

    def receive(self, call: Call, gradient: Tensor) -> None:
        """A gradient of a layer's output: the ordinary one first, then those with factors."""
        gradient = call.rows(gradient)
        if call.gradient is None:
            call.gradient = gradient
            return
        if not gradient.numel():
            return
        digits_n, fits_n = digits_of(call.gradient.flatten(1), gradient.flatten(1), self.base)
        if not bool(fits_n.all()):
            if not bool(call.gradient.isfinite().all()):
                raise NonFiniteError(
                    f"the gradient of the output of {call.text} is NaN or infinite, so that its rows cannot be told apart. Look at "
                    "the checkpoint and the inputs; a model in float16 may overflow: try dtype=torch.float32"
                )
            raise BlamedError(
                f"{int((~fits_n).sum())} of {len(fits_n)} rows of the input of {call.text}, {list(call.inputs.shape)} in a batch "
                f"of {self.size} examples, belong to no single example. Use gradients=trak.gradients.Functional()",
                tuple(call.names.values()),
            )
        call.digits.append(digits_n)

    def trace(self, f: Tensor) -> None:
        """Backward passes of Σ_b 2^{k_b} f_b, after the ordinary one.

        Raises:
            BlamedError: a row belongs to several examples.
            NonFiniteError: a gradient is NaN or infinite.
        """
        self.calls = [call for call in self.calls if call.gradient is not None and call.gradient.numel()]
        if not self.calls:
            return
        types = {f.dtype, *(call.gradient.dtype for call in self.calls if call.gradient is not None)}
        self.base, passes = number_system(self.size, min(_DIGITS.get(each, _MOST_DIGITS) for each in types))
        numbers_B = torch.arange(self.size, device=f.device)
        for place in range(passes):
            factors_B = torch.ldexp(torch.ones_like(f), numbers_B // self.base**place % self.base)
            torch.autograd.grad(
                f, [self.anchor], factors_B, allow_unused=True, retain_graph=place + 1 < passes
            )

    def deliver(self, consume: Consume) -> None:
        """Blocks of all calls, by the layers' own rules: rows sorted by example, with zeros to fill up.

        Raises:
            BlamedError: an input was overwritten, or does not have a row for each of the output.
        """
        while self.calls:
            call = self.calls.pop()
            if call.inputs._version != call.version:
                raise BlamedError(
                    f"the input of {call.text} was modified in place after the layer had read it, so that its gradient cannot "
                    "be computed. Avoid in-place operations (x += y, inplace=True) on it",
                    tuple(call.names.values()),
                )
            for block in call.rule.blocks(self._sorted(call)):
                consume(block)

    def _sorted(self, call: Call) -> LayerCall:
        """The call with as many rows for every example, those of one example consecutive."""
        gradient = call.gradient
        assert gradient is not None
        inputs = call.rows(call.inputs)
        owner_n = torch.zeros_like(call.digits[0])
        for place, digits_n in enumerate(call.digits):
            owner_n += digits_n * self.base**place
        owner_n = torch.where(torch.stack(call.digits).amin(0) < 0, -1, owner_n)
        if inputs.shape[0] != len(owner_n) or bool((owner_n >= self.size).any()):
            raise BlamedError(
                f"{call.text} makes {list(gradient.shape)} of {list(call.inputs.shape)} in a batch of {self.size} examples, and "
                "which row belongs to which example cannot be told. Use gradients=trak.gradients.Functional()",
                tuple(call.names.values()),
            )
        by_example = SortedRows.by(owner_n, self.size)
        return LayerCall(
            call.module,
            by_example(inputs),
            by_example(gradient),
            call.names,
            self.size,
            tuple(by_example(other) for other in call.others),
        ).raised()


def digits_of(plain: Tensor, scaled: Tensor, base: int) -> tuple[Tensor, Tensor]:
    """(k [n], fits [n]): scaled = 2^k plain with 0 ≤ k < base, row by row.

    A row that is nothing but rounding beside others fits without a k: -1 stands for it.

    Args:
        plain: [n, F].
        scaled: [n, F].
        base: above every k.
    """
    mixed = _MIXED.get(plain.dtype, _MIXED_HALF)
    noise = _NOISE.get(plain.dtype, _NOISE_HALF)
    wide = plain.dtype if plain.dtype == torch.float64 else torch.float32
    plain, scaled = plain.to(wide), scaled.to(wide)
    size_n, scaled_size_n = plain.abs().amax(1), scaled.abs().amax(1)
    k_n = (scaled_size_n / size_n).log2().round().nan_to_num(0.0, 0.0, 0.0)
    within_n = (k_n >= 0) & (k_n < base)
    k_n = k_n.where(within_n, 0.0)
    distance_n = (torch.ldexp(plain, k_n[:, None]) - scaled).abs().amax(1)
    multiple_n = within_n & (distance_n <= mixed * scaled_size_n)
    nothing_n = size_n <= noise * size_n.max()
    return k_n.where(multiple_n, -1.0).long(), multiple_n | nothing_n


def number_system(size: int, most: int) -> tuple[int, int]:
    """(base, number of digits) in which B examples are numbered, with as few digits as a base up to `most` allows."""
    passes = 1
    while most**passes < size:
        passes += 1
    return min(most, ceil(size ** (1 / passes))), passes
