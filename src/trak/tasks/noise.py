"""Random numbers that belong to an example: a pure function of a seed and the example's own values.

The same for an example alone and among others, on every device, under vmap, and at every checkpoint; torch's generators are not touched.

Shape legend: B examples, n entries of an example, m numbers drawn per example.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Constants of the SplitMix64 generator (Steele, Lea, Flood 2014), as signed 64-bit integers; products wrap around.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64
_UNIT = 2**24


def example_keys(examples: Tensor, seed: int) -> Tensor:
    """A 64-bit key for each example's values, to about five digits behind the point, int64 [B]."""
    values_Bn = (examples.detach().flatten(1).float() * 65536).round().long()
    places_n = torch.arange(1, values_Bn.shape[1] + 1, device=values_Bn.device) * _STEP
    return _mix(_mix(values_Bn + places_n).sum(1) + _mix(torch.tensor(seed, device=values_Bn.device)))


def uniforms(keys_B: Tensor, count: int) -> Tensor:
    """Uniform numbers in (0, 1), float32 [B, count]."""
    return _fraction(_words(keys_B, count), 40)


def normals(keys_B: Tensor, count: int) -> Tensor:
    """Standard normal numbers (Box and Muller 1958), float32 [B, count]; another stream than `uniforms`."""
    words_Bm = _words(_mix(keys_B + 1), count)
    radius_Bm = (-2 * _fraction(words_Bm, 40).log()).sqrt()
    return radius_Bm * (2 * math.pi * _fraction(words_Bm, 8)).cos()


def _words(keys_B: Tensor, count: int) -> Tensor:
    """The first words of SplitMix64 from each key, int64 [B, count]."""
    return _mix(keys_B.unsqueeze(1) + torch.arange(1, count + 1, device=keys_B.device) * _STEP)


def _fraction(words: Tensor, shift: int) -> Tensor:
    """24 bits of each word as a number in (0, 1]."""
    return (((words >> shift) & (_UNIT - 1)).float() + 0.5) / _UNIT


def _mix(words: Tensor) -> Tensor:
    """SplitMix64's bijection of 64-bit words in which every output bit depends on every input bit."""
    words = (words ^ _shifted(words, 30)) * _FIRST
    words = (words ^ _shifted(words, 27)) * _SECOND
    return words ^ _shifted(words, 31)


def _shifted(words: Tensor, by: int) -> Tensor:
    """A shift to the right that brings in zeros: torch's own brings in the sign."""
    return (words >> by) & ((1 << (64 - by)) - 1)
