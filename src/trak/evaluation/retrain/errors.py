"""The error of a model that could not be trained or evaluated."""

from __future__ import annotations

from trak.errors import TrakError


class RetrainError(TrakError):
    """A model of a bank could not be trained, or its outputs could not be used.

    Attributes:
        subset: which subset it was to be trained on, None if the error belongs to no one model.
        repeat: which of the models of that subset.
        seed: the seed it was given.
    """

    def __init__(
        self, message: str, *, subset: int | None = None, repeat: int | None = None, seed: int | None = None
    ) -> None:
        super().__init__(message)
        self.subset = subset
        self.repeat = repeat
        self.seed = seed
