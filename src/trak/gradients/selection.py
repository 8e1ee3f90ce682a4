"""Which parameters are attributed, and which tensors a checkpoint gives them.

A parameter's canonical name is the first under which `named_parameters` gives it; tied ones have others too,
which are accepted wherever names are read and never given back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from trak.errors import CheckpointError, ParameterError
from trak.gradients.swap import LENDING
from trak.gradients.wrappers import COMPILED, named_buffers, named_parameters

Selection = None | str | Sequence[str] | Callable[[str, nn.Parameter], bool]
"""How a user says which parameters: see `select_parameters`."""

_PARALLEL = "module."


def select_parameters(model: nn.Module, parameters: Selection = None) -> dict[str, tuple[int, ...]]:
    """Attributed parameters: canonical name to shape, in the model's order.

    Args:
        model: any module; not changed.
        parameters: which ones.
            None: those that require gradients.
            A name or pattern (`"fc.weight"`, `"layers.*.bias"`), or several: those that match, frozen ones
            too. A function (name, parameter) -> bool: those for which it is true.

    Parameters that are not floating-point numbers (quantised weights) are left out, unless asked for by their
    exact name.

    Raises:
        ParameterError: nothing is selected, a pattern matches nothing, or a selected parameter is complex or has no
            floating-point numbers.
    """
    with LENDING:
        return _selected(model, parameters)


def _selected(model: nn.Module, parameters: Selection) -> dict[str, tuple[int, ...]]:
    named = dict(named_parameters(model))
    if not named:
        raise ParameterError(f"{type(model).__name__} has no parameters to attribute to")
    lazy = [name for name, p in named.items() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise ParameterError(
            f"{len(lazy)} parameters have no shape yet, first {lazy[0]!r}: the model has lazy modules. Call it "
            "once on a batch, then load the checkpoint and attribute"
        )
    if parameters is None:
        chosen = {name for name, parameter in named.items() if parameter.requires_grad}
        nothing = (
            "no parameter requires gradients; choose some with parameters=, "
            "e.g. parameters='*' for all of them"
        )
    elif callable(parameters):
        chosen = {name for name, parameter in named.items() if parameters(name, parameter)}
        nothing = (
            f"parameters= chose none of the model's {len(named)} parameters, e.g. not {next(iter(named))!r}"
        )
    else:
        patterns = [parameters] if isinstance(parameters, str) else list(parameters)
        chosen = set().union(*(_matches(model, named, pattern) for pattern in patterns))
        nothing = (
            "parameters= is an empty list; pass names or patterns, or None for all that require gradients"
        )
    if not chosen:
        raise ParameterError(nothing)
    complex_ones = [name for name in named if name in chosen and named[name].is_complex()]
    if complex_ones:
        # They were trained with the rest: to leave them out is for the user to say.
        raise ParameterError(
            f"{len(complex_ones)} of the {len(chosen)} selected parameters are complex, first {complex_ones[0]!r}, and gradients are taken of real "
            "numbers only: keep them as real parameters [..., 2] and use torch.view_as_complex in forward, or leave them out with "
            "parameters=lambda name, parameter: parameter.is_floating_point()"
        )
    shapes = {name: tuple(p.shape) for name, p in named.items() if name in chosen and p.is_floating_point()}
    if not shapes:
        raise ParameterError(
            f"none of the {len(chosen)} selected parameters holds floating-point numbers: they have no "
            "gradients"
        )
    return shapes


def model_state(
    model: nn.Module,
    checkpoint: Mapping[str, Tensor] | None,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Every parameter and buffer of a checkpoint by canonical name, detached, on `device`.

    Prefixes of wrappers ("module." of DistributedDataParallel, "_orig_mod." of torch.compile) on either side
    are looked through where everything fits without them. A tied tensor may be there under any of its names.
    Buffers that are not saved (`persistent=False`) come from the model. Buffers, and embeddings that the forward
    pass rescales (`max_norm`), are copied; other parameters share memory with the checkpoint where neither device
    nor dtype changes.

    Args:
        model: gives names, shapes and dtypes; not changed.
        checkpoint: a state dict; None takes the model's own tensors.
        device: where the tensors go.
        dtype: of all floating-point tensors; None keeps the model's own, tensor by tensor.

    Raises:
        CheckpointError: missing, unexpected or ill-shaped tensors, or a tied parameter with two different
            values.
    """
    with LENDING:
        return _state(model, checkpoint, device, dtype)


