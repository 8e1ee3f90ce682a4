"""What methods that read checkpoints share: devices, parameters, checkpoints in, rows in the store.

Kept apart from any one method so that a new one is a file with its own algebra only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trak.batches import batch_size
from trak.checkpoints import checkpoint_hash, describe, load_checkpoint
from trak.datasets import DatasetRows, RowSource, as_rows, content_hash
from trak.errors import CheckpointError, FingerprintError, InputError
from trak.gradients import (
    Auto,
    Functional,
    Gradients,
    Hooked,
    Reference,
    model_state,
    select_parameters,
    unwrapped,
)
from trak.logs import logger
from trak.memory import available_memory
from trak.methods.factors import kept_factors, stored_factors
from trak.pipeline import compare_stored, featurize
from trak.projection import Projection, default_projection
from trak.setting import Setting, verify
from trak.store import Header, Store, open_store
from trak.tasks import Task, resolve_task

Parameters = str | Sequence[str] | Callable[[str, nn.Parameter], bool] | None
DEFAULT_SHARD_ROWS = 1024


@dataclass(frozen=True, eq=False, kw_only=True)
class RunOptions:
    """Arguments common to the methods that compute per-example gradients; see `trak.attribute`."""

    model: nn.Module
    task: Task | str | Callable[..., Tensor]
    projection: Projection | None = None
    parameters: Parameters = None
    gradients: Gradients | str = "auto"
    save_dir: str | Path | None = None
    feature_dtype: str | None = None
    device: str | torch.device | None = None
    dtype: torch.dtype | None = None
    batch_size: int | None = None
    check: bool = True
    trust_pickle: bool = False
    progress: bool | None = None


@dataclass(frozen=True, eq=False)
class Run:
    """A training set and checkpoints with a feature store: what was featurized, and how to featurize more."""

    options: RunOptions
    setting: Setting
    train: RowSource
    store: Store
    checkpoints: tuple[Any, ...]
    model_ids: tuple[int, ...]
    is_verified: bool

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """The store's column slices, one per layer or one in all."""
        return tuple((start, stop) for _, start, stop in self.store.header.columns)

    def states(self) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
        """(model id, parameters and buffers on the device) of each checkpoint, one in memory at a time.

        Raises:
            CheckpointError: it is not what the training set was featurized at.
        """
        for model_id, source in zip(self.model_ids, self.checkpoints):
            state = load_state(self.options, self.setting, source)
            if checkpoint_hash(state) != self.store.checkpoint_fingerprint(model_id):
                raise CheckpointError(
                    f"{describe(source)} has changed since the training set was featurized: its targets would be compared with another "
                    "model's training examples. Call fit() again, and pass copies or paths of checkpoints that training goes on changing"
                )
            yield model_id, state


def start_run(
    options: RunOptions, train_set: Any, checkpoints: Sequence[Any] | None, *, is_fitted: bool = False
) -> Run:
    """Resolve the options, open the store, and featurize the training rows that are not there yet.

    Args:
        options: the method's arguments.
        train_set: the training examples.
        checkpoints: as in `trak.attribute`.
        is_fitted: as in `trak.projection.default_projection`, where no projection is named.

    Raises:
        TrakError: anything wrong with the arguments, the checkpoints, the gradients or the store.
    """
    setting = resolve_setting(options, is_fitted=is_fitted)
    train = as_rows(train_set, batch_size=options.batch_size, what="train_set")
    sources = checkpoint_list(options.model, checkpoints)
    header = make_header(setting, train.num_rows, options.feature_dtype, train_sample=_train_sample(train))
    if options.save_dir is None:
        _refuse_large_memory(header, len(sources))
    store = open_store(options.save_dir, header, shard_rows=DEFAULT_SHARD_ROWS)
    model_ids: list[int] = []
    is_verified = not options.check
    training = setting.for_training
    for index, source in enumerate(sources):
        state = load_state(options, setting, source)
        model_id = register(store, state)
        if model_id in model_ids:
            raise CheckpointError(
                f"checkpoint {index} ({describe(source)}) is the same as checkpoint {model_ids.index(model_id)}: an ensemble needs different "
                "models. If you pass one state dict that training goes on changing, pass copies or paths"
            )
        model_ids.append(model_id)
        rows = store.rows(model_id)
        if not is_verified and not rows.is_complete:
            training, is_verified = _verified(training, state, train)
        if options.check and options.save_dir is not None:
            compare_stored(training, state, train, rows, where=f"{options.save_dir}, checkpoint {index}")
        which = f"checkpoint {index + 1} of {len(sources)}"
        if not rows.is_complete:
            factors = kept_factors(training, state, store, model_id, train, label=which.capitalize())
            featurize(training, state, model_id, train, rows, label=f"Featurizing, {which}", factors=factors)
    if training.task is not setting.task and options.check:
        is_verified = False  # The targets' output has not been looked at.
    setting = replace(setting, gradients=training.gradients)
    return Run(options, setting, train, store, tuple(sources), tuple(model_ids), is_verified)


