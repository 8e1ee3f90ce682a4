"""Train many small models at once: parameters stacked along a new dimension, one vmapped step for all.

Legend: M models in a stack, n rows per subset, B batch.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from trak.errors import InputError
from trak.evaluation._values import check_count
from trak.evaluation.retrain.bank import Bank
from trak.evaluation.retrain.errors import RetrainError
from trak.evaluation.retrain.plan import Job, Plan, make_plan
from trak.evaluation.retrain.randomness import model_seed, seeded
from trak.evaluation.retrain.results import Results
from trak.evaluation.retrain.run import calling, models_bar, one_torch_thread

Loss = Callable[[Tensor, Tensor], Tensor]
Schedule = Callable[[float], float]


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Stochastic gradient descent as torch.optim.SGD does it (no dampening, no Nesterov).

    Attributes:
        epochs: passes over the subset.
        batch_size: B; the last batch of an epoch may be smaller.
        lr: learning rate.
        momentum: factor of the velocity.
        weight_decay: factor of the parameters added to the gradient.
        schedule: function of the share of training done, in (0, 1), to a factor of `lr`; None is 1.
        loss: function (model outputs, labels) → scalar mean loss of a batch.
    """

    epochs: int
    batch_size: int
    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: Schedule | None = None
    loss: Loss = F.cross_entropy

    def __post_init__(self) -> None:
        check_count(self.epochs, "epochs", 1)
        check_count(self.batch_size, "batch_size", 1)
        for name in ("lr", "momentum", "weight_decay"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise InputError(f"{name} must be a finite number of at least 0, got {value!r}.")

    def rates(self, num_rows: int) -> list[float]:
        """The learning rate of each step for a subset of `num_rows`; step k of K is at share (k + ½)/K."""
        steps = self.epochs * -(-num_rows // self.batch_size)
        factor = self.schedule or (lambda share: 1.0)
        return [self.lr * float(factor((step + 0.5) / steps)) for step in range(steps)]

    def batches(self, rows: Tensor, seed: int) -> Iterator[Tensor]:
        """The rows [B] of each step of one model: a new order for each epoch, from a generator of its own."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.epochs):
            yield from rows[torch.randperm(len(rows), generator=generator)].split(self.batch_size)


def retrain_stacked(
    build: Callable[[], nn.Module],
    inputs: Tensor,
    labels: Tensor,
    outputs: Callable[[nn.Module], Any],
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    schedule: Schedule | None = None,
    loss: Loss = F.cross_entropy,
    masks: Any = None,
    num_subsets: int | None = None,
    fraction: float = 0.5,
    models_per_subset: int = 1,
    seed: int = 0,
    stack_size: int = 16,
    folder: str | Path | None = None,
    keep_models: bool = False,
    target_rows: Any = None,
    version: str | None = None,
    progress: bool | None = None,
) -> Bank:
    """Like `retrain`, for many small models with one architecture: they are trained together, by `torch.func.vmap`.

    Every model has its own initialisation, its own subset and its own order of batches. To rounding, each is the
    model that a plain loop with torch.optim.SGD gives on the same batches; to the last bit it may depend on
    which models are in its stack. A stack holds models whose subsets have the same number of rows. With a
    folder, a run can be killed and gone on with; it loses the stack in training.

    torch computes with one thread meanwhile: for operations this small, handing work to others costs more than it
    gains. It pays where a model is so small that the overhead of operations dominates; design/banks.md has figures.

    Args:
        build: function () → a new model, in the dtype and with the random initialisation wanted; called with the
            shared generators seeded by `model_seed(seed, subset, repeat)`.
        inputs: [N, ...]; its device is where models are trained.
        labels: [N, ...].
        outputs: function model → [T], the output f of each target; gets the trained module in eval mode, and no gradients are
            recorded.
        epochs: passes of each model over its subset.
        batch_size: rows per step and model.
        lr: learning rate of SGD.
        momentum: of SGD.
        weight_decay: of SGD.
        schedule: function of the share of training done, in (0, 1), to a factor of `lr`.
        loss: function (model outputs, labels) → scalar, the mean loss of one model's batch.
        masks: as in `retrain`.
        num_subsets: as in `retrain`.
        fraction: as in `retrain`.
        models_per_subset: as in `retrain`.
        seed: as in `retrain`; orders are drawn with `model_seed(..., purpose="order")`.
        stack_size: M, models trained at once; memory grows with it.
        folder: as in `retrain`.
        keep_models: as in `retrain`.
        target_rows: as in `retrain`.
        version: as in `retrain`, for `build`, `outputs` and `loss`; data and the optimiser's numbers are compared anyway.
        progress: as in `retrain`.

    Returns:
        The bank.

    Raises:
        InputError: a bad argument; a model with batch normalisation or dropout.
        RetrainError: `build`, `loss` or `outputs` raised, or the model cannot be vmapped.
        NonFiniteError: NaN or infinity in a model's outputs.
        FingerprintError: the folder is of a bank with other settings.
        CorruptShardError: a damaged file in the folder.
    """
    check_count(stack_size, "stack_size", 1)
    if len(inputs) != len(labels):
        raise InputError(f"inputs and labels must have a row each, got {len(inputs)} and {len(labels)}.")
    sgd = SGD(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        schedule=schedule,
        loss=loss,
    )
    plan = make_plan(
        len(inputs),
        masks=masks,
        num_subsets=num_subsets,
        fraction=fraction,
        models_per_subset=models_per_subset,
        seed=seed,
        keep_models=keep_models,
        target_rows=target_rows,
        version=version,
        recipe=_recipe(sgd, inputs, labels) if folder is not None else {},
    )
    results = Results(plan, folder)
    missing = results.missing()
    with one_torch_thread(), models_bar(plan.jobs(), missing, progress) as shown:
        for stack in _stacks(plan, missing, stack_size):
            models = [_build(build, job).to(inputs.device) for job in stack]
            _train(models, plan, stack, inputs, labels, sgd)
            for job, model in zip(stack, models):
                with calling(job), torch.no_grad(), seeded(job.seed):
                    values = outputs(model.eval())
                results.keep(job, model, values)
                shown.update(1)
    return results.bank()


def train_stack(
    models: Sequence[nn.Module],
    batches: Sequence[Iterator[Tensor]],
    inputs: Tensor,
    labels: Tensor,
    *,
    sgd: SGD,
    num_rows: int,
) -> None:
    """Train M models together, in place.

    Args:
        models: M modules of one architecture.
        batches: for each model the rows of its steps; all have as many steps, of the same sizes.
        inputs: [N, ...].
        labels: [N, ...].
        sgd: recipe.
        num_rows: n, rows per subset, for the schedule.
    """
    for model in models:
        model.train()
    parameters, buffers = stack_module_state(list(models))
    parameters = {name: tensor.detach() for name, tensor in parameters.items()}
    buffers = {name: tensor.detach() for name, tensor in buffers.items()}
    template = models[0]

    def loss_of(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return sgd.loss(functional_call(template, (parameters, buffers), (x,)), y)

    gradients_of = vmap(grad(loss_of))
    velocities = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    # One parameter of each name decides whether it is trained: the models are of one architecture.
    trained = {name for name, parameter in template.named_parameters() if parameter.requires_grad}
    for rate, rows in zip(sgd.rates(num_rows), zip(*batches, strict=True), strict=True):
        picked = torch.stack(rows).to(inputs.device)
        gradients = gradients_of(parameters, buffers, inputs[picked], labels[picked])
        for name in trained:
            step = gradients[name].add(parameters[name], alpha=sgd.weight_decay)
            velocities[name].mul_(sgd.momentum).add_(step)
            parameters[name].sub_(velocities[name], alpha=rate)
    with torch.no_grad():
        for index, model in enumerate(models):
            for name, parameter in model.named_parameters():
                parameter.copy_(parameters[name][index])


def _train(
    models: list[nn.Module], plan: Plan, stack: list[Job], inputs: Tensor, labels: Tensor, sgd: SGD
) -> None:
    rows = [plan.rows(job) for job in stack]
    seeds = [model_seed(plan.seed, job.subset, job.repeat, purpose="order") for job in stack]
    batches = [sgd.batches(each, seed) for each, seed in zip(rows, seeds)]
    try:
        train_stack(models, batches, inputs, labels, sgd=sgd, num_rows=len(rows[0]))
    except Exception as error:
        raise RetrainError(
            f"Training {len(models)} stacked models, from that of {stack[0]} on, failed: "
            f"{type(error).__name__}: {error}. If the model uses "
            "operations that torch.func.vmap cannot batch (random draws, data-dependent shapes, changes of buffers in "
            "place), use trak.evaluation.retrain, which trains one model after another."
        ) from error


def _stacks(plan: Plan, jobs: Sequence[Job], stack_size: int) -> Iterator[list[Job]]:
    """Jobs in groups of at most `stack_size` whose subsets have the same number of rows."""
    sizes = plan.masks.sum(dim=1).tolist()
    ordered = sorted(jobs, key=lambda job: sizes[job.subset])
    for _, group in itertools.groupby(ordered, key=lambda job: sizes[job.subset]):
        same = list(group)
        for start in range(0, len(same), stack_size):
            yield same[start : start + stack_size]


def _build(build: Callable[[], nn.Module], job: Job) -> nn.Module:
    """A new model, refused if vmap would train it wrongly."""
    with calling(job), seeded(job.seed):
        model = build()
    if not isinstance(model, nn.Module):
        raise InputError(f"build must return a torch.nn.Module, got {type(model).__name__}.")
    for name, module in model.named_modules():
        # _NormBase: batch and instance normalisation; with running statistics they change buffers in the forward pass.
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            raise InputError(
                f"{name or 'the model'} is a {type(module).__name__} with running statistics, which stacked models "
                "cannot keep: vmap has no buffers that change. Use GroupNorm or LayerNorm in its place, or "
                "trak.evaluation.retrain, which trains one model after another."
            )
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise InputError(
                f"{name or 'the model'} is a {type(module).__name__}: its draws would depend on which models are "
                "stacked. Set p=0, or use trak.evaluation.retrain, which trains one model after another."
            )
    return model


def _recipe(sgd: SGD, inputs: Tensor, labels: Tensor) -> dict[str, Any]:
    """Recipe and data as JSON values; a schedule is known by its rates, a loss by its name."""
    return {
        "method": "retrain_stacked",
        "epochs": sgd.epochs,
        "batch_size": sgd.batch_size,
        "lr": float(sgd.lr),
        "momentum": float(sgd.momentum),
        "weight_decay": float(sgd.weight_decay),
        "learning_rates": _digest(torch.tensor(sgd.rates(len(inputs)), dtype=torch.float64)),
        "loss": getattr(sgd.loss, "__qualname__", type(sgd.loss).__name__),
        "inputs": f"{inputs.dtype} {list(inputs.shape)} {_digest(inputs)}",
        "labels": f"{labels.dtype} {list(labels.shape)} {_digest(labels)}",
    }


def _digest(tensor: Tensor) -> str:
    # As bytes, since NumPy does not know every dtype.
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()[:16]