def _state(
    model: nn.Module,
    checkpoint: Mapping[str, Tensor] | None,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    tensors = _canonical_tensors(model)
    aliases = _aliases(model)
    if checkpoint is None:
        found: dict[str, Tensor] = {}
    else:
        found = _resolve(model, _fit_names(aliases, checkpoint), aliases)
    shareable = {name for name, _ in named_parameters(model)} - _rescaled(model, aliases)
    state = {}
    for name, own in tensors.items():
        source = found.get(name, own).detach()
        if source.is_meta:
            raise CheckpointError(
                f"{name!r} has no values: the model is on the meta device and the checkpoint does not hold "
                "this tensor. Build the model on a real device, so that its unsaved buffers are computed"
            )
        kind = dtype if dtype is not None and own.is_floating_point() else own.dtype
        if not own.is_floating_point() and name in found and _same(source, own):
            source = own.detach()  # the very tensor: quantised layers read more from it than its numbers
        moved = source.to(device=device, dtype=kind)
        copied = moved.data_ptr() != source.data_ptr()
        state[name] = moved if copied or name in shareable else moved.clone()
    return state


def _matches(model: nn.Module, named: Mapping[str, nn.Parameter], pattern: str) -> set[str]:
    """Canonical names that one pattern stands for."""
    canonical = {id(parameter): name for name, parameter in named.items()}
    every = {
        name: canonical[id(p)]
        for named_as in (
            named_parameters(model, remove_duplicate=False),
            model.named_parameters(remove_duplicate=False),
        )
        for name, p in named_as
    }
    if pattern in every:
        if not named[every[pattern]].is_floating_point():
            raise ParameterError(
                f"parameter {pattern!r} holds {named[every[pattern]].dtype}, which has no gradients; leave "
                "it out"
            )
        return {every[pattern]}
    matched = {name for alias, name in every.items() if fnmatchcase(alias, pattern)}
    if not matched:
        raise ParameterError(f"no parameter is called or matches {pattern!r}. {_suggestion(pattern, every)}")
    return matched


def _suggestion(wanted: str, names: Iterable[str]) -> str:
    names = list(names)
    if any(name.startswith(f"{wanted}.") for name in names):
        return f"It is a module: write {wanted + '.*'!r} for all its parameters"
    close = get_close_matches(wanted, names, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(map(repr, close))}?"
    shown = ", ".join(map(repr, names[:5]))
    return f"The model has {len(names)} parameters: {shown}{', …' if len(names) > 5 else ''}"


def _rescaled(model: nn.Module, aliases: Mapping[str, str]) -> set[str]:
    """Canonical names of weights that the forward pass writes to."""
    return {
        aliases[f"{name}.weight" if name else "weight"]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        and module.max_norm is not None
        and module._parameters.get("weight") is not None
    }


def _canonical_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(named_parameters(model)), **dict(named_buffers(model))}