def featurize_targets(run: Run, targets: RowSource, *, as_training: bool = False) -> str:
    """Featurize targets at every checkpoint of the run; returns the experiment they are stored under.

    The experiment is named by the targets' content: the same targets are not computed twice, others never overwrite them.

    Args:
        run: the training side.
        targets: the examples.
        as_training: differentiate what is differentiated for training rows (see `Task.for_training`): features times weights are
            then −∇L of the targets for every task.
    """
    digest = content_hash(batch for _, batch in targets.batches())
    experiment = f"targets-{digest[:16]}"
    if as_training and run.setting.for_training is not run.setting:
        run, experiment = replace(run, setting=run.setting.for_training), f"loss-{experiment}"
    run.store.add_experiment(experiment, targets.num_rows, digest)
    if all(run.store.rows(model_id, experiment).is_complete for model_id in run.model_ids):
        return experiment
    setting, is_verified = run.setting, run.is_verified
    for index, (model_id, state) in enumerate(run.states()):
        if not is_verified:
            setting, is_verified = _verified(setting, state, targets)
        label = f"Targets, checkpoint {index + 1} of {len(run.model_ids)}"
        rows = run.store.rows(model_id, experiment)
        if not rows.is_complete:
            factors = stored_factors(setting, run.store, model_id)
            featurize(setting, state, model_id, targets, rows, label=label, factors=factors)
    return experiment


def first_batch(source: RowSource) -> Any:
    """The first examples of a source: the second batch where the first holds one example only."""
    found = [batch for _, batch in islice(source.batches(), 2)]
    return max(found, key=batch_size)


def _verified(setting: Setting, state: Mapping[str, Tensor], source: RowSource) -> tuple[Setting, bool]:
    """The setting with verified gradients, and whether that is the last word: a batch of one example cannot show mixing."""
    batch = first_batch(source)
    return verify(setting, state, batch), batch_size(batch) > 1


def resolve_setting(options: RunOptions, *, is_fitted: bool = False) -> Setting:
    """Names and defaults turned into objects.

    Args:
        options: the method's arguments.
        is_fitted: as in `trak.projection.default_projection`, where no projection is named.

    Raises:
        InputError: a model that is no module, an unknown task, gradients, device, dtype or parameter.
    """
    if not isinstance(options.model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module; got {type(options.model).__name__}")
    if options.dtype is not None and not getattr(options.dtype, "is_floating_point", False):
        raise InputError(
            f"dtype must be a floating-point torch.dtype such as torch.float32, or None for the model's own; got {options.dtype!r}"
        )
    model = unwrapped(options.model)
    shapes = select_parameters(model, options.parameters)
    projection = options.projection
    if projection is None:
        projection = default_projection(shapes, is_fitted=is_fitted)
    if not isinstance(projection, Projection):
        raise InputError(
            f"projection must be a trak projection such as trak.Sparse(dim=4096); got {type(projection).__name__}"
        )
    return Setting(
        model=model,
        task=resolve_task(options.task),
        gradients=resolve_gradients(options.gradients),
        projection=projection,
        shapes=shapes,
        device=resolve_device(options.device),
        dtype=options.dtype if options.dtype is not None else _common_dtype(model),
        progress=options.progress,
    )


def resolve_gradients(gradients: Gradients | str) -> Gradients:
    """A gradient source from an object or one of "auto", "hooked", "functional", "reference"."""
    if isinstance(gradients, Gradients):
        return gradients
    known: dict[str, Callable[[], Gradients]] = {
        "auto": Auto,
        "hooked": Hooked,
        "functional": Functional,
        "reference": Reference,
    }
    if gradients not in known:
        raise InputError(
            f"gradients must be one of {', '.join(known)}, or an object such as trak.Functional(); got {gradients!r}"
        )
    return known[gradients]()


def resolve_device(device: str | torch.device | None) -> torch.device:
    """What was asked for, or what the machine has: CUDA, then Apple's MPS, then the CPU.

    Raises:
        InputError: a device that this machine does not have.
    """
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f'device {str(device)!r} cannot be used here ({str(error).splitlines()[0]}): pass device="cpu", or None for what the machine has'
        ) from error
    return resolved


