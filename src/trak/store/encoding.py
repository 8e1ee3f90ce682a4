"""How rows become tensors in a file and back.

Shape legend: R rows, K features.

float16 reaches from 6e-8 to 65504 only, and gradients go beyond both. Each row is therefore divided by a
power of two that brings its largest entry into [2^14, 2^15), and the power is kept beside it in float32.
Multiplying by a power of two is exact, so the only rounding is that of float16: entries within 2^-28
of the row's largest keep 11 significant bits.
bfloat16 has the exponents of float32 and needs no scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trak.errors import NonFiniteError
from trak.store.folder import Spec

DECODED_BYTES = 1 << 20
"""Decoded features that are written at once: what a core's own cache holds, about."""

_HALF_TOP = 15
_SMALLEST_EXPONENT = -126
_FLOAT32_BIAS = 127
_FLOAT32_FRACTION_BITS = 23
_ROWS_SHOWN = 5


@dataclass(frozen=True, eq=False)
class Piece:
    """Some rows as they are stored: `rows` int64 [R], and per name a tensor whose first dimension is R."""

    rows: np.ndarray
    tensors: dict[str, Tensor]

    def select(self, index: np.ndarray) -> Piece:
        """A copy of the rows at `index` (positions, not row numbers)."""
        positions = torch.from_numpy(index)
        return Piece(
            self.rows[index],
            {name: tensor.index_select(0, positions) for name, tensor in self.tensors.items()},
        )

    @staticmethod
    def join(pieces: Sequence[Piece]) -> Piece:
        """All rows of `pieces`, sorted by row number; of a row that comes twice, the first."""
        given = np.concatenate([piece.rows for piece in pieces])
        rows, first = np.unique(given, return_index=True)
        whole = {name: torch.cat([piece.tensors[name] for piece in pieces]) for name in pieces[0].tensors}
        if np.array_equal(rows, given):
            return Piece(rows, whole)
        positions = torch.from_numpy(first)
        return Piece(rows, {name: tensor.index_select(0, positions) for name, tensor in whole.items()})


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Consecutive rows as they are stored, to be decoded a few at a time: what is decoded is then still in the processor's cache.

    Attributes:
        features: [R, K] in the stored dtype. It may share a file's or a store's memory: not to be written to.
        scale: [R] float32 where rows are scaled (float16), else None.
    """

    features: Tensor
    scale: Tensor | None = None

    def __len__(self) -> int:
        return self.features.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """What features decode to: float64 where they are stored so, else float32."""
        return torch.float64 if self.features.dtype == torch.float64 else torch.float32

    @property
    def is_plain(self) -> bool:
        """Whether the stored numbers are the decoded ones."""
        return self.scale is None and self.features.dtype == self.dtype

    def to(self, device: torch.device) -> StoredRows:
        """The same rows on a device, in the stored dtype."""
        return StoredRows(self.features.to(device), None if self.scale is None else self.scale.to(device))

    def decode(self, start: int, stop: int, out_RK: Tensor) -> Tensor:
        """Rows start to stop, scale undone exactly, written to `out_RK` [stop − start, K] of `dtype`."""
        self.convert(start, stop, out_RK)
        if self.scale is not None:
            out_RK.mul_(self.scale[start:stop].unsqueeze(1))
        return out_RK

    def convert(self, start: int, stop: int, out_RK: Tensor) -> Tensor:
        """Rows start to stop in `dtype`, their scale left to whoever multiplies them, written to `out_RK` [stop − start, K]."""
        return out_RK.copy_(self.features[start:stop])


@dataclass(frozen=True)
class Encoding:
    """The dtypes and sizes of stored rows.

    Attributes:
        dim: features per row K.
        feature_dtype: dtype of stored features: "float64", "float32", "bfloat16" or "float16".
        value_dtype: dtype of outputs and weights: "float32" or "float64".
    """

    dim: int
    feature_dtype: str
    value_dtype: str

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors that make up a row."""
        return ("features", "outputs", "weights", *(("scale",) if self.feature_dtype == "float16" else ()))

    def specs(self, num_rows: int) -> dict[str, Spec]:
        """Dtype and shape of each tensor of `num_rows` rows."""
        out: dict[str, Spec] = dict.fromkeys(("outputs", "weights"), (self.value_dtype, (num_rows,)))
        out["features"] = (self.feature_dtype, (num_rows, self.dim))
        if self.feature_dtype == "float16":
            out["scale"] = ("float32", (num_rows,))
        return out

    def empty(self, num_rows: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Uninitialised tensors for `num_rows` rows."""
        specs = self.specs(num_rows)
        return {name: torch.empty(specs[name][1], dtype=getattr(torch, specs[name][0])) for name in names}

    def encode(
        self, rows: np.ndarray, features_RK: Tensor, outputs_R: Tensor, weights_R: Tensor, label: str
    ) -> Piece:
        """Rows as they are stored; may be views of the arguments: `Piece.select` before keeping them.

        Raises:
            NonFiniteError: NaN or infinity, or a number too large for the stored dtype.
        """
        value_dtype: torch.dtype = getattr(torch, self.value_dtype)
        tensors = {}
        for name, values_R in (("outputs", outputs_R), ("weights", weights_R)):
            tensors[name] = values_R.to(value_dtype)
            _check_finite(rows, values_R, tensors[name], name, label)
        # Largest and smallest carry NaN and infinity along: one pass each, and no [R, K] mask.
        magnitude_R = torch.maximum(features_RK.amax(dim=1), -features_RK.amin(dim=1))
        if self.feature_dtype == "float16":
            magnitude_R32 = magnitude_R.float()
            exponent_R = scale_exponents(magnitude_R32)
            inverse_R, scale_R = powers_of_two(-exponent_R), powers_of_two(exponent_R)
            # As it would be read: the largest numbers of float32 are rounded up, beyond it.
            read_R = (magnitude_R32 * inverse_R).half().float() * scale_R
            _check_finite(rows, magnitude_R, read_R, "features", label)
            tensors["features"] = (features_RK.float() * inverse_R.unsqueeze(1)).half()
            tensors["scale"] = scale_R
        else:
            feature_dtype: torch.dtype = getattr(torch, self.feature_dtype)
            _check_finite(rows, magnitude_R, magnitude_R.to(feature_dtype), "features", label)
            tensors["features"] = features_RK.to(feature_dtype)
        return Piece(rows, tensors)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's features as they are stored."""
        dtype: torch.dtype = getattr(torch, self.feature_dtype)
        return self.dim * dtype.itemsize

    def empty_decoded(self, num_rows: int) -> Tensor:
        """Uninitialised decoded features, [num_rows, K]: float32, or float64 where stored so."""
        dtype = torch.float64 if self.feature_dtype == "float64" else torch.float32
        return torch.empty(num_rows, self.dim, dtype=dtype)

    def decode(self, tensors: dict[str, Tensor], out_RK: Tensor) -> Tensor:
        """Features with their scale undone exactly, written to `out_RK` [R, K] of `empty_decoded`'s dtype."""
        stored = StoredRows(tensors["features"], tensors.get("scale"))
        # In parts that a cache holds, since scaled features are written to twice.
        step = max(1, DECODED_BYTES // max(1, 4 * self.dim))
        for start in range(0, len(stored), step):
            stop = min(start + step, len(stored))
            stored.decode(start, stop, out_RK[start:stop])
        return out_RK


def scale_exponents(magnitude_R: Tensor) -> Tensor:
    """Exponents s with magnitude / 2^s in [2^14, 2^15), int32 [R]; 0 for rows of zeros.

    At least -126, so that 2^s is a normal float32: smaller rows are float32 subnormals, exact all the same.
    """
    exponent_R = torch.frexp(magnitude_R).exponent
    exponent_R = (exponent_R - _HALF_TOP).clamp_min(_SMALLEST_EXPONENT)
    return torch.where(magnitude_R == 0, torch.zeros_like(exponent_R), exponent_R)


def powers_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float32, put together from its bits: exact. Exponents from -126 to 127."""
    return ((exponent + _FLOAT32_BIAS) << _FLOAT32_FRACTION_BITS).to(torch.int32).view(torch.float32)


def _check_finite(rows: np.ndarray, given_R: Tensor, stored_R: Tensor, name: str, label: str) -> None:
    bad = (~torch.isfinite(stored_R)).nonzero().flatten()
    if len(bad) == 0:
        return
    shown = ", ".join(str(int(rows[i])) for i in bad[:_ROWS_SHOWN])
    more = f" and {len(bad) - _ROWS_SHOWN} more" if len(bad) > _ROWS_SHOWN else ""
    where = f"{name} of {label}, row{'s' if len(bad) > 1 else ''} {shown}{more}"
    if bool(torch.isfinite(given_R[bad]).all()):
        dtype = str(stored_R.dtype).removeprefix("torch.")
        raise NonFiniteError(
            f"Numbers too large for {dtype}: {where}. Nothing of this batch was stored. Store features in "
            "float64 (feature_dtype='float64'), or find out why gradients of these examples are so large."
        )
    raise NonFiniteError(
        f"NaN or infinity in {where}. Nothing of this batch was stored. Look at these examples: inputs that "
        "are not finite, a loss that overflows, or a half-precision compute dtype; computing in float32 "
        "often helps."
    )
