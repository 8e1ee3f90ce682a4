"""Which modules are hooked as they are, which are computed in steps, and which parameters no rule covers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from trak.gradients.layers import LayerRule, SteppedRule
from trak.gradients.watch import Layer, Stepped
from trak.gradients.wrappers import named_parameters


@dataclass(frozen=True, eq=False)
class Plan:
    """Of a model and the parameters to attribute.

    Attributes:
        layers: modules to hook.
        stepped: modules to compute in steps, with the parts to hook.
        uncovered: canonical names of parameters that some module holds and no rule covers, with that module.
    """

    layers: Sequence[Layer]
    stepped: Sequence[Stepped]
    uncovered: Mapping[str, nn.Module]


@dataclass(frozen=True, eq=False)
class _Held:
    """A module with attributed parameters (local to canonical name), and its rule if there is one."""

    name: str
    module: nn.Module
    names: dict[str, str]
    rule: LayerRule | None


def make_plan(
    model: nn.Module,
    names: Sequence[str],
    rules: Sequence[LayerRule],
    *,
    elsewhere: Collection[str] = (),
    expanded: Collection[str] = (),
    routed: Collection[str] = (),
) -> Plan:
    """One walk through the model.

    Args:
        model: with the modules as users call them.
        names: canonical names of the attributed parameters.
        rules: a module is given to the first that covers any of its attributed parameters.
        elsewhere: paths of parameters that have another way than rules.
        expanded: canonical names of such.
        routed: canonical names of parameters whose layers are given rows of several examples in any order.
    """
    held = [
        _Held(name, module, own, _rule_for(rules, module, own))
        for name, module, own in _left(model, names, elsewhere, expanded)
    ]
    inner = _inner_modules(model, rules)
    stepped = _to_step(held, inner, {path.rpartition(".")[0] for path in elsewhere})
    layers: list[Layer] = []
    uncovered: dict[str, nn.Module] = {}
    for each in held:
        covered = each.rule.covers(each.module) if each.rule else frozenset()
        needed = each.module if isinstance(each.rule, SteppedRule) else inner.get(each.module, _NO_ONE).module
        if needed is not None and needed not in stepped:
            covered = frozenset()
        uncovered |= {name: each.module for local, name in each.names.items() if local not in covered}
        if each.rule is not None and not isinstance(each.rule, SteppedRule):
            is_routed = not set(routed).isdisjoint(each.names.values())
            layers.append(Layer(each.name, each.module, each.rule, each.names, is_routed))
    own = {each.module: each for each in held}
    parts = [_in_steps(module, rule, own.get(module), routed) for module, rule in stepped.items()]
    return Plan(layers, parts, uncovered)


def holders(model: nn.Module, names: Sequence[str]) -> Iterator[tuple[str, nn.Module, dict[str, str]]]:
    """Modules that hold attributed parameters themselves: (name, module, local to canonical name)."""
    wanted = set(names)
    canonical = {id(parameter): name for name, parameter in named_parameters(model) if name in wanted}
    for module_name, module in model.named_modules():
        local_names = {
            local: canonical[id(parameter)]
            for local, parameter in module._parameters.items()
            if parameter is not None and id(parameter) in canonical
        }
        if local_names:
            yield module_name, module, local_names


def join(module_name: str, local: str) -> str:
    """A parameter's path from the names of its module and in its module."""
    return f"{module_name}.{local}" if module_name else local


def _left(
    model: nn.Module, names: Sequence[str], elsewhere: Collection[str], expanded: Collection[str]
) -> Iterator[tuple[str, nn.Module, dict[str, str]]]:
    """As `holders`, without what is dealt with in another way than by rules."""
    for module_name, module, local_names in holders(model, names):
        left = {
            local: name
            for local, name in local_names.items()
            if name not in expanded and join(module_name, local) not in elsewhere
        }
        if left:
            yield module_name, module, left


def _rule_for(
    rules: Sequence[LayerRule], module: nn.Module, local_names: Mapping[str, str]
) -> LayerRule | None:
    return next((rule for rule in rules if rule.covers(module) & local_names.keys()), None)


@dataclass(frozen=True, eq=False)
class _Outer:
    """The module that uses another one's parameters itself, and calls it only where it is computed in steps."""

    module: nn.Module | None
    rule: SteppedRule | None
    names: frozenset[str] = frozenset()  # of the module, and of all that are within


_NO_ONE = _Outer(None, None)


def _inner_modules(model: nn.Module, rules: Sequence[LayerRule]) -> dict[nn.Module, _Outer]:
    found: dict[nn.Module, _Outer] = {}
    stepping = [
        rule for rule in rules if isinstance(rule, SteppedRule) and type(rule).inner is not SteppedRule.inner
    ]
    for name, module in model.named_modules():
        for rule in stepping:
            children = rule.inner(module)
            outer = _Outer(module, rule, frozenset([name, *(join(name, child) for child in children)]))
            found |= {module.get_submodule(child): outer for child in children}
    return found


def _to_step(
    held: Sequence[_Held], inner: Mapping[nn.Module, _Outer], touched: Collection[str]
) -> dict[nn.Module, SteppedRule]:
    """Modules that are computed in steps for parameters of their own or of modules within.

    Those with modules within only if no parameter of any of these has another way, which would want them called as they are.
    """
    kept = {outer.module for outer in inner.values() if not outer.names.isdisjoint(touched)}
    found: dict[nn.Module, SteppedRule] = {}
    for each in held:
        if isinstance(each.rule, SteppedRule):
            found[each.module] = each.rule
        outer = inner.get(each.module, _NO_ONE)
        if outer.module is not None and outer.rule is not None and outer.rule.covers(outer.module):
            found[outer.module] = outer.rule
    return {module: rule for module, rule in found.items() if module not in kept}


def _in_steps(module: nn.Module, rule: SteppedRule, held: _Held | None, routed: Collection[str]) -> Stepped:
    """The module with the parts that have attributed parameters; none of its own if only a module within has."""
    parts, layers = rule.parts(module), []
    name, names = (held.name, held.names) if held else ("", {})
    for part in parts:
        own = {local: names[local] for local in part.parameter_names & names.keys()}
        if own:
            layers.append(Layer(name, part, rule, own, not set(routed).isdisjoint(own.values())))
    return Stepped(module, rule.forward(module, parts), layers)
