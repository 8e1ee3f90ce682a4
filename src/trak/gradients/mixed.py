"""Which parameters go by layer rules, and which by a way of their own: how `Hooked` is made to fit a model.

Where no rule covers a parameter, or the first-batch check finds a rule wrong, and also with rows sorted by example, the
parameter moves up: to an expanded copy per example if it has a leading dimension of 1, to a local pass through the module that holds it,
then through that module's parent, and so on (see `trak.gradients.local`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

from torch import nn

from trak.errors import GradientError
from trak.gradients.base import BlamedError
from trak.gradients.hooked import Hooked
from trak.gradients.local import Local
from trak.gradients.plan import holders, join
from trak.gradients.swap import LENDING
from trak.gradients.wrappers import named_parameters

_LARGEST_SHARE = 0.5
"""Of all attributed numbers in a local pass through the whole model: with more, it is better done without hooks."""


def with_local_passes(hooked: Hooked, model: nn.Module, names: Sequence[str]) -> Hooked | None:
    """`hooked` with another way for every parameter that no rule covers; None if there is none."""
    with LENDING:
        slots = _slots(model, names)
        expanded: list[str] = []
        homes: dict[str, str] = {}
        uncovered = hooked.covers(model, names)
        needy = {
            path.rpartition(".")[0]
            for path, name in slots.items()
            if name in uncovered and not _expandable(model, path)
        }
        for name in uncovered:
            paths = [path for path, canonical in slots.items() if canonical == name]
            # Where the module needs a local pass anyway, that has all of it.
            if len(paths) == 1 and _expandable(model, paths[0]) and paths[0].rpartition(".")[0] not in needy:
                expanded.append(name)
                continue
            for path in paths:
                homes[path] = _callable(model, path.rpartition(".")[0])
        mixed = replace(hooked, expanded=tuple(expanded), local=_grouped(homes, slots, set()))
        return None if _is_too_much(mixed, model, names) else mixed


def widened(hooked: Hooked, model: nn.Module, names: Sequence[str], error: GradientError) -> Hooked | None:
    """`hooked` with another way for the parameters that an error blames; None if there is none.

    The rows of a layer with a rule are sorted by example first (`Hooked.routed`), which costs little. Where that is of no use
    either, local passes follow.

    The same parameters of a module's siblings in a list (layers, blocks, experts) move along: what is wrong for one of them
    is hardly right for the others, and the batch at hand may not show it. So do all modules of a class that `vmap` cannot run.
    """
    if not isinstance(error, BlamedError):
        return None
    with LENDING:
        slots = _slots(model, names)
        homes = {path: local.module for local in hooked.local for path, _ in local.slots}
        loops = {local.module for local in hooked.local if local.one_by_one}
        blamed = {path for path, name in slots.items() if name in error.parameters}
        if error.under_vmap:
            loops |= _alike(model, {homes[path] for path in blamed if path in homes}, {*homes.values()})
            wider = replace(hooked, local=_grouped(homes, slots, loops))
            return None if not blamed or "" in loops or wider == hooked else wider
        blamed |= {other for path in blamed for other in _siblings(model, path) if other in slots}
        moved = {slots[path] for path in blamed}
        # A layer whose rows are not the examples in order may have been given rows of several in any order.
        sortable = moved - {slots[path] for path in homes} - {*hooked.expanded, *hooked.routed}
        routed = {*hooked.routed} - moved | sortable
        for name in moved - sortable:
            paths = [path for path, canonical in slots.items() if canonical == name]
            now = {path: homes.get(path) for path in paths}
            for path, home in _higher(model, now, first=name in hooked.expanded).items():
                if home is None:
                    return None
                homes[path] = home
        expanded = tuple(name for name in hooked.expanded if name not in moved)
        in_order = tuple(dict.fromkeys(name for name in slots.values() if name in routed))
        wider = replace(hooked, expanded=expanded, local=_grouped(homes, slots, loops), routed=in_order)
        return None if not blamed or _is_too_much(wider, model, names) else wider


def _higher(model: nn.Module, homes: dict[str, str | None], *, first: bool) -> dict[str, str | None]:
    """Path to the module whose local pass is to take it: one step up, None where there is nothing above.

    Uses of one tensor under several paths meet in the module that holds them all.

    Args:
        model: the model.
        homes: path to the module now, None where a layer rule or an expansion has it.
        first: whether the module that holds the parameter comes first: no rule was tried.
    """
    holding = {path: path.rpartition(".")[0] for path in homes}
    at = {path: holding[path] if home is None else home for path, home in homes.items()}
    common = _common(list(at.values()))
    if len(at) > 1 and any(home != common for home in at.values()):
        return {path: _callable(model, common) for path in at}
    if first and None in homes.values():
        return {path: _callable(model, holding[path]) for path in at}
    if "" in at.values():
        return dict.fromkeys(at)
    return {path: _callable(model, home.rpartition(".")[0]) for path, home in at.items()}


def _expandable(model: nn.Module, path: str) -> bool:
    parameter = model.get_parameter(path)
    return parameter.ndim > 1 and parameter.shape[0] == 1


def _slots(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Path of every use of an attributed parameter to its canonical name."""
    return {
        join(module_name, local): name
        for module_name, _, local_names in holders(model, names)
        for local, name in local_names.items()
    }


