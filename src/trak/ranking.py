"""The strongest rows of each target, kept up while blocks of scores come by.

Shape legend: N training rows, R rows of one block, T targets, k rows kept; g groups of r rows, p pairs of a group and a target, c candidates of u
targets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trak.errors import InputError

FIRST_ROWS = 256
"""Rows that are sorted before there is anything to compare with."""

GROUP_ROWS = 32
"""Rows whose extreme is compared first."""


@dataclass(frozen=True, eq=False)
class Ranking:
    """For each target, k training rows in order.

    Attributes:
        rows: [T, k] int64.
        scores: [T, k].
    """

    rows: Tensor
    scores: Tensor

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows [k], scores [k]) of each target in turn."""
        return iter(zip(self.rows, self.scores))

    def __len__(self) -> int:
        return self.rows.shape[0]


@dataclass(frozen=True, eq=False)
class Extremes:
    """Both ends of the scores of each target, from one pass.

    Attributes:
        top: the most positive rows, strongest first.
        bottom: the most negative rows, most negative first.
    """

    top: Ranking
    bottom: Ranking

    def __iter__(self) -> Iterator[Ranking]:
        """Top, then bottom: `top, bottom = scores.extremes(k)`."""
        return iter((self.top, self.bottom))


def rank_blocks(
    blocks: Iterable[tuple[int, Tensor]], num_targets: int, k: int, *sides: bool
) -> tuple[Ranking, ...]:
    """The k largest (side True) or smallest (False) scores of each target for each side; equal scores in row order.

    One pass over row blocks that keeps k candidates per target and side. A stable sort of the candidates (whose rows come first) and
    those of the block gives the same answer for every block size. Once k candidates are there, only scores that beat the last of them are
    sorted at all; of n scores in any order these are about k·ln(n/k), so that the price of a block is a look at it.

    Args:
        blocks: (first row, scores [R, T]) in row order.
        num_targets: T.
        k: rows to keep, at least 1.
        sides: True for largest, False for smallest.

    Raises:
        InputError: k is no whole number, or below 1.
    """
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise InputError(f"k must be a whole number ≥ 1; got {k!r}")
    kept = [_Kept(num_targets, k, largest) for largest in sides]
    for start, block_RT in blocks:
        for each in kept:
            each.add(start, block_RT)
    return tuple(each.ranking() for each in kept)


