"""Margins of many classes a block of rows at a time, so that a vocabulary's logits are not copied over and over.

Shape legend: B rows (examples, or positions of them), C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

CPU_BLOCK = 2**18
"""Logits of a block on a processor: as many as stay in its cache."""
DEVICE_BLOCK = 2**26
"""The same on other devices, where every block costs calls."""


def blocked_margin(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """log(p_y / (1 − p_y)) of labels 0 to C − 1, [B], like the logits in dtype; what `margins.margin_as_written` says in torch's operations.

    Those allocate five tensors as large as the logits, which for language models are the largest there are, in a forward and a backward
    pass. Here the logits' gradient is the only one.
    """
    return _Margin.apply(logits_BC, labels_B)[0]


class _Margin(torch.autograd.Function):
    """(margins [B], logsumexp of the other logits [B]), float32 inside where the logits are in half precision.

    With p = exp(logits − logsumexp of the others), the derivative of the margin is 1 for the label's own logit and −p for the others, that of
    the logsumexp is p. The second output makes the backward pass a function of inputs and outputs alone, and so differentiable; all of it
    can be vmapped.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(logits_BC: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        others_B = torch.cat([_others(*block) for block in _blocks(logits_BC, labels_B)])
        own_B = logits_BC.gather(1, labels_B.unsqueeze(1)).squeeze(1)
        return (own_B - others_B).to(logits_BC.dtype), others_B

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.save_for_forward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, margin_grads_B: Tensor, others_grads_B: Tensor) -> tuple[Tensor, None]:
        logits_BC, labels_B, others_B = ctx.saved_tensors
        blocks = _blocks(logits_BC, labels_B, others_B, margin_grads_B, others_grads_B)
        return _joined((_gradient(*block) for block in blocks), len(logits_BC)), None

    @staticmethod
    def jvp(ctx: Any, tangents_BC: Tensor, _: None) -> tuple[Tensor, Tensor]:
        logits_BC, labels_B, others_B = ctx.saved_tensors
        blocks = _blocks(logits_BC, labels_B, others_B, tangents_BC)
        moved_B = torch.cat(
            [
                (_shares(logits, labels, others) * tangents).sum(1)
                for logits, labels, others, tangents in blocks
            ]
        )
        own_B = tangents_BC.gather(1, labels_B.unsqueeze(1)).squeeze(1)
        return (own_B - moved_B).to(logits_BC.dtype), moved_B


def _blocks(logits_BC: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """All of them in blocks of the same rows."""
    numbers = CPU_BLOCK if logits_BC.device.type == "cpu" else DEVICE_BLOCK
    rows = max(1, numbers // logits_BC.shape[1])
    return zip(*(tensor.split(rows) for tensor in (logits_BC, *others)))


def _joined(blocks_BC: Iterator[Tensor], rows: int) -> Tensor:
    """The blocks one below the other, [rows, C], none of them kept longer than it takes to copy it."""
    first_BC = next(blocks_BC)
    # Made from a block, so that it is mapped where blocks are.
    joined_BC = first_BC.new_empty((rows, first_BC.shape[1]))
    start = 0
    for block_BC in chain([first_BC], blocks_BC):
        joined_BC[start : start + len(block_BC)] = block_BC
        start += len(block_BC)
    return joined_BC


def _wide(logits_BC: Tensor) -> Tensor:
    """In float32 where they are in half precision: sums and exponentials of a vocabulary's logits."""
    return logits_BC.float() if logits_BC.dtype in (torch.float16, torch.bfloat16) else logits_BC


def _others(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Logsumexp of the logits but the labels', [B]."""
    return _wide(logits_BC).scatter(1, labels_B.unsqueeze(1), float("-inf")).logsumexp(1)


def _shares(logits_BC: Tensor, labels_B: Tensor, others_B: Tensor) -> Tensor:
    """The other classes' p, among themselves, [B, C]; 0 for the labels."""
    return (_wide(logits_BC) - others_B.unsqueeze(1)).exp().scatter(1, labels_B.unsqueeze(1), 0.0)


def _gradient(
    logits_BC: Tensor, labels_B: Tensor, others_B: Tensor, margin_grads_B: Tensor, others_grads_B: Tensor
) -> Tensor:
    """Of the logits, [B, C], from those of margins and logsumexp."""
    shares_BC = _shares(logits_BC, labels_B, others_B) * (others_grads_B - margin_grads_B).unsqueeze(1)
    own_B1 = margin_grads_B.unsqueeze(1).to(shares_BC.dtype)
    return shares_BC.scatter(1, labels_B.unsqueeze(1), own_B1).to(logits_BC.dtype)
