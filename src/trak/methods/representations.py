"""What a layer makes of every example, at every checkpoint: for methods that compare representations.

Shape legend: N rows, B examples of a batch, D numbers per representation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from trak import batches
from trak.checkpoints import checkpoint_hash, describe
from trak.datasets import RowSource, as_rows
from trak.errors import CheckpointError, InputError, NonFiniteError
from trak.gradients import lend
from trak.gradients.base import random_state_kept
from trak.memory import available_memory
from trak.methods.runs import RunOptions, checkpoint_list, load_state, resolve_setting
from trak.progress import bar
from trak.projection import Identity
from trak.setting import Setting, bound_task, prepare, refuse_autocast
from trak.tasks import Task

Transform = Callable[[Any], Tensor]


@dataclass(frozen=True, eq=False, kw_only=True)
class RepresentationOptions:
    """Arguments common to the methods that compare representations.

    Attributes:
        layer: the name of a module, as in `model.named_modules()`, whose output represents an example; None for what goes into the
            last `torch.nn.Linear` that the forward pass reaches.
        transform: what the layer gave for a batch -> [B, …], before all but the first dimension are flattened: to pool positions, or to
            pick an item out of a tuple.
        device: where the model runs; None for what the machine has.
        dtype: in which it computes; None leaves each parameter's own.
        batch_size: examples at a time; None for the loader's, or 64.
        trust_pickle: load checkpoints that run code of their own.
        progress: True or False to force progress bars.
    """

    layer: str | None = None
    transform: Transform | None = None
    device: str | torch.device | None = None
    dtype: torch.dtype | None = None
    batch_size: int | None = None
    trust_pickle: bool = False
    progress: bool | None = None


@dataclass(frozen=True, eq=False)
class Representations:
    """A training set's representations at some checkpoints, and how to get others'.

    Attributes:
        train: the training examples.
        features: [N, D] of each checkpoint, on the CPU.
        layer: the name of the layer; None for the input of the last Linear.
    """

    options: RunOptions
    setting: Setting
    layer: str | None
    transform: Transform | None
    sources: tuple[Any, ...]
    hashes: tuple[str, ...]
    train: RowSource
    features: tuple[Tensor, ...]

    def of(self, targets: RowSource) -> tuple[Tensor, ...]:
        """The targets' representations at each checkpoint, [T, D].

        Raises:
            CheckpointError: a checkpoint has changed since the training set was read.
        """
        features = []
        for index, (source, expected) in enumerate(zip(self.sources, self.hashes)):
            state = load_state(self.options, self.setting, source)
            if checkpoint_hash(state) != expected:
                raise CheckpointError(
                    f"{describe(source)} has changed since fit(): call fit() again, and pass copies or paths of checkpoints that training "
                    "goes on changing"
                )
            label = f"Targets, checkpoint {index + 1} of {len(self.sources)}"
            features.append(_represent(self.setting, self.layer, self.transform, state, targets, label))
        return tuple(features)


def represent(
    options: RepresentationOptions,
    model: nn.Module,
    task: Task | str | Callable[..., Tensor],
    train_set: Any,
    checkpoints: Sequence[Any] | None,
) -> Representations:
    """The training set's representations at every checkpoint.

    Raises:
        InputError: a layer that is not there, is not reached, is reached several times, or gives no tensor [B, …]; a call under autocast.
        CheckpointError: a checkpoint cannot be read or does not fit.
        NonFiniteError: NaN or infinity in the representations.
    """
    run_options = RunOptions(
        model=model,
        task=task,
        # Neither is used: no gradients are taken.
        projection=Identity(),
        parameters="*",
        device=options.device,
        dtype=options.dtype,
        batch_size=options.batch_size,
        trust_pickle=options.trust_pickle,
        progress=options.progress,
    )
    setting = resolve_setting(run_options)
    if options.layer is not None:
        find_layer(model, options.layer)
    train = as_rows(train_set, batch_size=options.batch_size, what="train_set")
    sources = tuple(checkpoint_list(model, checkpoints))
    features, hashes = [], []
    for index, source in enumerate(sources):
        state = load_state(run_options, setting, source)
        hashes.append(checkpoint_hash(state))
        label = f"Representations, checkpoint {index + 1} of {len(sources)}"
        features.append(_represent(setting, options.layer, options.transform, state, train, label))
    return Representations(
        run_options,
        setting,
        options.layer,
        options.transform,
        sources,
        tuple(hashes),
        train,
        tuple(features),
    )


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """The module of that name.

    Raises:
        InputError: there is none; the message names the closest.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if name in modules:
        return modules[name]
    names = [known for known in modules if known]
    close = get_close_matches(str(name), names, n=3, cutoff=0.5)
    shown = ", ".join(map(repr, names[:8])) + (", …" if len(names) > 8 else "")
    hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else f"The model has the modules {shown}"
    raise InputError(f"layer {name!r} is no module of the model. {hint}")


