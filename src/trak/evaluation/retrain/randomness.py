"""Seeds of models, and the random generators that all threads of a process share."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Whoever sets or compares the shared generators holds it; re-entrant, since `seeded` may be used inside `seeded`.
_SHARED_GENERATORS = threading.RLock()


def model_seed(seed: int, subset: int, repeat: int, *, purpose: str = "model") -> int:
    """The seed of one model: the first four bytes (little endian) of a SHA-256.

    The digest is that of the text `trak retrain {purpose} {seed} {subset} {repeat}`. It depends on nothing
    else: not on the number of workers, subsets or models, nor on what is already there.

    Args:
        seed: of the whole bank.
        subset: number of the subset, from 0.
        repeat: number of the model among those of its subset, from 0.
        purpose: apart from "model", which `retrain` gives to the caller's function, `retrain_stacked` uses
            "order" for the order of batches.

    Returns:
        An integer in [0, 2³²), which `torch.manual_seed` and `numpy.random.seed` both take.
    """
    text = f"trak retrain {purpose} {seed} {subset} {repeat}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators that all threads share (torch, NumPy, `random`), and put them back afterwards.

    One thread at a time: another one that enters waits. Use it inside a training function around the few
    lines that draw from a shared generator, such as building a model with torch's default initialisation:

        with seeded(seed):
            model = build()

    Args:
        seed: in [0, 2³²).
    """
    with _SHARED_GENERATORS:
        before = SharedState.now()
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002  the shared generator is the point
        random.seed(seed)
        try:
            yield
        finally:
            before.restore()


@dataclass(frozen=True, eq=False)
class SharedState:
    """State of the generators that all threads share; those of CUDA once it has been initialised."""

    cpu: Tensor
    cuda: tuple[Tensor, ...] | None
    numpy: tuple[Any, ...]
    python: tuple[Any, ...]

    @classmethod
    def now(cls) -> SharedState:
        """The state at this moment, when no thread is inside `seeded`."""
        with _SHARED_GENERATORS:
            return cls(
                cpu=torch.get_rng_state(),
                cuda=tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else None,
                numpy=tuple(np.random.get_state()),  # noqa: NPY002
                python=random.getstate(),
            )

    def restore(self) -> None:
        """Put the generators back into this state."""
        with _SHARED_GENERATORS:
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state_all(list(self.cuda))
            np.random.set_state(self.numpy)  # noqa: NPY002
            random.setstate(self.python)

    def changed(self) -> list[str]:
        """Names of the generators that somebody has drawn from, or seeded, since."""
        now = SharedState.now()
        out = []
        if not torch.equal(self.cpu, now.cpu):
            out.append("torch's")
        if self.cuda is not None and now.cuda is not None:
            same = all(torch.equal(old, new) for old, new in zip(self.cuda, now.cuda))
            out += [] if same else ["CUDA's"]
        # The fields behind the 624 words (position, cached normal) are scalars.
        if self.numpy[2:] != now.numpy[2:] or not np.array_equal(self.numpy[1], now.numpy[1]):
            out.append("NumPy's")
        if self.python != now.python:
            out.append("the module random's")
        return out
