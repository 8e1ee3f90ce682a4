"""Methods that read per-example gradients as they are computed, and keep products of them only.

For methods in the parameters themselves: N × P stored numbers would be too many, and one pass over the training set does.

Shape legend: N training rows, T targets, B examples of a batch, P parameters, K columns of a product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trak.checkpoints import checkpoint_hash, describe
from trak.datasets import RowSource, as_rows
from trak.errors import CheckpointError, InputError
from trak.memory import available_memory
from trak.methods.runs import RunOptions, checkpoint_list, first_batch, load_state, resolve_setting
from trak.methods.weights import flattened
from trak.methods.whole_gradients import WholeGradients
from trak.progress import bar
from trak.projection import Identity
from trak.results import Attribution
from trak.scores import ArrayScores
from trak.setting import Setting, prepare, verify

State = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Products:
    """What a pass over some examples gave.

    Attributes:
        values: ∇f(z)ᵀ times a matrix, [N, K] on the CPU.
        outputs: f, [N].
        weights: q = −∂L/∂f, [N].
    """

    values: Tensor
    outputs: Tensor
    weights: Tensor


@dataclass(frozen=True, eq=False)
class Passes:
    """A training set and checkpoints whose gradients are computed where they are needed.

    Attributes:
        options: the arguments.
        setting: what they mean; gradients are verified.
        train: the training examples.
        sources: the checkpoints.
        hashes: of their content.
        names: attributed parameters in the order of a gradient's entries.
    """

    options: RunOptions
    setting: Setting
    train: RowSource
    sources: tuple[Any, ...]
    hashes: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def num_parameters(self) -> int:
        """P."""
        return sum(int(torch.Size(shape).numel()) for shape in self.setting.shapes.values())

    def states(self) -> Iterator[State]:
        """Each checkpoint's parameters and buffers on the device, one in memory at a time.

        Raises:
            CheckpointError: a checkpoint has changed since fit().
        """
        for source, expected in zip(self.sources, self.hashes):
            state = load_state(self.options, self.setting, source)
            if checkpoint_hash(state) != expected:
                raise CheckpointError(
                    f"{describe(source)} has changed since fit(): call fit() again, and pass copies or paths of checkpoints that training "
                    "goes on changing"
                )
            yield state

    def products(
        self, state: State, source: RowSource, matrix_PK: Tensor | None = None, *, label: str
    ) -> Products:
        """∇f(z)ᵀM of every example of `source`; without a matrix the gradients themselves, [N, P].

        Raises:
            InputError: [N, K] does not fit in memory.
            NonFiniteError: an output, a weight or a gradient is NaN or infinite.
        """
        setting = self.setting
        width = self.num_parameters if matrix_PK is None else matrix_PK.shape[1]
        _refuse_large(source.num_rows, width, setting.sum_dtype, label)
        values_NK = torch.empty(source.num_rows, width, dtype=setting.sum_dtype)
        outputs_N = torch.empty(source.num_rows, dtype=setting.sum_dtype)
        weights_N = torch.empty_like(outputs_N)
        gradients = WholeGradients(setting, state)
        if matrix_PK is not None:
            matrix_PK = matrix_PK.to(setting.device, setting.sum_dtype)
        with bar(source.num_rows, label, enabled=setting.progress) as shown:
            for rows_B, batch in source.batches():
                where = f"{label}, rows {int(rows_B[0])} to {int(rows_B[-1])}"
                gradients_BP, found = gradients(prepare(setting, batch), label=where)
                values_BK = gradients_BP if matrix_PK is None else gradients_BP @ matrix_PK
                values_NK.index_copy_(0, rows_B, values_BK.cpu())
                outputs_N[rows_B] = found.f.to(outputs_N)
                weights_N[rows_B] = found.q.to(weights_N)
                shown.update(len(rows_B))
        return Products(values_NK, outputs_N, weights_N)


def start_passes(options: RunOptions, train_set: Any, checkpoints: Sequence[Any] | None) -> Passes:
    """Resolve the options, look at every checkpoint once, and verify the gradients on a first batch.

    Raises:
        InputError: a projection, or a store, which have no use here.
        TrakError: anything wrong with the other arguments, the checkpoints or the gradients.
    """
    name = type(options).__name__
    if options.projection is not None and not isinstance(options.projection, Identity):
        raise InputError(
            f"{name} works in the parameters themselves and takes no projection; got {options.projection!r}. Choose fewer parameters=, "
            "or use TRAK"
        )
    if options.save_dir is not None or options.feature_dtype is not None:
        raise InputError(
            f"{name} computes gradients where they are needed and stores none: leave out save_dir and feature_dtype"
        )
    setting = resolve_setting(replace(options, projection=Identity()))
    train = as_rows(train_set, batch_size=options.batch_size, what="train_set")
    sources = tuple(checkpoint_list(options.model, checkpoints))
    hashes: list[str] = []
    for index, source in enumerate(sources):
        state = load_state(options, setting, source)
        digest = checkpoint_hash(state)
        if digest in hashes:
            raise CheckpointError(
                f"checkpoint {index} ({describe(source)}) is the same as checkpoint {hashes.index(digest)}: an ensemble needs different models. "
                "If you pass one state dict that training goes on changing, pass copies or paths"
            )
        hashes.append(digest)
        if index == 0 and options.check:
            setting = verify(setting, state, first_batch(train))
    placements = Identity().init(setting.shapes).placements
    names = tuple(sorted(setting.shapes, key=lambda name: placements[name].start))
    return Passes(options, setting, train, sources, tuple(hashes), names)


def influence_attribution(
    passes: Passes,
    targets: Any,
    solve: Callable[[int, State, Tensor], Tensor],
    info: Mapping[str, Any],
    *,
    weight_exponent: float = 1.0,
) -> Attribution:
    """τ(z_i, z) = 1/(M N) Σ_m q_m(z_i)^γ ∇f_m(z_i)ᵀ H_m⁻¹ ∇f_m(z), by one pass over the targets and one over the training set.

    Args:
        passes: the training set and checkpoints.
        targets: what `as_rows` takes.
        solve: (index of the checkpoint, its state, ∇f [T, P]) -> H⁻¹∇f [T, P].
        info: the method and its settings.
        weight_exponent: γ; 1 is an influence function.

    Raises:
        TrakError: anything wrong with the targets, or what `solve` raises.
    """
    target_rows = as_rows(targets, batch_size=passes.options.batch_size, what="targets")
    count = len(passes.sources)
    scores_NT = torch.zeros(passes.train.num_rows, target_rows.num_rows, dtype=passes.setting.sum_dtype)
    weights_N, outputs_T = torch.zeros(len(scores_NT)), torch.zeros(scores_NT.shape[1])
    for index, state in enumerate(passes.states()):
        which = f"checkpoint {index + 1} of {count}"
        wanted = passes.products(state, target_rows, label=f"Targets, {which}")
        solved_TP = solve(index, state, wanted.values)
        own = passes.products(state, passes.train, solved_TP.T, label=f"Training gradients, {which}")
        own_N = flattened(own.weights, weight_exponent)
        scores_NT += own_N.unsqueeze(1) * own.values / (len(scores_NT) * count)
        weights_N = weights_N + own_N / count
        outputs_T = outputs_T + wanted.outputs / count
    return Attribution(
        scores=ArrayScores(scores_NT),
        weights=weights_N,
        outputs=outputs_T,
        info=about(passes, info),
        train_rows=passes.train,
        target_rows=target_rows,
    )


def about(passes: Passes, info: Mapping[str, Any]) -> dict[str, Any]:
    """What an attribution says of how it was made."""
    return {
        **info,
        "checkpoints": list(passes.hashes),
        "task": dict(passes.setting.task.fingerprint()),
        "num_parameters": passes.num_parameters,
    }


def _refuse_large(rows: int, columns: int, dtype: torch.dtype, label: str) -> None:
    needed, available = rows * columns * dtype.itemsize, available_memory()
    if available is not None and needed > 0.8 * available:
        raise InputError(
            f"{label}: {rows:,} rows × {columns:,} numbers need {needed / 2**30:.1f} GiB and {available / 2**30:.1f} GiB of memory are free: "
            "attribute fewer targets at a time, or choose fewer parameters="
        )
