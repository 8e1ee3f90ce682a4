"""Scores [N, T], read block by block: the matrix need never exist.

Shape legend: N training rows, R rows of one block, T targets, t chosen targets, K projected, M checkpoints, k rows kept,
P pairs of a row and a target.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trak.ahead import read_ahead
from trak.batches import on_host
from trak.errors import InputError
from trak.hardware import one_core_left
from trak.memory import available_memory
from trak.products import FeatureRows, Product, piece_rows, power_of_two, read_parts
from trak.progress import bar
from trak.ranking import Extremes, Ranking, rank_blocks

__all__ = [
    "ArrayScores",
    "Extremes",
    "FeatureRows",
    "KernelScores",
    "Member",
    "Ranking",
    "Scores",
    "extreme_rows",
]

DEFAULT_BLOCK_ROWS = 4096
BLOCK_SCORES = 1 << 22
"""Scores in one block at the most (but for the smallest blocks): 16 MiB in float32, however many targets there are."""

FEW_TARGETS = 400
"""With so many targets products take no longer than reading: a core is left for it."""

PAIRS_AT_ONCE = 1024
ROWS_PER_READ = 16
"""Neighbouring rows that are read in about the time of one more call."""


@dataclass(frozen=True, eq=False)
class Member:
    """One checkpoint's part: its training features, and (ΦᵀΦ + λI)⁻¹φ(z) of the targets, [T, K]."""

    rows: FeatureRows
    solved_TK: Tensor