def make_header(setting: Setting, num_rows: int, feature_dtype: str | None, **extra: Any) -> Header:
    """The fingerprint of features made with this setting; by default they are stored in the dtype in which they are summed."""
    feature_dtype = feature_dtype or str(setting.sum_dtype).removeprefix("torch.")
    columns = setting.projection.columns(setting.shapes)
    task = dict(setting.task.fingerprint())
    training = setting.for_training.task
    if training is not setting.task:
        task["training"] = training.fingerprint()
    return Header(
        num_rows=num_rows,
        dim=columns[-1].stop,
        columns=[(column.name, column.start, column.stop) for column in columns],
        parameters={name: tuple(shape) for name, shape in setting.shapes.items()},
        projection=setting.projection.fingerprint(),
        task=task,
        compute_dtype=str(setting.dtype or "float32").removeprefix("torch."),
        feature_dtype=feature_dtype,
        extra={key: value for key, value in extra.items() if value is not None},
    )


def load_state(options: RunOptions, setting: Setting, source: Any) -> Mapping[str, Tensor]:
    """A checkpoint's parameters and buffers under the model's names, on the device."""
    checkpoint = load_checkpoint(source, model=setting.model, trust_pickle=options.trust_pickle)
    try:
        return model_state(setting.model, checkpoint, setting.device, setting.dtype)
    except CheckpointError as error:
        raise CheckpointError(f"{describe(source)}: {error}") from error


def register(store: Store, state: Mapping[str, Tensor]) -> int:
    """The store's number for this checkpoint: the one it had before, else the next free one."""
    fingerprint = checkpoint_hash(state)
    while True:
        known = {store.checkpoint_fingerprint(model_id): model_id for model_id in store.checkpoints()}
        if fingerprint in known:
            return known[fingerprint]
        model_id = max(known.values(), default=-1) + 1
        try:
            store.add_checkpoint(model_id, fingerprint)
            return model_id
        except FingerprintError:
            # Another process may have taken the number since the list was read.
            if model_id not in store.checkpoints():
                raise


def checkpoint_list(model: nn.Module, checkpoints: Sequence[Any] | None) -> list[Any]:
    """The checkpoints as a list; the model's own state if there are none.

    Raises:
        InputError: something else than a list, or an empty one.
    """
    if checkpoints is None:
        return [model]
    if isinstance(checkpoints, (str, Path, Mapping, nn.Module)) or not isinstance(checkpoints, Sequence):
        raise InputError(
            f"checkpoints must be a list, one entry for each model of the ensemble; got {type(checkpoints).__name__}: write [checkpoint]"
        )
    if not checkpoints:
        raise InputError("checkpoints is an empty list: pass at least one, or None for the model's own state")
    return list(checkpoints)


def _train_sample(train: RowSource) -> str | None:
    """A digest of some training rows, so that a store is not reused for other data of the same size."""
    first = train.sample_hash()
    # Only a dataset's own code can draw at random.
    if not isinstance(train, DatasetRows) or first == train.sample_hash():
        return first
    logger.warning(
        "the training set gives different examples each time it is read (random augmentation?): gradients will be those of one random draw. "
        "Attribution usually wants the plain examples"
    )
    return None


def _refuse_large_memory(header: Header, num_checkpoints: int) -> None:
    size = {"float64": 8, "float32": 4}.get(header.feature_dtype, 2)
    needed, available = header.num_rows * header.dim * size * num_checkpoints, available_memory()
    if available is not None and needed > 0.8 * available:
        raise InputError(
            f"features of {header.num_rows:,} rows × {header.dim:,} numbers × {num_checkpoints} checkpoints need {needed / 2**30:.1f} GiB and "
            f"{available / 2**30:.1f} GiB of memory are free: pass save_dir=… to keep them on disk, "
            'or feature_dtype="float16", or a smaller projection'
        )


def _common_dtype(model: nn.Module) -> torch.dtype | None:
    """float64 for a model that is float64 throughout, so that sums are too; otherwise None: each parameter keeps its own."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return torch.float64 if dtypes == {torch.float64} else None