def _aliases(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter and buffer, to its canonical name."""
    canonical = {id(tensor): name for name, tensor in _canonical_tensors(model).items()}
    named = [
        *named_parameters(model, remove_duplicate=False),
        *named_buffers(model, remove_duplicate=False),
        # A model with compiled parts writes state dicts under these.
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {name: canonical[id(tensor)] for name, tensor in named}


def _fit_names(aliases: Mapping[str, str], checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint under the model's own names, where leaving out prefixes of wrappers makes all fit."""
    # Extra state is a module's own business and never a tensor that f depends on through the swap.
    given = {name: value for name, value in checkpoint.items() if not name.endswith("_extra_state")}
    strangers = [name for name, value in given.items() if not isinstance(value, Tensor)]
    if strangers:
        raise CheckpointError(
            f"a checkpoint must map names to tensors; {strangers[0]!r} holds "
            f"{type(given[strangers[0]]).__name__}. If this is a training checkpoint, pass the state dict "
            "inside it, e.g. checkpoint['model'] or checkpoint['state_dict']"
        )
    if all(name in aliases for name in given):
        return given
    bare_to_own: dict[str, str] = {}
    for bare, name in zip(_unwrapped(list(aliases)), aliases):
        # Two names that differ by a prefix must mean one tensor.
        if aliases[bare_to_own.setdefault(bare, name)] != aliases[name]:
            return given
    bare_names = _unwrapped(list(given))
    if len(set(bare_names)) == len(given) and all(bare in bare_to_own for bare in bare_names):
        return {bare_to_own[bare]: value for bare, value in zip(bare_names, given.values())}
    return given


def _unwrapped(names: list[str]) -> list[str]:
    """Names without the prefixes of wrappers: those that all names share, and torch.compile's anywhere."""
    names = [name.replace(COMPILED, "") for name in names]
    while names and all(name.startswith(_PARALLEL) for name in names):
        names = [name.removeprefix(_PARALLEL) for name in names]
    return names


def _resolve(model: nn.Module, given: Mapping[str, Tensor], aliases: Mapping[str, str]) -> dict[str, Tensor]:
    """Checked tensors under canonical names."""
    tensors = _canonical_tensors(model)
    own = model.state_dict(keep_vars=True)
    saved = {aliases[name] for name in own if name in aliases}
    unexpected = [name for name in given if name not in aliases and name not in own]
    _require_same_beside(
        {name: (given[name], own[name]) for name in given if name not in aliases and name in own}
    )
    found: dict[str, Tensor] = {}
    for name, value in given.items():
        canonical = aliases.get(name)
        if canonical is None or canonical not in saved:
            continue
        if value.shape != tensors[canonical].shape:
            raise CheckpointError(
                f"{name!r} has shape {list(value.shape)} in the checkpoint and "
                f"{list(tensors[canonical].shape)} in the model. Build the model with the settings the "
                "checkpoint was trained with"
            )
        if canonical in found and not _same(found[canonical], value):
            raise CheckpointError(
                f"{name!r} and {canonical!r} are one tensor in the model and have different values in the "
                "checkpoint: it was trained without tying them; build the model untied"
            )
        found.setdefault(canonical, value)
    missing = [name for name in tensors if name in saved and name not in found]
    if missing or unexpected:
        raise CheckpointError(_misfit(missing, unexpected, list(given), list(aliases)))
    return found


def _require_same_beside(pairs: Mapping[str, tuple[Tensor, Any]]) -> None:
    """What quantised layers save beside their tensors cannot be exchanged, so that it must be the model's."""
    for name, (given, own) in pairs.items():
        if not isinstance(own, Tensor) or own.shape != given.shape or not _same(own, given):
            raise CheckpointError(
                f"{name!r} is neither a parameter nor a buffer of the model, cannot be exchanged and differs from the "
                "model's: are the quantised weights of the checkpoint others than the model's? Load the checkpoint into the "
                "model as its library does, and pass the model"
            )


def _same(one: Tensor, other: Tensor) -> bool:
    if one.data_ptr() == other.data_ptr() and one.device == other.device and one.stride() == other.stride():
        return True
    return torch.equal(one.detach().cpu(), other.detach().cpu())


def _misfit(missing: list[str], unexpected: list[str], given: list[str], own: list[str]) -> str:
    parts = ["the checkpoint does not fit the model:"]
    for what, names, others in (
        ("missing from the checkpoint", missing, given),
        ("unknown to the model", unexpected, own),
    ):
        if names:
            close = get_close_matches(names[0], others, n=1, cutoff=0.5)
            hint = f" (close to {close[0]!r})" if close else ""
            parts.append(f"{len(names)} tensors are {what}, first {names[0]!r}{hint};")
    parts.append(
        "build the model with the settings the checkpoint was trained with, or rename the checkpoint's keys. "
        f"The checkpoint holds {len(given)} tensors, the model {len(own)}"
    )
    return " ".join(parts)
