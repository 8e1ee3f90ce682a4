"""Random subsets of the training rows, as boolean masks [S, N]: which rows a retrained model sees."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from trak.errors import InputError
from trak.evaluation._values import check_count
from trak.evaluation.bootstrap import make_generator


def random_subsets(num_rows: int, num_subsets: int, fraction: float = 0.5, *, seed: int = 0) -> Tensor:
    """Subsets of a fixed size, drawn uniformly without replacement and independently of one another.

    Subset s depends on (seed, s) and the sizes alone: asking for more subsets leaves the first ones as they
    are.

    Args:
        num_rows: N, number of training rows.
        num_subsets: S, number of subsets.
        fraction: α, the share of rows in each subset, in (0, 1); every subset holds exactly floor(α·N) rows.
        seed: of the draw.

    Returns:
        masks [S, N], bool, on the CPU: True where the subset holds the row.

    Raises:
        InputError: a size below 1, or a fraction that leaves no row in (or out of) a subset.
    """
    check_count(num_rows, "num_rows", 1)
    check_count(num_subsets, "num_subsets", 1)
    check_count(seed, "seed", 0)
    size = subset_size(num_rows, fraction)
    masks = np.zeros((num_subsets, num_rows), dtype=np.bool_)
    for subset, mask in enumerate(masks):
        generator = np.random.Generator(np.random.PCG64([seed, subset]))
        mask[generator.permutation(num_rows)[:size]] = True
    return torch.from_numpy(masks)


def half_splits(num_rows: int, num_splits: int, *, seed: int = 0) -> Tensor:
    """Random halves followed by their complements, so that every row is in exactly one of each pair.

    With models trained on these, each row has as many models that saw it as models that did not: what
    memorisation and held-out outputs need.

    Args:
        num_rows: N, number of training rows, at least 2.
        num_splits: number of pairs.
        seed: of the draw.

    Returns:
        masks [2·num_splits, N], bool, on the CPU: row 2s is a half of floor(N/2) rows, row 2s + 1 all the
        others.

    Raises:
        InputError: a size out of range.
    """
    check_count(num_splits, "num_splits", 1)
    check_count(num_rows, "num_rows", 2)
    generator = make_generator(seed)
    masks = np.zeros((2 * num_splits, num_rows), dtype=np.bool_)
    for split in range(num_splits):
        masks[2 * split, generator.permutation(num_rows)[: num_rows // 2]] = True
        masks[2 * split + 1] = ~masks[2 * split]
    return torch.from_numpy(masks)


def subset_size(num_rows: int, fraction: float) -> int:
    """floor(fraction · num_rows), checked; the product is rounded first, so that 0.29 of 100 is 29.

    Raises:
        InputError: the fraction is not in (0, 1), or the subset would be empty.
    """
    if not 0 < fraction < 1:
        raise InputError(f"fraction must be between 0 and 1, got {fraction}. For half of the rows pass 0.5.")
    size = math.floor(round(fraction * num_rows, 9))
    if size < 1:
        raise InputError(f"fraction {fraction} of {num_rows} rows is none at all. Use a larger fraction.")
    return size
