"""Which of the K columns each parameter writes to.

A layer is a module: the name of a parameter up to its last dot. Where layers have columns of their own, K is
shared out equally, a layer never gets more columns than it has numbers (what it does not need goes to the
others), and a layer that fits its share is kept exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from trak.errors import ProjectionError
from trak.projection.base import Columns, Shapes

ROOT = "(root)"
"""The layer of parameters whose name has no dot."""


@dataclass(frozen=True)
class Placement:
    """Where one parameter goes: columns [start, stop), copied one to one if `exact`, else projected."""

    start: int
    stop: int
    exact: bool

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.stop - self.start


def layer_of(name: str) -> str:
    """The module a parameter belongs to: its name up to the last dot."""
    return name.rpartition(".")[0] or ROOT


def group_by_layer(shapes: Shapes) -> dict[str, list[str]]:
    """Layer to names of its parameters, both in order of first appearance."""
    groups: dict[str, list[str]] = {}
    for name in shapes:
        groups.setdefault(layer_of(name), []).append(name)
    return groups


def check_shapes(shapes: Shapes) -> None:
    """Raise ProjectionError unless there is a parameter, and every parameter has a number in it."""
    if not shapes:
        raise ProjectionError(
            "no parameters to project: got an empty mapping of shapes; select at least one parameter"
        )
    for name, shape in shapes.items():
        if any(size < 1 for size in shape):
            raise ProjectionError(
                f"parameter {name!r} has shape {tuple(shape)}, which holds no numbers; "
                "leave it out of the selection"
            )


def share_columns(total: int, capacities: Sequence[int], floors: Sequence[int] | None = None) -> list[int]:
    """Equal shares of `total` between floors and caps (water-filling): columns per item, in the order given.

    All items get the same level, but not less than their floor (1 if not given) nor more than their capacity;
    the level is the highest integer that `total` allows, and what is left goes one by one to the first with
    room.

    Returns:
        Shares that sum to min(total, sum of capacities).

    Raises:
        ProjectionError: fewer columns than the floors together.
    """
    floors = [1] * len(capacities) if floors is None else floors
    if total < sum(floors):
        raise ProjectionError(
            f"dim={total} columns cannot be split over {sum(floors)} layers or parameters, each needs one at "
            f"least; raise dim to {sum(floors)} or more, attribute fewer parameters, or choose a "
            "projection that sums all layers into the same columns (per_layer=False)"
        )
    if total >= sum(capacities):
        return list(capacities)

    def at(level: int) -> list[int]:
        return [min(max(level, floor), capacity) for floor, capacity in zip(floors, capacities)]

    # The sum grows with the level: it fits at `low` and does not at `high`.
    low, high = 0, max(capacities)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sum(at(middle)) <= total else (low, middle)
    shares = at(low)
    left = total - sum(shares)
    for item, (share, higher) in enumerate(zip(shares, at(low + 1))):
        if left and higher > share:
            shares[item] += 1
            left -= 1
    return shares


def pool(shapes: Shapes, dim: int, *, per_layer: bool) -> tuple[dict[str, Placement], tuple[Columns, ...]]:
    """Columns shared by all parameters (`per_layer=False`) or by the parameters of each layer.

    Returns:
        The placement of each parameter, and the columns: one entry "all", or one for each layer.
    """
    check_shapes(shapes)
    if not per_layer:
        return {name: Placement(0, dim, exact=False) for name in shapes}, (Columns("all", 0, dim),)
    groups = group_by_layer(shapes)
    sizes = {layer: sum(prod(shapes[name]) for name in names) for layer, names in groups.items()}
    placements: dict[str, Placement] = {}
    columns: list[Columns] = []
    start = 0
    for (layer, names), width in zip(groups.items(), share_columns(dim, list(sizes.values()))):
        columns.append(Columns(layer, start, start + width))
        if width == sizes[layer]:
            placements |= _place_exactly(shapes, names, start)
        else:
            placements |= {name: Placement(start, start + width, exact=False) for name in names}
        start += width
    return {name: placements[name] for name in shapes}, tuple(columns)


def separate(shapes: Shapes, dim: int | None) -> tuple[dict[str, Placement], tuple[Columns, ...]]:
    """Columns for each parameter alone, those of one layer side by side; `dim=None` keeps every number.

    K is shared out over layers, then each layer's share over its parameters, by the same rule.
    """
    check_shapes(shapes)
    groups = group_by_layer(shapes)
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    capacities = [sum(sizes[name] for name in names) for names in groups.values()]
    total = sum(capacities) if dim is None else dim
    layer_widths = share_columns(total, capacities, [len(names) for names in groups.values()])
    placements: dict[str, Placement] = {}
    columns: list[Columns] = []
    start = 0
    for (layer, names), layer_width in zip(groups.items(), layer_widths):
        columns.append(Columns(layer, start, start + layer_width))
        for name, width in zip(names, share_columns(layer_width, [sizes[name] for name in names])):
            placements[name] = Placement(start, start + width, exact=width == sizes[name])
            start += width
    return {name: placements[name] for name in shapes}, tuple(columns)


def _place_exactly(shapes: Shapes, names: Sequence[str], start: int) -> dict[str, Placement]:
    placements = {}
    for name in names:
        stop = start + prod(shapes[name])
        placements[name] = Placement(start, stop, exact=True)
        start = stop
    return placements
