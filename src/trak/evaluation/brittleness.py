"""How few training rows carry a prediction: the smallest removal that flips it.

Legend: N training rows, T targets, t chosen targets, k removed rows, R training seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trak.errors import InputError
from trak.evaluation._reading import (
    Rows,
    as_row_numbers,
    as_scores,
    as_tensor_positions,
    check_removals,
    top_rows,
)
from trak.evaluation._training import Retraining, Train, check_train, keep_in
from trak.evaluation._values import Floats, check_count
from trak.progress import bar

DEFAULT_MAX_FRACTION = 0.2


@dataclass(frozen=True)
class Flip:
    """What was found for one target.

    Attributes:
        target: its number.
        num_removed: the smallest number of removed rows at which the prediction was seen to flip; 0 if the
            models trained on all rows predict otherwise already; None if it did not flip.
        output: mean output over the search's seeds at `num_removed` (at the largest removal tried if None).
        verified: whether models with fresh seeds flip too without those rows; None where nothing flipped or
            there was nothing to remove.
        verified_output: their mean output; None where `verified` is.
        tried: mean output at each number of removed rows that was tried, 0 included.
    """

    target: int
    num_removed: int | None
    output: float
    verified: bool | None
    verified_output: float | None
    tried: Mapping[int, float]


@dataclass(frozen=True)
class BrittlenessResult:
    """What `brittleness` found.

    Attributes:
        flips: one for each chosen target.
        num_rows: N.
        max_removed: the largest number of rows that was allowed to go.
        threshold: below it a prediction counts as flipped.
        num_seeds: R.
        num_trainings: models needed, those that were kept in a folder included.
    """

    flips: tuple[Flip, ...]
    num_rows: int
    max_removed: int
    threshold: float
    num_seeds: int
    num_trainings: int

    @property
    def num_removed(self) -> tuple[int | None, ...]:
        """For each target the smallest removal that flips it; None for those that did not flip."""
        return tuple(flip.num_removed for flip in self.flips)

    def share_flipped(self, num_removed: int) -> float:
        """Share of the targets that flip when at most this many rows go (without those flipped from the start).

        NaN where all targets were flipped from the start.
        """
        standing = [flip.num_removed for flip in self.flips if flip.num_removed != 0]
        if not standing:
            return float("nan")
        return sum(one is not None and one <= num_removed for one in standing) / len(standing)

    def __str__(self) -> str:
        """One line: how many flipped, and the median number of rows it took."""
        counts = [one for one in self.num_removed if one]
        median = f", median {np.median(counts):g} rows" if counts else ""
        verified = sum(flip.verified is True for flip in self.flips)
        return (
            f"{len(counts)} of {len(self.flips)} predictions flipped by removing at most {self.max_removed} of "
            f"{self.num_rows} rows{median}; {verified} verified with fresh seeds"
        )


def brittleness(
    train: Train,
    scores: Any,
    *,
    targets: Sequence[int] | None = None,
    k: Any = None,
    max_fraction: float | None = None,
    threshold: float = 0.0,
    num_seeds: int = 3,
    seed: int = 0,
    folder: str | Path | None = None,
    version: str | None = None,
    progress: bool | None = None,
) -> BrittlenessResult:
    """The smallest number of highest-scored rows whose removal flips a prediction, searched by retraining.

    A prediction stands while the mean of its output over R training seeds is at least `threshold`. k is
    doubled from 1 until the prediction flips without its top k rows or k reaches ⌊max_fraction · N⌋, then
    bisected between the last k at which it stood and the first at which it flipped: about 2·log₂ k trials.
    With candidates `k` these alone are bisected: about log₂(number of candidates + 1) trials.

    The k found is an upper bound of the size of the smallest set that flips the prediction, the tighter the
    better the scores (Ilyas et al., 2022, section 4; Park et al., 2023, section 5).

    Bisection assumes that a prediction once flipped stays flipped for larger k; where training noise breaks
    this, the k found still flips in the search, though a smaller one may too. A search picks lucky draws, so
    the k found is trained again with R fresh seeds: `Flip.verified`.

    Args:
        train: (indices, seed) -> outputs [T]. Must train from scratch on the rows `indices` ([n] int64 tensor,
            rising) with all randomness taken from `seed`, and return for every scored target a number that
            falls below `threshold` where the prediction changes: the logit of the predicted class minus the
            largest other one, say. (f = log(p / (1 − p)) falls below 0 earlier, at p = ½.)
        scores: [N, T] of any kind.
        targets: which targets to examine; None for all of them.
        k: the numbers of rows to choose from, such as (20, 40, 80, 160), when exact ones are not worth their trainings; None searches
            all numbers up to `max_fraction`.
        max_fraction: share of the rows that may be removed, in (0, 1); None for a fifth. Not with `k`.
        threshold: see above.
        num_seeds: R. The search trains with the seeds seed, …, seed + R − 1, verification with the R next.
        seed: first training seed.
        folder: as in `removal_curve`, which may share it if it has the same `train`.
        version: as in `removal_curve`.
        progress: True or False to force a progress bar over trainings (their number is not known beforehand);
            None shows one to those who watch.

    Returns:
        A `Flip` for each target.

    Raises:
        InputError: a wrong argument, or `train` returns something else than [T].
        NonFiniteError: NaN or infinity in scores or outputs.
        FingerprintError: the folder is of other data or another version.
        CorruptShardError: a damaged file in the folder.
    """
    check_train(train)
    check_count(num_seeds, "num_seeds", 1)
    check_count(seed, "seed", 0)
    if not math.isfinite(threshold):
        raise InputError(f"threshold must be a finite number, got {threshold}.")
    checked = as_scores(scores)
    candidates = None if k is None else _candidates(k, max_fraction, checked.num_train)
    max_removed = _max_removed(max_fraction, checked.num_train) if candidates is None else candidates[-1]
    chosen = (
        np.arange(checked.num_targets)
        if targets is None
        else as_row_numbers(targets, checked.num_targets, "targets", "target")
    )
    top_tk = top_rows(checked.select_targets(as_tensor_positions(chosen)), max_removed)
    kept = keep_in(
        folder, train, num_rows=checked.num_train, num_targets=checked.num_targets, version=version
    )
    with bar(None, "Retraining", unit="models", enabled=progress) as shown:
        counted = _Counter(shown)
        models = Retraining(train, checked.num_train, checked.num_targets, counted, kept)
        search, fresh = range(seed, seed + num_seeds), range(seed + num_seeds, seed + 2 * num_seeds)
        full_T = models.without_by_seed(np.zeros(0, dtype=np.int64), search).mean(axis=0)
        flips = tuple(
            _find_flip(models, int(target), top_k, candidates, full_T, threshold, search, fresh)
            for target, top_k in zip(chosen, top_tk)
        )
    return BrittlenessResult(flips, checked.num_train, max_removed, threshold, num_seeds, counted.count)


class _Counter:
    """Passes progress on and counts it."""

    def __init__(self, shown: Any) -> None:
        self.shown = shown
        self.count = 0

    def update(self, n: int = 1, /) -> None:
        self.count += n
        self.shown.update(n)


def _find_flip(
    models: Retraining,
    target: int,
    top_k: Rows,
    candidates: tuple[int, ...] | None,
    full_T: Floats,
    threshold: float,
    search: range,
    fresh: range,
) -> Flip:
    """Search and verification for one target."""
    tried = {0: float(full_T[target])}

    def flips_at(k: int) -> bool:
        tried[k] = float(models.without_by_seed(top_k[:k], search)[:, target].mean())
        return tried[k] < threshold

    if tried[0] < threshold:
        return Flip(target, 0, tried[0], None, None, tried)
    k = _by_doubling(flips_at, len(top_k)) if candidates is None else _among(flips_at, candidates)
    if k is None:
        return Flip(target, None, tried[len(top_k)], None, None, tried)
    verified = float(models.without_by_seed(top_k[:k], fresh)[:, target].mean())
    return Flip(target, k, tried[k], verified < threshold, verified, tried)


def _by_doubling(flips_at: Callable[[int], bool], largest: int) -> int | None:
    """The smallest k up to `largest` at which the prediction flips, by doubling and bisection."""
    standing, k = 0, 1
    while not flips_at(k):
        if k == largest:
            return None
        standing, k = k, min(2 * k, largest)
    while k - standing > 1:
        middle = (standing + k) // 2
        if flips_at(middle):
            k = middle
        else:
            standing = middle
    return k


def _among(flips_at: Callable[[int], bool], candidates: tuple[int, ...]) -> int | None:
    """The smallest of rising candidates at which the prediction flips, by bisection."""
    first, last = 0, len(candidates)
    while first < last:
        middle = (first + last) // 2
        if flips_at(candidates[middle]):
            last = middle
        else:
            first = middle + 1
    return candidates[first] if first < len(candidates) else None


def _candidates(k: Any, max_fraction: float | None, num_rows: int) -> tuple[int, ...]:
    """`k` as rising numbers below N."""
    if max_fraction is not None:
        raise InputError(
            "k says which numbers of rows are tried, max_fraction how many at most: pass one of them."
        )
    return check_removals(k, num_rows)


def _max_removed(max_fraction: float | None, num_rows: int) -> int:
    """⌊max_fraction · N⌋, at least 1."""
    max_fraction = DEFAULT_MAX_FRACTION if max_fraction is None else max_fraction
    if not 0 < max_fraction < 1:
        raise InputError(f"max_fraction must be between 0 and 1, got {max_fraction}. For a fifth pass 0.2.")
    removed = math.floor(round(max_fraction * num_rows, 9))
    if removed < 1:
        raise InputError(f"max_fraction {max_fraction} of {num_rows} rows is none at all. Use a larger one.")
    return removed
