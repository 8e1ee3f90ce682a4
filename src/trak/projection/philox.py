r"""Philox4x32-10: random words as a pure function of key and counter (Salmon, Moraes, Dror, Shaw; SC 2011).

Scheme, enough to write it again in any language:

    text     = "trak-projection\n{kind}\n{version}\n{seed}\n{checkpoint}\n{role}\n{name}" in UTF-8,
               \n one newline each and none at the end, integers in decimal. A role may be empty;
               only the name, which is last, may hold a newline.
    key      = of the SHA-256 of text, bytes 0 to 3 (little-endian) as word 0 and bytes 4 to 7 as word 1
    counter  = (a mod 2^32, a div 2^32, b, lane), all that a kind needs to say which numbers it draws
    words    = four 32-bit words per counter, by ten rounds of

        hi0:lo0 = 0xD2511F53 · c0        hi1:lo1 = 0xCD9E8D57 · c2          (64-bit products)
        (c0, c1, c2, c3) = (hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0)
        (k0, k1) = (k0 + 0x9E3779B9, k1 + 0xBB67AE85) mod 2^32               (after each round)

What a, b and the lane are, each kind says: for a dense matrix a = row div 128, where `row` is the flattened
(row-major) index of an entry within its parameter, and b = the column.

The arithmetic is 64-bit integers that hold 32-bit words. NumPy on the CPU (faster there, and unsigned) and
PyTorch elsewhere (signed: products wrap, which leaves all 64 bits right, and the arithmetic right shift is
masked) run the same lines.

Legend: n values of a, c values of b.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import gcd
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF

BLOCK_ROWS = 128
"""Rows of a dense matrix that share the first two counter words."""

Key = tuple[int, int]


def derive_key(kind: str, version: int, seed: int, checkpoint: int, name: str, role: str = "") -> Key:
    """(key word 0, key word 1): 64 bits of SHA-256 over all that tells one random matrix from another."""
    text = f"trak-projection\n{kind}\n{version}\n{seed}\n{checkpoint}\n{role}\n{name}"
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def philox4x32(counters: Sequence[Tensor], key: Key) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of each counter.

    Args:
        counters: four int64 tensors of one shape and device, each value in [0, 2^32).
        key: two words in [0, 2^32).

    Returns:
        Four int64 tensors of the same shape, each value in [0, 2^32).
    """
    buffers: list[Any] = [counter.clone() for counter in counters]
    buffers += [torch.empty_like(buffers[0]), torch.empty_like(buffers[0])]
    if buffers[0].device.type == "cpu":
        arrays = _rounds(np, [buffer.numpy().view(np.uint64) for buffer in buffers], key)
        a, b, c, d = (torch.from_numpy(array.view(np.int64)) for array in arrays)
    else:
        a, b, c, d = _rounds(torch, buffers, key)
    return a, b, c, d


def draw_words(key: Key, first_n: Tensor, second: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Words of counters (a, b, lane 0): four int64 tensors [n, c], for a in first_n int64 [n], b from 0 to c - 1."""
    first_nc = first_n[:, None].expand(-1, second)
    second_nc = torch.arange(second, device=first_n.device).expand(first_n.shape[0], -1)
    return philox4x32((first_nc & MASK, first_nc >> 32, second_nc, torch.zeros_like(first_nc)), key)


def blocks_of_rows(rows_n: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Where rows of a table of so many columns lie: (their blocks [n, m] int64, where each row begins in the first of its blocks [n]).

    All rows have as many blocks as the row with the most; the last may lie behind the row.
    """
    most = -(-(BLOCK_ROWS - gcd(width, BLOCK_ROWS) + width) // BLOCK_ROWS)
    first_n = rows_n * width
    return first_n[:, None] // BLOCK_ROWS + torch.arange(most, device=rows_n.device), first_n % BLOCK_ROWS


def _rounds(xp: Any, buffers: list[Any], key: Key) -> list[Any]:
    """Ten rounds in place over six arrays of library `xp` (numpy or torch): four counters and two of scratch.

    Nothing is allocated: the six buffers swap roles instead.
    """
    c0, c1, c2, c3, t0, t1 = buffers
    is_signed = xp is torch
    word = int if is_signed else np.uint64
    k0, k1 = key
    for _ in range(ROUNDS):
        xp.multiply(c0, word(MULTIPLIERS[0]), out=t0)
        xp.multiply(c2, word(MULTIPLIERS[1]), out=t1)
        xp.bitwise_and(t1, word(MASK), out=c0)
        xp.bitwise_and(t0, word(MASK), out=c2)
        t1 >>= word(32)
        t0 >>= word(32)
        if is_signed:
            t1 &= MASK
            t0 &= MASK
        t1 ^= c1
        t1 ^= word(k0)
        t0 ^= c3
        t0 ^= word(k1)
        c0, c1, c2, c3, t0, t1 = t1, c0, t0, c2, c1, c3
        k0 = (k0 + WEYL[0]) & MASK
        k1 = (k1 + WEYL[1]) & MASK
    return [c0, c1, c2, c3]
