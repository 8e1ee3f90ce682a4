"""The first-batch check.

Are the per-example gradients those of autograd? If not, an error or a fall-back, never wrong numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from traceback import clear_frames
from typing import Any

import torch
from torch import Tensor, nn

from trak.batches import batch_size, take
from trak.blocks import Block, upcast
from trak.errors import GradientError, InputError, MixedExamplesError, NonFiniteError, TrakError
from trak.gradients.base import BlamedError, Gradients, Outputs, forward, random_state_kept
from trak.gradients.reference import Reference, batch_gradient
from trak.gradients.swap import lend
from trak.gradients.wrappers import named_parameters
from trak.logs import logger
from trak.tasks.base import Task

_EXAMPLES = 8


@dataclass(frozen=True)
class Tolerance:
    """How far two computations of the same number may lie apart; a wrong formula is off by far more.

    Attributes:
        outputs: of f, relative to the largest |f| of the batch or 1.
        gradients: of a parameter's gradient, relative to its norm.
        noise: the same, relative to the norm of all gradients: parameters whose gradient is zero but for
            rounding (the keys' bias of attention, a bias before a norm) have no digits to compare.
    """

    outputs: float
    gradients: float
    noise: float


# float32 leaves room for TensorFloat-32 and for convolution algorithms that depend on the batch size.
_TOLERANCES = {
    torch.float64: Tolerance(outputs=1e-9, gradients=1e-7, noise=1e-12),
    torch.float32: Tolerance(outputs=5e-3, gradients=1e-2, noise=1e-5),
}
_HALF = Tolerance(outputs=0.1, gradients=0.2, noise=2e-2)


def check_first_batch(
    gradients: Gradients,
    model: nn.Module,
    state: Mapping[str, Tensor],
    task: Task,
    batch: Any,
    names: Sequence[str],
) -> Gradients:
    """Verify on (at most 8 examples of) a batch what attribution rests on, and return the source that passed.

    1. f is the same when computed twice.
    2. f of the batch is f of its examples one at a time.
    3. Per-example gradients sum to the ordinary gradient of Σ_b f_b, parameter by parameter.
    4. Those of the first and the last example are what autograd gives for them alone.

    A batch of one example cannot show mixing; check another one before larger batches follow.

    Args:
        gradients: the source to verify. `Auto` exchanges layer rules that are wrong here for local passes, and
            falls back to functional gradients, and from these to those of one example after another, with a
            warning in the log, where that does not help; any other source must pass.
        model: gives the code; comes back untouched.
        state: every parameter and buffer by canonical name.
        task: what f is.
        batch: the first batch.
        names: canonical names of the attributed parameters.

    Returns:
        The source that passed, never `Auto` itself.

    Raises:
        GradientError: the model is random, f does not depend on any attributed parameter, or gradients are
            wrong.
        MixedExamplesError: an example's output depends on its neighbours.
        NonFiniteError: NaN or infinity in f or gradients.
        InputError: an empty batch, or a task whose output is not [B].
    """
    if batch_size(batch) == 0:
        raise InputError("the first batch has no examples")
    batch = take(batch, slice(0, _EXAMPLES))
    with random_state_kept(state):
        expected = _expectation(model, state, task, batch, names)
        candidates = gradients.candidates(model, names)
        for candidate, fall_back in zip(candidates, [*candidates[1:], None]):
            source: Gradients | None = candidate
            reasons: list[GradientError] = []
            while source is not None:
                try:
                    _compare(source, model, state, task, batch, names, expected)
                except GradientError as error:
                    # Every one would keep all gradients of its attempt.
                    _forget_locals(error)
                    reasons.append(error)
                    source = gradients.instead(model, names, source, error)
                    continue
                if reasons:
                    logger.warning(
                        "Some parameters of this model need another way than was tried first, which is slower and used "
                        "instead: %s",
                        reasons[0],
                    )
                return source
            if fall_back is None:
                raise reasons[-1]
            logger.warning(
                "%s cannot be used with this model, %s is slower and used instead: %s",
                type(candidate).__name__,
                type(fall_back).__name__,
                reasons[0],
            )
    raise GradientError(f"{type(gradients).__name__}.candidates returned nothing to try")


def _forget_locals(error: BaseException | None) -> None:
    """Lets go of what the frames hold in which an error and its causes were raised; their lines stay readable."""
    while error is not None:
        clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


@dataclass(frozen=True, eq=False)
class _Expectation:
    """What autograd says: outputs, the batch gradient, and the gradients of single examples by position."""

    f: Tensor
    total: Mapping[str, Tensor]
    singles: Mapping[int, Mapping[str, Tensor]]
    tolerance: Tolerance


def _expectation(
    model: nn.Module, state: Mapping[str, Tensor], task: Task, batch: Any, names: Sequence[str]
) -> _Expectation:
    """Steps 1 and 2, which concern the model alone, and the numbers for 3 and 4."""
    size = batch_size(batch)
    tolerance = _TOLERANCES.get(state[names[0]].dtype, _HALF)
    outputs, total = batch_gradient(model, state, task, batch, names)
    _require_finite("model outputs", outputs.f)
    again = forward_outputs(model, state, task, batch)
    _require_deterministic(outputs.f, again.f, tolerance)
    if all(gradient is None for gradient in total.values()):
        raise GradientError(
            f"the task's output does not depend on any of the {len(names)} attributed parameters, e.g. "
            f"{names[0]!r}. Does the task detach it, convert it to NumPy or run under torch.no_grad()? Or "
            "choose other parameters with parameters=..."
        )
    singles = {}
    for row in range(size):
        example = take(batch, slice(row, row + 1))
        try:
            if row in (0, size - 1):
                single, own = batch_gradient(model, state, task, example, names)
                singles[row] = _filled(own, state)
            else:
                single = forward_outputs(model, state, task, example)
        except (RuntimeError, ValueError) as error:
            if isinstance(error, TrakError):
                raise
            raise MixedExamplesError(
                f"the batch can be computed, its example {row} alone cannot: {error}. {_suspicion(model)}"
            ) from error
        _require_unmixed(model, row, outputs.f, single.f, tolerance)
    filled = _filled(total, state)
    for name, gradient in filled.items():
        _require_finite(f"gradients of {name!r}", gradient)
    return _Expectation(outputs.f, filled, singles, tolerance)


def _compare(
    gradients: Gradients,
    model: nn.Module,
    state: Mapping[str, Tensor],
    task: Task,
    batch: Any,
    names: Sequence[str],
    expected: _Expectation,
) -> None:
    """Steps 3 and 4 for one source."""
    total = {name: torch.zeros_like(value) for name, value in expected.total.items()}
    singles = {
        row: {name: torch.zeros_like(v) for name, v in single.items()}
        for row, single in expected.singles.items()
    }
    source = type(gradients).__name__
    size = batch_size(batch)

    def consume(block: Block) -> None:
        # Under autocast factors may be in half precision, which is not what is compared here.
        own = total.get(block.name)
        values = (block if own is None else upcast(block, own.dtype)).dense()
        if own is None or values.shape != (size, *total[block.name].shape):
            raise GradientError(
                f"{source} gave a block {block.name!r} of shape {list(values.shape)}; expected one of the "
                f"{len(total)} attributed parameters with {size} examples"
            )
        total[block.name] += values.sum(0)
        for row, single in singles.items():
            single[block.name] += values[row]

    outputs = gradients.compute(model, state, task, batch, names, consume)
    if not _close(outputs.f, expected.f, expected.tolerance):
        raise GradientError(
            f"under {source} the model outputs differ from an ordinary forward pass by "
            f"{_largest(outputs.f - expected.f):.3g}"
        )
    try:
        _require_equal(f"the sum over examples of gradients from {source}", total, expected.total, expected)
    except BlamedError as error:
        if not isinstance(gradients, Reference):
            raise
        raise MixedExamplesError(
            f"the gradient of a batch is not the sum of the gradients of its examples alone, for "
            f"{error.parameters[0]!r} for instance, although the outputs are the same. Something scales gradients by the batch, such as "
            "nn.Embedding(scale_grad_by_freq=True) or a backward of your own: switch it off, or leave these out with parameters=..."
        ) from error
    for row, single in singles.items():
        _require_equal(
            f"the gradient of example {row} from {source}", single, expected.singles[row], expected
        )


def _require_equal(
    what: str, got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], expected: _Expectation
) -> None:
    """Each parameter's gradient within tolerance; the message names the worst."""
    largest = max(
        single.norm()
        for one in (expected.total, *expected.singles.values())
        for single in map(_wide, one.values())
    )
    worst, worst_error, worst_excess = "", 0.0, 1.0
    wrong: list[str] = []
    for name, value in got.items():
        _require_finite(f"{what}, parameter {name!r},", value)
        difference = float((_wide(value) - _wide(wanted[name])).norm())
        # Terms may cancel in a sum over examples: the parts set the scale as well.
        parts = (wanted[name], *(single[name] for single in expected.singles.values()))
        scale = max(float(_wide(part).norm()) for part in parts)
        allowed = expected.tolerance.gradients * scale + expected.tolerance.noise * float(largest)
        excess = difference / allowed if allowed else float(difference > 0) * 2
        if excess > 1.0:
            wrong.append(name)
        if excess > worst_excess:
            worst, worst_error, worst_excess = name, difference / scale if scale else float("inf"), excess
    if worst:
        raise BlamedError(
            f"{what} is not what autograd gives; worst for parameter {worst!r}, relative error "
            f"{worst_error:.3g}. Is the parameter also used outside its own module's forward, or a layer "
            "called without its hooks? Use gradients=trak.gradients.Functional() or "
            "trak.gradients.Reference()",
            wrong,
        )


def _require_deterministic(once: Tensor, twice: Tensor, tolerance: Tolerance) -> None:
    if not _close(once, twice, Tolerance(tolerance.outputs * 1e-2, 0, 0)):
        raise GradientError(
            "the model is random: two forward passes of the same batch differ by "
            f"{_largest(once - twice):.3g}. It is in eval mode, so look for torch.nn.functional.dropout "
            "called without training=self.training, for sampling, or for operations in place that change the input (x += …)"
        )


def _require_unmixed(
    model: nn.Module, row: int, batched: Tensor, single: Tensor, tolerance: Tolerance
) -> None:
    if _close(batched[row : row + 1], single, tolerance, scale=_largest(batched)):
        return
    raise MixedExamplesError(
        f"example {row} of the batch has output {float(batched[row]):.6g} among its neighbours and "
        f"{float(single):.6g} alone: examples are mixed, and no per-example gradient exists. "
        f"{_suspicion(model)}"
    )


def _suspicion(model: nn.Module) -> str:
    """Where mixing may come from."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            return (
                f"{name!r} is a batch norm without running statistics (track_running_stats=False), which "
                "normalises by the batch at hand: use running statistics, or GroupNorm or LayerNorm"
            )
    return (
        "Look for statistics over dimension 0 (batch norm without running statistics, contrastive terms) in "
        "model and task"
    )


def _require_finite(what: str, values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise NonFiniteError(
            f"{what} on the first batch are NaN or infinite in {int((~values.isfinite()).sum())} of "
            f"{values.numel()} entries. Look at the checkpoint and the inputs; a model in float16 may "
            "overflow: try dtype=torch.float32"
        )


def forward_outputs(model: nn.Module, state: Mapping[str, Tensor], task: Task, batch: Any) -> Outputs:
    """F and q of a batch by one forward pass, both [B] and detached."""
    # Gradients stay enabled: modules may take other paths without them, and those are not what is verified.
    parameters = {name for name, tensor in named_parameters(model) if tensor.is_floating_point()}
    attached = {name: t.detach().requires_grad_(name in parameters) for name, t in state.items()}
    with lend(model, attached), torch.enable_grad():
        f, q = forward(task, model, batch, batch_size(batch))
    return Outputs(f.detach(), q)


def _filled(gradients: Mapping[str, Tensor | None], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(state[name]) if g is None else g for name, g in gradients.items()}


def _close(one: Tensor, other: Tensor, tolerance: Tolerance, *, scale: float | None = None) -> bool:
    scale = max(1.0, _largest(other) if scale is None else scale)
    return _largest(one - other) <= tolerance.outputs * scale


def _largest(values: Tensor) -> float:
    return float(_wide(values).abs().max())


def _wide(values: Tensor) -> Tensor:
    """In at least float32, so that norms of half precision gradients do not overflow."""
    return values if values.dtype == torch.float64 else values.float()