def collect(source: RowSource, compute: Callable[[Any], Any], label: str, progress: bool | None) -> Tensor:
    """compute(batch) of every batch, flattened to [N, D] on the CPU.

    Raises:
        InputError: no floating-point tensor with a row per example, other sizes from batch to batch, or more than fits in memory.
        NonFiniteError: NaN or infinity.
    """
    out_ND: Tensor | None = None
    with bar(source.num_rows, label, enabled=progress) as shown:
        for rows_B, batch in source.batches():
            values = compute(batch)
            if (
                not isinstance(values, Tensor)
                or not values.is_floating_point()
                or values.shape[:1] != (len(rows_B),)
            ):
                raise InputError(
                    f"{label}: a representation must be a floating-point tensor with a row for each of the {len(rows_B)} examples; got "
                    f"{batches.describe(values)}. Name another layer=, or give a transform= that makes one of it"
                )
            values_BD = values.detach().reshape(len(rows_B), -1).cpu()
            # bfloat16 and float16 have too few digits for sums of products.
            values_BD = values_BD if values_BD.dtype == torch.float64 else values_BD.float()
            if not bool(values_BD.isfinite().all()):
                raise NonFiniteError(
                    f"{label}: NaN or infinity in rows {int(rows_B[0])} to {int(rows_B[-1])}"
                )
            if out_ND is None:
                _refuse_large(source.num_rows, values_BD, label)
                out_ND = values_BD.new_empty(source.num_rows, values_BD.shape[1])
            if values_BD.shape[1] != out_ND.shape[1]:
                raise InputError(
                    f"{label}: representations have {out_ND.shape[1]} numbers in the first batch and {values_BD.shape[1]} in rows "
                    f"{int(rows_B[0])} to {int(rows_B[-1])}: give a transform= that pools what differs in length"
                )
            out_ND[rows_B] = values_BD
            shown.update(len(rows_B))
    assert out_ND is not None
    return out_ND


def _represent(
    setting: Setting,
    layer: str | None,
    transform: Transform | None,
    state: Mapping[str, Tensor],
    source: RowSource,
    label: str,
) -> Tensor:
    refuse_autocast(setting.device)
    task = bound_task(setting, state)

    def compute(batch: Any) -> Any:
        batch = prepare(setting, batch)
        with (
            random_state_kept(state),
            torch.no_grad(),
            lend(setting.model, state) as lent,
            _captured(lent, layer, transform) as found,
        ):
            task.output(lent, batch)
        if not found:
            what = "no torch.nn.Linear" if layer is None else f"layer {layer!r}"
            raise InputError(
                f"{what} is reached by the forward pass of {type(setting.task).__name__}: name a layer= that is, as in model.named_modules()"
            )
        if layer is not None and len(found) > 1:
            raise InputError(
                f"layer {layer!r} is called {len(found)} times in one forward pass, so that its output is not one: name a module that is "
                "called once"
            )
        return found[-1]

    return collect(source, compute, label, setting.progress)


@contextmanager
def _captured(model: nn.Module, layer: str | None, transform: Transform | None) -> Iterator[list[Any]]:
    """What the layer gives, or what goes into each Linear (the last one kept), during the forward passes inside."""
    found: list[Any] = []

    def kept(value: Any) -> Any:
        value = value if transform is None else transform(value)
        # A copy, for the next module may work in place.
        return value.clone() if isinstance(value, Tensor) else value

    def keep_output(module: nn.Module, inputs: Any, output: Any) -> None:
        found.append(kept(output))

    def keep_input(module: nn.Module, inputs: Any, named: Any) -> None:
        found[:] = [kept(inputs[0] if inputs else named["input"])]

    if layer is None:
        handles = [
            module.register_forward_pre_hook(keep_input, with_kwargs=True)
            for module in model.modules()
            if isinstance(module, nn.Linear)
        ]
    else:
        handles = [find_layer(model, layer).register_forward_hook(keep_output)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _refuse_large(num_rows: int, values_BD: Tensor, label: str) -> None:
    needed = num_rows * values_BD.shape[1] * values_BD.element_size()
    available = available_memory()
    if available is not None and needed > 0.8 * available:
        raise InputError(
            f"{label}: {num_rows:,} rows × {values_BD.shape[1]:,} numbers need {needed / 2**30:.1f} GiB and {available / 2**30:.1f} GiB of "
            "memory are free: name a narrower layer=, or give a transform= that pools"
        )
