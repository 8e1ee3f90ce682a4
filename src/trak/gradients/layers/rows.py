"""Rows in any order, sorted by the group that each belongs to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SortedRows:
    """Where rows go so that those of one group are consecutive, with as many places for every group.

    Attributes:
        rows: [m], those that belong to some group, sorted by it.
        places: [m], where each of them goes.
        groups: G.
        most: rows of the largest group.
    """

    rows: Tensor
    places: Tensor
    groups: int
    most: int

    @staticmethod
    def by(group_n: Tensor, groups: int) -> SortedRows:
        """group_n: [n] int64; -1 for a row that belongs to none."""
        known = int((group_n >= 0).sum())
        order_n = group_n.argsort(stable=True)[len(group_n) - known :]
        group_m = group_n[order_n]
        counts_G = group_m.bincount(minlength=groups)
        first_G = counts_G.cumsum(0) - counts_G
        within_m = torch.arange(known, device=group_n.device) - first_G[group_m]
        most = int(counts_G.max()) if known else 0
        return SortedRows(order_n, group_m * most + within_m, groups, most)

    def __call__(self, values: Tensor) -> Tensor:
        """[n, ...] -> [G · most, ...]: the rows in their places, zeros in places that are left."""
        out = values.new_zeros(self.groups * self.most, *values.shape[1:])
        return out.index_copy_(0, self.places, values[self.rows])
