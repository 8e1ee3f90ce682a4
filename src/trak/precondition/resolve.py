"""From what users pass as damping to a rule."""

from __future__ import annotations

from trak.errors import InputError
from trak.precondition.automatic import AutomaticDamping
from trak.precondition.damping import Damping, FixedDamping

_EXPECTED = 'damping must be a number ≥ 0, "auto", or a rule such as trak.RelativeDamping(ratio) or trak.EvidenceDamping()'


def resolve_damping(damping: float | str | Damping) -> Damping:
    """A rule from a number, "auto", or a rule.

    Raises:
        InputError: a negative or non-finite number, or an unknown word.
    """
    if isinstance(damping, Damping):
        return damping
    if isinstance(damping, str):
        if damping == "auto":
            return AutomaticDamping()
        raise InputError(f"{_EXPECTED}; got {damping!r}")
    if isinstance(damping, bool) or not isinstance(damping, (int, float)):
        raise InputError(f"{_EXPECTED}; got {type(damping).__name__}")
    return FixedDamping(float(damping))