class _Kept:
    """The k extreme scores of each target so far, in order."""

    def __init__(self, num_targets: int, k: int, largest: bool) -> None:
        self.k, self.largest, self.seen = k, largest, 0
        self.rows_Tk = torch.empty(num_targets, 0, dtype=torch.int64)
        self.best_Tk = torch.empty(num_targets, 0)

    def ranking(self) -> Ranking:
        return Ranking(self.rows_Tk, self.best_Tk)

    def add(self, start: int, block_RT: Tensor) -> None:
        """Look at the next block: in parts no longer than what was seen before, so that most of a part is no candidate."""
        low = 0
        while low < len(block_RT):
            part_rT = block_RT[low : low + max(FIRST_ROWS, self.seen)]
            if self.best_Tk.shape[1] < self.k:
                self._fill(start + low, part_rT)
            else:
                self._replace(start + low, part_rT)
            low += len(part_rT)
            self.seen += len(part_rT)

    def _fill(self, start: int, part_rT: Tensor) -> None:
        """While there are fewer than k candidates: the extremes of the part and those so far, sorted."""
        values, rows = _extremes_of_block(part_rT.T.contiguous(), self.k, largest=self.largest)
        values = torch.cat([self.best_Tk.to(values.dtype), values], dim=1)
        rows = torch.cat([self.rows_Tk, rows + start], dim=1)
        self.best_Tk, self.rows_Tk = self._sorted(values, rows)

    def _replace(self, start: int, part_rT: Tensor) -> None:
        """Scores that beat a target's last candidate take their places among them."""
        whole = len(part_rT) // GROUP_ROWS * GROUP_ROWS
        if whole:
            self._replace_groups(start, part_rT[:whole].unflatten(0, (-1, GROUP_ROWS)))
        if whole < len(part_rT):
            self._replace_groups(start + whole, part_rT[whole:].unsqueeze(0))

    def _replace_groups(self, start: int, part_grT: Tensor) -> None:
        """One look at all scores, for the extremes of each group of rows, and another at the groups that have a candidate."""
        last_T = self.best_Tk[:, -1]
        extreme_gT = part_grT.amax(1) if self.largest else part_grT.amin(1)
        group_p, target_p = self._beats(extreme_gT, last_T).nonzero(as_tuple=True)
        if len(target_p) == 0:
            return
        values_pr = part_grT[group_p, :, target_p]
        pair_c, row_c = self._beats(values_pr, last_T[target_p][:, None]).nonzero(as_tuple=True)
        values_c = values_pr[pair_c, row_c]
        row_c, target_c = row_c + group_p[pair_c] * part_grT.shape[1] + start, target_p[pair_c]
        self._insert(values_c, row_c, target_c)

    def _beats(self, values: Tensor, last: Tensor) -> Tensor:
        """Whether values come before the last candidates. Later rows lose ties; NaN, which sorts as the largest, is not passed over."""
        return ~(values <= last if self.largest else values >= last)

    def _insert(self, values_c: Tensor, row_c: Tensor, target_c: Tensor) -> None:
        """Put values, in row order for each target, among the candidates of their targets."""
        order_c = target_c.argsort(stable=True)
        values_c, row_c, target_c = values_c[order_c], row_c[order_c], target_c[order_c]
        at_u, place_c, counts_u = target_c.unique_consecutive(return_inverse=True, return_counts=True)
        slot_c = torch.arange(len(target_c)) - (counts_u.cumsum(0) - counts_u)[place_c]
        # What fills up is no better than any of the k candidates, and comes after them.
        values_uc = values_c.new_full((len(at_u), int(counts_u.max())), _worst(values_c.dtype, self.largest))
        rows_uc = torch.zeros(values_uc.shape, dtype=torch.int64)
        values_uc[place_c, slot_c] = values_c
        rows_uc[place_c, slot_c] = row_c
        self.best_Tk[at_u], self.rows_Tk[at_u] = self._sorted(
            torch.cat([self.best_Tk[at_u], values_uc], dim=1), torch.cat([self.rows_Tk[at_u], rows_uc], dim=1)
        )

    def _sorted(self, values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The first k, equal values in the order given."""
        ordered, order = values.sort(dim=1, descending=self.largest, stable=True)
        return ordered[:, : self.k].contiguous(), rows.gather(1, order[:, : self.k])


def _worst(dtype: torch.dtype, largest: bool) -> float | int:
    if dtype.is_floating_point:
        return float("-inf") if largest else float("inf")
    return torch.iinfo(dtype).min if largest else torch.iinfo(dtype).max


def _extremes_of_block(values_TR: Tensor, k: int, *, largest: bool) -> tuple[Tensor, Tensor]:
    """The k extreme values of each target and their positions, by position; equal values at the edge go to the first positions."""
    k = min(k, values_TR.shape[1])
    best_Tk, where_Tk = values_TR.topk(k, dim=1, largest=largest, sorted=False)
    edge_T1 = best_Tk.amin(1, keepdim=True) if largest else best_Tk.amax(1, keepdim=True)
    at_least_TR = values_TR >= edge_T1 if largest else values_TR <= edge_T1
    if bool((at_least_TR.sum(1) != k).any()):
        # More values equal the edge than there is room for, or it is NaN, which equals nothing: topk takes any of them.
        where_Tk = values_TR.sort(dim=1, descending=largest, stable=True).indices[:, :k]
    where_Tk = where_Tk.sort(dim=1).values
    return values_TR.gather(1, where_Tk), where_Tk