def _grouped(homes: dict[str, str], slots: dict[str, str], loops: set[str]) -> tuple[Local, ...]:
    grouped: dict[str, list[tuple[str, str]]] = {}
    for path in slots:
        if path in homes:
            grouped.setdefault(homes[path], []).append((path, slots[path]))
    return tuple(Local(home, tuple(paths), home in loops) for home, paths in grouped.items())


def _is_too_much(hooked: Hooked, model: nn.Module, names: Sequence[str]) -> bool:
    """Whether the local pass of the whole model would do most of the work."""
    sizes = {name: prod(parameter.shape) for name, parameter in named_parameters(model) if name in set(names)}
    whole = sum(sizes[name] for local in hooked.local if not local.module for name in local.parameters)
    return whole > _LARGEST_SHARE * sum(sizes.values())


def _callable(model: nn.Module, name: str) -> str:
    """The module of this name, or the nearest above it that is called as a module."""
    while name and not _is_called(model.get_submodule(name)):
        name = name.rpartition(".")[0]
    return name


def _is_called(module: nn.Module) -> bool:
    """Whether its forward runs when its parameters are used: not so for containers, and some private parts."""
    if isinstance(
        module, (nn.utils.parametrize.ParametrizationList, nn.modules.linear.NonDynamicallyQuantizableLinear)
    ):
        return False
    return "forward" in vars(module) or type(module).forward is not nn.Module.forward


def _siblings(model: nn.Module, path: str) -> Iterator[str]:
    """The path, and those that differ from it in the place in a list, dictionary or sequence of modules."""
    done = [""]
    parts = path.split(".")
    for place, part in enumerate(parts):
        found = []
        for prefix in done:
            module = _submodule(model, prefix)
            inner = place < len(parts) - 1
            keys = _like(module, part) if inner else [part]
            found += [join(prefix, key) for key in keys if not inner or _submodule(model, join(prefix, key))]
        done = found
    yield from done


def _like(parent: nn.Module | None, key: str) -> list[str]:
    """The keys of a list or dictionary of modules; of a sequence those with modules of the same class."""
    if isinstance(parent, nn.ModuleList | nn.ModuleDict):
        return list(parent._modules)
    if isinstance(parent, nn.Sequential):
        kind = type(parent._modules.get(key))
        return [other for other, module in parent._modules.items() if type(module) is kind]
    return [key]


def _alike(model: nn.Module, some: set[str], names: set[str]) -> set[str]:
    """Those of the modules whose class is that of one of `some`."""
    kinds = {type(model.get_submodule(name)) for name in some}
    return {name for name in names if type(model.get_submodule(name)) in kinds}


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _common(names: list[str]) -> str:
    """The longest common prefix in whole parts."""
    common: list[str] = []
    for parts in zip(*(name.split(".") for name in names)):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
