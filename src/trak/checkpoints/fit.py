"""A checkpoint's tensors under the names of the model that they are for."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from trak.errors import CheckpointError

_COMPILED = "_orig_mod."


def fit_names(model: nn.Module, state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The state without the prefix under which it holds the whole model, and without what lies outside of it.

    As it is where its names are the model's own, or no prefix makes them so: then whoever takes the state up says what is wrong.

    Raises:
        CheckpointError: it holds the whole model under several prefixes.
    """
    own = [name.replace(_COMPILED, "") for name in model.state_dict()]
    given = {name.replace(_COMPILED, ""): value for name, value in state.items()}
    if len(given) < len(state) or not own or set(given) <= set(own):
        return dict(state)
    needed = [[name.replace(_COMPILED, "") for name in names] for names in _saved_names(model)]
    prefixes = [
        prefix
        for prefix in _prefixes(given, needed[0])
        if all(any(prefix + name in given for name in names) for names in needed)
    ]
    if not prefixes or "" in prefixes:
        return dict(state)
    if len(prefixes) > 1:
        raise CheckpointError(
            f"{where} holds the model {len(prefixes)} times, under {', '.join(map(repr, prefixes))}: which one is meant? Give a callable "
            "that returns the state dict of one."
        )
    compiled = dict(zip(own, model.state_dict()))
    return {compiled[name]: given[prefixes[0] + name] for name in own if prefixes[0] + name in given}


def with_frozen(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state, with the model's own tensors where it has none: shared, not copied."""
    aliases = {name: names for names in _saved_names(model) for name in names}
    held = {other for name in state for other in aliases.get(name, ())}
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {
        **{name: tensor.detach() for name, tensor in tensors.items() if name in aliases and name not in held},
        **state,
    }


def _saved_names(model: nn.Module) -> list[list[str]]:
    """The names of each parameter and saved buffer: several for a tied one."""
    saved = set(model.state_dict())
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    names: dict[int, list[str]] = {}
    for name, tensor in named:
        if name in saved:
            names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def _prefixes(given: Mapping[str, Tensor], names: list[str]) -> list[str]:
    """What precedes one of these names, in whole parts, in the order in which it is found."""
    found = [
        other.removesuffix(name)
        for name in names
        for other in given
        if other.endswith(f".{name}") or other == name
    ]
    return list(dict.fromkeys(found))
