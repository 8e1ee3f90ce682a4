"""Gram matrix, damping, solve."""

from trak.precondition.automatic import AutomaticDamping
from trak.precondition.damping import Damping, FixedDamping, RelativeDamping
from trak.precondition.data_driven import CrossValidationDamping, EffectiveDimensionDamping, EvidenceDamping
from trak.precondition.gram import Moments, accumulate_moments
from trak.precondition.marquardt import MarquardtDamping
from trak.precondition.resolve import resolve_damping
from trak.precondition.solve import Preconditioner, fit_preconditioner

__all__ = [
    "AutomaticDamping",
    "CrossValidationDamping",
    "Damping",
    "EffectiveDimensionDamping",
    "EvidenceDamping",
    "FixedDamping",
    "MarquardtDamping",
    "Moments",
    "Preconditioner",
    "RelativeDamping",
    "accumulate_moments",
    "fit_preconditioner",
    "resolve_damping",
]
