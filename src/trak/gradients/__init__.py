"""Per-example gradients of the model output: where they come from, and whether they are right."""

from trak.gradients.auto import Auto, select_gradients
from trak.gradients.base import Gradients, Outputs
from trak.gradients.check import check_first_batch, forward_outputs
from trak.gradients.functional import Functional
from trak.gradients.hooked import Hooked
from trak.gradients.reference import Reference
from trak.gradients.selection import model_state, select_parameters
from trak.gradients.swap import lend
from trak.gradients.wrappers import unwrapped

__all__ = [
    "Auto",
    "Functional",
    "Gradients",
    "Hooked",
    "Outputs",
    "Reference",
    "check_first_batch",
    "forward_outputs",
    "lend",
    "model_state",
    "select_gradients",
    "select_parameters",
    "unwrapped",
]
