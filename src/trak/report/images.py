"""Arrays and tensors to PNG data URIs.

Shape legend: H height, W width, C channels (1 grey, 3 RGB, 4 RGBA).
"""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trak.errors import InputError
from trak.report.dependencies import require

CHANNELS = (1, 3, 4)
LONGEST_SIDE = 320
"""Larger images are reduced to this many pixels: cards show them smaller still, and a report should stay light."""


def data_uri(
    image: Any, value_range: tuple[float, float] | None = None, *, longest_side: int = LONGEST_SIDE
) -> str:
    """`data:image/png;base64,…` of an image.

    Args:
        image: [H, W], [C, H, W] or [H, W, C] with C in (1, 3, 4): array, tensor or PIL image.
        value_range: (black, white) for float images; see `to_uint8`.
        longest_side: larger images are reduced to it. Small ones stay as they are; the page magnifies them.

    Raises:
        InputError: not an image by its shape, dtype or values.
        MissingDependencyError: pillow is not installed.
    """
    require("PIL")
    from PIL import Image

    pixels_HWC = to_uint8(image, value_range)
    picture = Image.fromarray(pixels_HWC[..., 0] if pixels_HWC.shape[-1] == 1 else pixels_HWC)
    if max(picture.size) > longest_side:
        picture.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def size(image: Any) -> tuple[int, int]:
    """(width, height) in pixels."""
    pixels_HWC = _channels_last(image)
    return pixels_HWC.shape[1], pixels_HWC.shape[0]


def to_uint8(image: Any, value_range: tuple[float, float] | None = None) -> NDArray[np.uint8]:
    """Pixels [H, W, C] in 0 to 255.

    Integers must be in 0 to 255 and are kept; booleans become black and white. Floats go from `value_range` to (0, 255)
    and are clipped; without a range, values within [0, 1] are taken as they are, and others (standardised images, say)
    are stretched from their minimum to their maximum.
    """
    pixels_HWC = _channels_last(image)
    if pixels_HWC.dtype == np.bool_:
        return pixels_HWC.astype(np.uint8) * np.uint8(255)
    if np.issubdtype(pixels_HWC.dtype, np.integer):
        if pixels_HWC.size and (pixels_HWC.min() < 0 or pixels_HWC.max() > 255):
            raise InputError(
                f"an integer image holds values from 0 to 255; got {pixels_HWC.min()} to {pixels_HWC.max()}. "
                "Convert it to float to have it stretched."
            )
        return pixels_HWC.astype(np.uint8)
    if not np.issubdtype(pixels_HWC.dtype, np.floating):
        raise InputError(f"an image holds integers, floats or booleans; got dtype {pixels_HWC.dtype}")
    values_HWC = pixels_HWC.astype(np.float64)
    if not np.isfinite(values_HWC).all():
        raise InputError(
            f"an image of shape {pixels_HWC.shape} holds NaN or infinity; clean it before showing it"
        )
    low, high = _range(values_HWC, value_range)
    scaled_HWC = (values_HWC - low) / (high - low) * 255.0
    return np.clip(np.rint(scaled_HWC), 0, 255).astype(np.uint8)


def _range(values: NDArray[np.float64], value_range: tuple[float, float] | None) -> tuple[float, float]:
    if value_range is not None:
        low, high = map(float, value_range)
        if not (np.isfinite([low, high]).all() and low < high):
            raise InputError(
                f"value_range is (black, white) with black < white, both finite; got {value_range}"
            )
        return low, high
    low, high = float(values.min()), float(values.max())
    if (low >= 0.0 and high <= 1.0) or low == high:
        return (0.0, 1.0) if low >= 0.0 and high <= 1.0 else (low - 1.0, high + 1.0)
    return low, high


def _channels_last(image: Any) -> NDArray[Any]:
    """[H, W, C]. Where both ends could be channels, tensors are read as [C, H, W] and everything else as [H, W, C]."""
    is_tensor = hasattr(image, "detach")
    pixels = np.asarray(_on_cpu(image) if is_tensor else image)
    if pixels.ndim == 2 and pixels.size:
        return pixels[:, :, None]
    if pixels.ndim == 3 and pixels.size:
        first, last = pixels.shape[0] in CHANNELS, pixels.shape[-1] in CHANNELS
        if first and (is_tensor or not last):
            return np.moveaxis(pixels, 0, -1)
        if last:
            return pixels
    raise InputError(
        f"an image has shape [H, W], [C, H, W] or [H, W, C] with 1, 3 or 4 channels; got {list(pixels.shape)}"
    )


def _on_cpu(tensor: Any) -> Any:
    tensor = tensor.detach().cpu()
    # numpy has no bfloat16, and half precision gains nothing here.
    return tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
