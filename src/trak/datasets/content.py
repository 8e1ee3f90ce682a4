"""What batches hold, as a digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from trak import batches


def content_hash(items: Iterable[Any]) -> str:
    """SHA-256 over the structure, dtypes, shapes and bytes of batches, and the values of plain leaves that are no tensors."""
    digest = hashlib.sha256()
    for item in items:
        leaves, _ = batches.flatten(item)
        # What is no tensor (text, numbers) counts too, by its value; tensors show as their descriptions.
        digest.update(outline(item).encode())
        for tensor in leaves:
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


def outline(item: Any) -> str:
    """`batches.describe`, with the values of text, numbers and arrays in place of their types."""
    if isinstance(item, Mapping):
        return "{" + ", ".join(f"{key!r}: {outline(value)}" for key, value in item.items()) + "}"
    if isinstance(item, (tuple, list)):
        inner = ", ".join(map(outline, item))
        return f"({inner})" if isinstance(item, tuple) else f"[{inner}]"
    if isinstance(item, (str, bytes, bool, int, float, complex, np.generic)):
        return repr(item)
    if isinstance(item, np.ndarray):
        return f"array {item.dtype} {item.shape} {item.tolist()!r}"
    return batches.describe(item)
