"""Arrays out of whatever the caller has: numpy arrays, tensors, or objects with `__array__`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trak.batches import on_host
from trak.errors import InputError, NonFiniteError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def as_array(values: Any) -> NDArray[Any]:
    """`values` as a numpy array of its own dtype; tensors come to the CPU, bfloat16 becomes float32."""
    if isinstance(values, torch.Tensor):
        tensor = values.detach().cpu()
        return np.asarray(tensor.float() if tensor.dtype is torch.bfloat16 else tensor)
    return np.asarray(on_host(values))


def as_floats(values: Any, name: str, axes: tuple[str, ...]) -> Floats:
    """`values` as finite float64 with one dimension per name in `axes`.

    Raises:
        InputError: another number of dimensions.
        NonFiniteError: NaN or infinity.
    """
    array = as_array(values).astype(np.float64)
    if array.ndim != len(axes):
        raise InputError(f"{name} must be [{', '.join(axes)}], got shape {list(array.shape)}.")
    check_finite(array, name)
    return array


def as_masks(masks: Any) -> Bools:
    """`masks` as [S, N] booleans; zeros and ones of any dtype are taken as well.

    Raises:
        InputError: another number of dimensions, other values than 0 and 1, or an empty axis.
    """
    array = as_array(masks)
    if array.ndim != 2 or 0 in array.shape:
        raise InputError(
            "masks must be [S, N], one row per subset and one column per training row, "
            f"got shape {list(array.shape)}."
        )
    if array.dtype != np.bool_:
        if not np.isin(array, (0, 1)).all():
            raise InputError(
                f"masks must hold booleans (or 0 and 1), got dtype {array.dtype} with other values. "
                "Row numbers are turned into a mask by `mask[rows] = True`."
            )
        array = array.astype(np.bool_)
    return array


def check_finite(array: NDArray[Any], name: str) -> None:
    """Raise NonFiniteError where `array` holds NaN or infinity, naming the first place."""
    finite = np.isfinite(array)
    if not finite.all():
        place = [int(index) for index in np.argwhere(~finite)[0]]
        raise NonFiniteError(
            f"{name} holds {int((~finite).sum())} values that are NaN or infinite, the first at {place}. "
            "Find out where they come from; a measure of such scores would mean nothing."
        )


def check_axis(got: int, expected: int, *, what: str, axis: str, other: str) -> None:
    """Raise InputError unless two lengths along an axis that must agree do.

    Raises:
        InputError: naming the axis and both lengths.
    """
    if got != expected:
        raise InputError(f"{what} has {got} along axis {axis}, but {other} has {expected}: they must agree.")


def check_count(value: int, name: str, minimum: int) -> None:
    """Raise InputError unless `value` is an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < minimum:
        raise InputError(f"{name} must be an integer of at least {minimum}, got {value!r}.")