class Scores(ABC):
    """An [N, T] matrix of scores that is computed or read where it is asked for.

    `scores[rows, targets]` takes integers, slices, lists or tensors on either side and returns a tensor; `numpy.asarray(scores)`
    and `scores.tensor()` give the whole matrix; `scores.blocks()` gives it in row blocks; `scores.top(k)` needs memory for
    T × k only. Positive = the training example raises the target's model output.
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(N, T)."""

    @abstractmethod
    def read(self, start: int, stop: int) -> Tensor:
        """Rows start to stop, [stop − start, T] float32 (float64 where the features are)."""

    @abstractmethod
    def select_targets(self, targets: Tensor) -> Scores:
        """The same rows, for some of the targets (positions, [t] int64)."""

    def read_pairs(self, rows_P: Tensor, targets_P: Tensor) -> Tensor:
        """The scores of some pairs of neighbouring rows and targets, [P]: all rows between the first and the last are read."""
        first, last = int(rows_P.min()), int(rows_P.max())
        return self.read(first, last + 1)[rows_P - first, targets_P]

    @property
    def num_train(self) -> int:
        """N."""
        return self.shape[0]

    @property
    def num_targets(self) -> int:
        """T."""
        return self.shape[1]

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_train={self.num_train}, num_targets={self.num_targets})"

    def blocks(self, block_rows: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """(first row, scores [R, T]) in row order; a progress bar where it takes more than two seconds.

        Args:
            block_rows: R; by default 4,096, and fewer where there are many targets.
        """
        if block_rows is None:
            block_rows = min(
                DEFAULT_BLOCK_ROWS, max(64, power_of_two(BLOCK_SCORES // max(1, self.num_targets)))
            )
        starts = range(0, self.num_train, block_rows)
        ranges = [(start, min(start + block_rows, self.num_train)) for start in starts]
        with bar(self.num_train, "Scores", enabled=getattr(self, "progress", None), delay=2.0) as shown:
            for (start, stop), block_RT in zip(ranges, self._stream(ranges)):
                yield start, block_RT
                shown.update(stop - start)

    def _stream(self, ranges: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
        """What `read` gives for each range; may read ahead."""
        return (self.read(start, stop) for start, stop in ranges)

    def tensor(self) -> Tensor:
        """The whole matrix in memory, [N, T].

        Raises:
            InputError: it would not fit: read it in blocks, or save it to disk.
        """
        _refuse_if_too_large(self.shape)
        parts = [block for _, block in self.blocks()]
        return torch.cat(parts) if parts else torch.zeros(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("scores are computed where they are read: an array of them is always a copy")
        return self.tensor().numpy().astype(dtype or np.float32, copy=False)

    def __getitem__(self, key: Any) -> Tensor:
        rows_key, targets_key = key if isinstance(key, tuple) else (key, slice(None))
        rows, squeeze_rows = _positions(rows_key, self.num_train, "training row")
        targets, squeeze_targets = _positions(targets_key, self.num_targets, "target")
        everything = torch.equal(targets, torch.arange(self.num_targets))
        chosen = self if everything else self.select_targets(targets)
        out = _gather_rows(chosen, rows)
        out = out[0] if squeeze_rows else out
        return out[..., 0] if squeeze_targets else out

    def top(self, k: int = 10) -> Ranking:
        """The k most positive training rows of each target, strongest first; equal scores by row."""
        return extreme_rows(self, k, largest=True)

    def bottom(self, k: int = 10) -> Ranking:
        """The k most negative training rows of each target, most negative first; equal scores by row."""
        return extreme_rows(self, k, largest=False)

    def extremes(self, k: int = 10) -> Extremes:
        """Both `top(k)` and `bottom(k)` for the price of one: `top, bottom = scores.extremes(k)`."""
        return Extremes(*rank_blocks(self.blocks(), self.num_targets, k, True, False))

    def at(self, rows: Tensor) -> Tensor:
        """The scores of k rows of each target's own, [T, k], such as a ranking's: `scores.at(ranking.rows)`.

        Only what is near these rows is read, and only these products are formed.

        Args:
            rows: [T, k] int64, row numbers for each target.

        Raises:
            InputError: another shape, or rows that are not there.
        """
        return _gather_pairs(self, rows)

    def soft_threshold(self, threshold: float | Tensor) -> Scores:
        """sign(τ) · max(|τ| − threshold, 0), with one threshold or one for each target [T] (Park et al. 2023, appendix A.2)."""
        return ThresholdedScores(self, _check_threshold(threshold, self.num_targets))

    def save(self, path: str | Path, *, block_rows: int | None = None) -> Path:
        """Write the matrix to a NumPy `.npy` file, block by block; readable with `numpy.load(path, mmap_mode="r")`.

        Written under a temporary name and renamed, so a file that exists is complete.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=self.shape)
            for start, block in self.blocks(block_rows):
                out[start : start + block.shape[0]] = block.float().numpy()
            out.flush()
            del out
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path


@dataclass(frozen=True, eq=False, repr=False)
class KernelScores(Scores):
    """[1/M Σ_m φ_m(z)ᵀ(Φ_mᵀΦ_m + λ_m I)⁻¹φ_m(z_i)] · q̄_i, from the stored features (Park et al. 2023, equation 17).

    Attributes:
        members: one for each checkpoint.
        weights: q̄, [N]: the mean over checkpoints of each training example's loss weight.
        device: where products are formed; blocks are returned on the CPU.
        progress: True or False to force a progress bar over blocks; None shows one on terminals and in notebooks, after two seconds.
    """

    members: tuple[Member, ...]
    weights: Tensor
    device: torch.device
    progress: bool | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, T)."""
        return self.members[0].rows.num_rows, self.members[0].solved_TK.shape[0]

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start to stop, [stop − start, T]."""
        return next(self._stream([(start, stop)]))

    def _stream(self, ranges: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
        """Range by range; features are read piece by piece, one piece ahead."""
        step = piece_rows(self.members[0].rows, self.members[0].solved_TK.shape[1])
        cuts = [
            [(low, min(low + step, stop)) for low in range(start, stop, step)] or [(start, stop)]
            for start, stop in ranges
        ]
        reads = (
            partial(read_parts, member.rows, *piece)
            for pieces in cuts
            for piece in pieces
            for member in self.members
        )
        # What is in memory is there without a thread.
        is_near = all(getattr(member.rows, "in_memory", False) for member in self.members)
        parts = (read() for read in reads) if is_near else read_ahead(reads)
        products = [Product(member.solved_TK, self.device) for member in self.members]
        beside_reading = nullcontext if is_near or self.num_targets > FEW_TARGETS else one_core_left
        for (start, stop), pieces in zip(ranges, cuts):
            total_RT: Tensor | None = None
            for low, high in pieces:
                for index, product in enumerate(products):
                    piece = next(parts)
                    if total_RT is None:
                        total_RT = product.empty(stop - start, piece)
                    with beside_reading():
                        product.add(piece, total_RT[low - start : high - start], beta=int(index > 0))
            assert total_RT is not None
            weights_R1 = self.weights[start:stop].to(total_RT).unsqueeze(1)
            yield total_RT.mul_(weights_R1 / len(self.members)).cpu()

    def read_pairs(self, rows_P: Tensor, targets_P: Tensor) -> Tensor:
        """The scores of some pairs, [P]: one inner product each, not one for every target."""
        rows_U, place_P = rows_P.unique(return_inverse=True)
        total_P: Tensor | None = None
        for member in self.members:
            features_UK = _feature_rows(member.rows, rows_U)
            solved_TK = member.solved_TK.to(features_UK)
            # In parts, as the pairs' features are copied.
            parts = zip(place_P.split(PAIRS_AT_ONCE), targets_P.split(PAIRS_AT_ONCE))
            products_P = torch.cat(
                [(features_UK[rows] * solved_TK[targets]).sum(1) for rows, targets in parts]
            )
            total_P = products_P if total_P is None else total_P + products_P
        assert total_P is not None
        return total_P * self.weights[rows_P].to(total_P) / len(self.members)

    def select_targets(self, targets: Tensor) -> Scores:
        """The same members with fewer targets."""
        members = tuple(
            Member(member.rows, member.solved_TK[targets.to(member.solved_TK.device)])
            for member in self.members
        )
        return KernelScores(members, self.weights, self.device, self.progress)

    def member(self, index: int, weights: Tensor) -> Scores:
        """One checkpoint's scores, with that checkpoint's own weights q_m [N]."""
        return KernelScores((self.members[index],), weights, self.device, self.progress)


@dataclass(frozen=True, eq=False, repr=False)
class ArrayScores(Scores):
    """Scores that are there: a NumPy array, a memory-mapped file or a tensor [N, T]."""

    values: Any

    def __post_init__(self) -> None:
        if getattr(self.values, "ndim", None) != 2:
            shape = getattr(self.values, "shape", None)
            raise InputError(
                f"scores must be a matrix [training rows, targets]; got {type(self.values).__name__} of shape {shape}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(N, T)."""
        return int(self.values.shape[0]), int(self.values.shape[1])

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start to stop, [stop − start, T]."""
        part = self.values[start:stop]
        return part.detach().cpu() if isinstance(part, Tensor) else torch.from_numpy(np.array(part))

    def select_targets(self, targets: Tensor) -> Scores:
        """Some of the columns."""
        return ColumnScores(self, targets.cpu())


@dataclass(frozen=True, eq=False, repr=False)
class ColumnScores(Scores):
    """Some columns of other scores."""

    base: Scores
    targets: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(N, number of chosen targets)."""
        return self.base.num_train, len(self.targets)

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start to stop, [stop − start, t]."""
        return self.base.read(start, stop)[:, self.targets]

    def read_pairs(self, rows_P: Tensor, targets_P: Tensor) -> Tensor:
        """The other scores' pairs."""
        return self.base.read_pairs(rows_P, self.targets[targets_P])

    def select_targets(self, targets: Tensor) -> Scores:
        """Some of these columns."""
        return ColumnScores(self.base, self.targets[targets.cpu()])


@dataclass(frozen=True, eq=False, repr=False)
class ThresholdedScores(Scores):
    """sign(τ) · max(|τ| − threshold, 0)."""

    base: Scores
    threshold: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(N, T)."""
        return self.base.shape

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start to stop, [stop − start, T]."""
        values_RT = self.base.read(start, stop)
        return values_RT.sign() * (values_RT.abs() - self.threshold.to(values_RT)).clamp_min(0)

    def select_targets(self, targets: Tensor) -> Scores:
        """Some of the columns, each with its threshold."""
        threshold = self.threshold if self.threshold.ndim == 0 else self.threshold[targets.cpu()]
        return ThresholdedScores(self.base.select_targets(targets), threshold)


def extreme_rows(scores: Scores, k: int, *, largest: bool) -> Ranking:
    """The k rows with the largest (or smallest) scores of each target; equal scores in row order; see `rank_blocks`.

    Raises:
        InputError: k below 1.
    """
    return rank_blocks(scores.blocks(), scores.num_targets, k, largest)[0]


def _refuse_if_too_large(shape: tuple[int, int]) -> None:
    needed, available = 4 * shape[0] * shape[1], available_memory()
    if available is not None and needed > 0.9 * available:
        raise InputError(
            f"the whole score matrix {list(shape)} needs {needed / 2**30:.1f} GiB and {available / 2**30:.1f} GiB of memory are free: "
            "use scores.top(k), scores.blocks(), scores[rows, targets], or scores.save(path) to have it on disk"
        )


def _positions(key: Any, size: int, what: str) -> tuple[Tensor, bool]:
    """Positions [n] int64 for an index of any usual kind, and whether it was a single number."""
    if isinstance(key, (int, np.integer)):
        if not -size <= key < size:
            raise IndexError(f"{what} {key} does not exist: there are {size}")
        return torch.tensor([key % size]), True
    if isinstance(key, slice):
        return torch.arange(size)[list(range(*key.indices(size)))], False
    if key is Ellipsis:
        return torch.arange(size), False
    index = _index_tensor(key, what)
    if index.dtype == torch.bool:
        if index.shape != (size,):
            raise IndexError(f"a boolean index of {what}s must have shape [{size}]; got {list(index.shape)}")
        return index.nonzero().squeeze(1), False
    if index.ndim == 0:
        return _positions(int(index), size, what)
    if index.numel() and not (-size <= int(index.min()) and int(index.max()) < size):
        raise IndexError(f"{what}s must lie in [0, {size}); got {int(index.min())} to {int(index.max())}")
    return index.long() % max(size, 1), False


def _index_tensor(key: Any, what: str) -> Tensor:
    """Whole numbers or booleans; others would be rounded without a word."""
    try:
        index = torch.as_tensor(np.asarray(on_host(key)))
    except (RuntimeError, TypeError, ValueError):
        index = None
    if (
        index is None
        or index.ndim > 1
        or (index.numel() and (index.is_floating_point() or index.is_complex()))
    ):
        got = type(key).__name__ if index is None else f"{str(index.dtype)[6:]} {list(index.shape)}"
        raise IndexError(
            f"a {what} is chosen by a whole number, a slice, or a list of whole numbers or booleans; got {got}"
        )
    return index


def _gather_rows(scores: Scores, rows: Tensor) -> Tensor:
    """scores[rows, :] reading each run of neighbouring rows once, in blocks."""
    if len(rows) == 0:
        return torch.zeros(0, scores.num_targets)
    out: Tensor | None = None
    sorted_rows, order = rows.sort()
    for start in range(0, scores.num_train, DEFAULT_BLOCK_ROWS):
        low, high = torch.searchsorted(
            sorted_rows, torch.tensor([start, start + DEFAULT_BLOCK_ROWS])
        ).tolist()
        if low == high:
            continue
        first, last = int(sorted_rows[low]), int(sorted_rows[high - 1])
        block = scores.read(first, last + 1)
        out = block.new_empty(len(rows), scores.num_targets) if out is None else out
        out[order[low:high]] = block[sorted_rows[low:high] - first]
    assert out is not None
    return out


def _feature_rows(source: FeatureRows, rows_U: Tensor) -> Tensor:
    """Features [U, K] of rising rows: one by one where they are few, else by reading all between them."""
    first, last = int(rows_U[0]), int(rows_U[-1])
    if len(rows_U) * ROWS_PER_READ < last - first + 1:
        return torch.cat([source.read(row, row + 1).features for row in rows_U.tolist()])
    return source.read(first, last + 1).features[rows_U - first]


def _gather_pairs(scores: Scores, rows_Tk: Tensor) -> Tensor:
    """[T, k] scores of each target's own rows, block by block of the training rows."""
    if rows_Tk.ndim != 2 or len(rows_Tk) != scores.num_targets or rows_Tk.dtype != torch.int64:
        raise InputError(
            f"rows must be [{scores.num_targets} targets, k] int64, such as a ranking's; got {rows_Tk.dtype} {list(rows_Tk.shape)}"
        )
    if rows_Tk.numel() and (int(rows_Tk.min()) < 0 or int(rows_Tk.max()) >= scores.num_train):
        raise InputError(
            f"rows must lie in [0, {scores.num_train}); got {int(rows_Tk.min())} to {int(rows_Tk.max())}"
        )
    sorted_P, order_P = rows_Tk.cpu().flatten().sort()
    targets_P = order_P // max(rows_Tk.shape[1], 1)
    parts = []
    for start in range(0, scores.num_train, DEFAULT_BLOCK_ROWS):
        edges = torch.tensor([start, start + DEFAULT_BLOCK_ROWS])
        low, high = torch.searchsorted(sorted_P, edges).tolist()
        if low < high:
            parts.append(scores.read_pairs(sorted_P[low:high], targets_P[low:high]))
    values_P = torch.cat(parts) if parts else torch.zeros(0)
    return torch.empty_like(values_P).index_copy_(0, order_P, values_P).reshape(rows_Tk.shape)


def _check_threshold(threshold: float | Tensor, num_targets: int) -> Tensor:
    value = torch.as_tensor(threshold, dtype=torch.float32)
    if value.ndim > 1 or (value.ndim == 1 and len(value) != num_targets) or bool((value < 0).any()):
        raise InputError(
            f"a threshold must be one number ≥ 0, or one for each of the {num_targets} targets; got shape {list(value.shape)}"
        )
    return value
