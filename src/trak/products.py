"""Products of training features with solved targets, a piece at a time: features are used as they are stored where that is possible.

Shape legend: R rows of one piece, r rows decoded at once, T targets, K projected.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

PIECE_BYTES = 1 << 24
"""Features that are read at once (at least one row, and whole shards where these are not much larger), counted in float32. Larger buffers
come fresh from the system each time, and touching their pages for the first time takes longer than the products."""

DECODED_BYTES = 1 << 22
"""Features that are decoded at once for each thread, into one buffer that stays in the processor's cache: converting them then costs about a
tenth of their products with 100 targets."""


class FeatureRows(Protocol):
    """One checkpoint's training features: a store's row set, or anything with its two members used here."""

    @property
    def num_rows(self) -> int:
        """N."""

    def read(self, start: int, stop: int) -> Any:
        """An object whose `.features` is [stop − start, K]."""


class StoredFeatures(Protocol):
    """Some rows' features in their stored dtype: what `FeatureRows.read_stored` gives a list of, where there is such a method."""

    @property
    def features(self) -> Tensor:
        """[R, K], not to be written to."""

    @property
    def dtype(self) -> torch.dtype:
        """What they decode to."""

    @property
    def is_plain(self) -> bool:
        """Whether `features` are decoded already."""

    def __len__(self) -> int: ...

    def to(self, device: torch.device) -> Any:
        """The same on a device."""

    def decode(self, start: int, stop: int, out_RK: Tensor) -> Tensor:
        """Rows start to stop, written to `out_RK`."""

    @property
    def scale(self) -> Tensor | None:
        """[R] powers of two that converted rows are still to be multiplied by, None for none."""

    def convert(self, start: int, stop: int, out_RK: Tensor) -> Tensor:
        """Rows start to stop without their scale, written to `out_RK`."""


class Product:
    """Products of features, a piece at a time, with one checkpoint's solved targets; keeps the buffer they are decoded into."""

    def __init__(self, solved_TK: Tensor, device: torch.device) -> None:
        self._solved_TK, self._device = solved_TK, device
        self._buffer_rK: Tensor | None = None
        # Rows are scaled by powers of two, after their products where that is as exact: T numbers for a row instead of K. Stored
        # rows have their largest entry in [2^14, 2^15), so that with targets like these no product leaves float32's range.
        self._scales_scores = bool(2.0**-64 < solved_TK.abs().max() < 2.0**64) if solved_TK.numel() else False

    def empty(self, num_rows: int, piece: Sequence[Tensor | StoredFeatures]) -> Tensor:
        """Uninitialised scores [num_rows, T] of the dtype that this piece's products have."""
        dtype = piece[0].dtype if piece else self._solved_TK.dtype
        return torch.empty(num_rows, self._solved_TK.shape[0], dtype=dtype, device=self._device)

    def add(self, piece: Sequence[Tensor | StoredFeatures], total_rT: Tensor, *, beta: int) -> None:
        """Total = features solvedᵀ + beta total."""
        low = 0
        for part in piece:
            self._solved_TK = self._solved_TK.to(device=self._device, dtype=part.dtype)
            near = part.to(self._device)
            scale_R = None if isinstance(near, Tensor) or not self._scales_scores else near.scale
            done = 0
            for features_rK in self._decoded(near):
                rows = slice(low + done, low + done + len(features_rK))
                scale_r = None if scale_R is None else scale_R[done : done + len(features_rK)]
                _add_product(total_rT[rows], features_rK, self._solved_TK, scale_r, beta)
                done += len(features_rK)
            low += done

    def _decoded(self, part: Tensor | StoredFeatures) -> Iterator[Tensor]:
        """The part's features, [r, K] at a time; each is overwritten by the next."""
        if isinstance(part, Tensor) or part.is_plain:
            yield part if isinstance(part, Tensor) else part.features
            return
        dim = self._solved_TK.shape[1]
        size = min(PIECE_BYTES, DECODED_BYTES * torch.get_num_threads())
        rows = max(1, size // (4 * max(1, dim))) if self._device.type == "cpu" else len(part)
        if self._buffer_rK is None or len(self._buffer_rK) < min(rows, len(part)):
            self._buffer_rK = torch.empty(min(rows, len(part)), dim, dtype=part.dtype, device=self._device)
        for start in range(0, len(part), rows):
            stop = min(start + rows, len(part))
            write = part.convert if self._scales_scores else part.decode
            yield write(start, stop, self._buffer_rK[: stop - start])


def _add_product(
    out_rT: Tensor, features_rK: Tensor, solved_TK: Tensor, scale_r: Tensor | None, beta: int
) -> None:
    """Out = scale · features solvedᵀ + beta out."""
    if scale_r is None:
        torch.addmm(out_rT, features_rK, solved_TK.T, beta=beta, out=out_rT)
    elif beta:
        out_rT.addcmul_(features_rK @ solved_TK.T, scale_r.unsqueeze(1))
    else:
        torch.mm(features_rK, solved_TK.T, out=out_rT).mul_(scale_r.unsqueeze(1))


def read_parts(source: FeatureRows, start: int, stop: int) -> Sequence[Tensor | StoredFeatures]:
    """Features of some rows, as they are stored where the source can give them so."""
    read_stored = getattr(source, "read_stored", None)
    return [source.read(start, stop).features] if read_stored is None else read_stored(start, stop)


def piece_rows(source: FeatureRows, dim: int) -> int:
    """Rows to read at once; whole shards, if they are not too large: these can be used as they lie there, and are compared with their
    checksums."""
    rows = power_of_two(PIECE_BYTES // (4 * max(1, dim)))
    shard_rows = getattr(source, "shard_rows", rows)
    if getattr(source, "shard_bytes", 0) > 2 * PIECE_BYTES:
        return rows
    return -(-rows // shard_rows) * shard_rows


def power_of_two(number: int) -> int:
    """The largest power of two that is not larger, at least 1: pieces then fall together with shards."""
    return 1 << max(0, number.bit_length() - 1)
