"""The figure: LDS against compute, one line for each method through its budgets."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from trak.errors import InputError
from trak.files import write_whole
from trak.frontier.values import Frontier, FrontierPoint
from trak.report.dependencies import require

COLOURS = {
    "TRAK": "#1f77b4",
    "gradients": "#d9691f",
    "representations": "#1a9a78",
    "influence": "#8a5bb5",
    "retraining": "#333333",
    "data": "#8c8c8c",
}
"""Of each family; others are drawn in the last one's."""
MARKERS = "osD^vPX*"
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2)))
STYLE: dict[str, Any] = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "text.parse_math": True,
}
UNITS = ("seconds", "passes")


def draw_frontier(
    frontier: Frontier, path: str | Path, *, unit: str = "seconds", title: str = "", dpi: int = 160
) -> Path:
    """Write the figure as a PNG: LDS with its intervals, and compute (training included) on a logarithmic axis.

    Args:
        frontier: points; those that failed are named below the axes.
        path: of the file.
        unit: "seconds" by the frontier's clock, or "passes": in plain training passes over the whole training set.
        title: above the axes.
        dpi: dots per inch.

    Returns:
        The path.

    Raises:
        InputError: another unit, passes where their length is not known, or no point that did not fail.
        MissingDependencyError: matplotlib is not installed.
    """
    if unit not in UNITS:
        raise InputError(f"unit must be one of {', '.join(UNITS)}; got {unit!r}")
    per_unit = 1.0 if unit == "seconds" else frontier.seconds_per_pass
    if per_unit is None:
        raise InputError(
            "how long a plain pass takes is not known: give passes_per_model, with a training time above 0"
        )
    lines = _lines(frontier)
    if not lines:
        raise InputError("nothing to draw: every point failed; the table says why")
    require("matplotlib")
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        matplotlib.rcdefaults()
        parameters: dict[Any, Any] = STYLE
        matplotlib.rcParams.update(parameters)
        figure = Figure(figsize=(9.6, 5.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        _draw(axes, frontier, lines, per_unit)
        clock = "processor seconds" if frontier.clock == "processor" else "seconds"
        axes.set_xlabel(
            f"compute, training included ({clock if unit == 'seconds' else 'plain training passes'})"
            + _failures(frontier)
        )
        axes.set_title(title, loc="left")
        figure.savefig(buffer, format="png", dpi=dpi)
    path = Path(path)
    write_whole(path, buffer.getvalue())
    return path


def _lines(frontier: Frontier) -> list[list[FrontierPoint]]:
    """The points of each method that did not fail, by rising compute."""
    done = [point for point in frontier.points if point.lds is not None]
    groups = [list(group) for _, group in groupby(done, key=lambda point: point.method)]
    return [sorted(group, key=lambda point: point.seconds.by(frontier.clock)) for group in groups]


def _draw(
    axes: Any, frontier: Frontier, lines: Sequence[Sequence[FrontierPoint]], seconds_per_unit: float
) -> None:
    places: dict[str, int] = {}

    def compute(points: Sequence[FrontierPoint]) -> list[float]:
        # What takes no measurable time still needs a place on a logarithmic axis.
        return [max(point.seconds.by(frontier.clock), 1e-3) / seconds_per_unit for point in points]

    best = frontier.best()
    axes.step(
        compute(best),
        [point.lds for point in best],
        where="post",
        color="#d0d0d0",
        linewidth=5,
        solid_capstyle="round",
        zorder=1,
        label="best for its compute",
    )
    for line in lines:
        family = line[0].family
        place = places[family] = places.get(family, -1) + 1
        values = [point.lds or 0.0 for point in line]
        errors = [
            [value - (point.low or 0.0) for value, point in zip(values, line)],
            [(point.high or 0.0) - value for value, point in zip(values, line)],
        ]
        axes.errorbar(
            compute(line),
            values,
            yerr=errors,
            color=COLOURS.get(family, COLOURS["data"]),
            marker=MARKERS[place % len(MARKERS)],
            markersize=5,
            markerfacecolor="white" if place % 2 else None,
            linestyle=DASHES[place % len(DASHES)],
            linewidth=1.4,
            elinewidth=0.8,
            capsize=2,
            label=f"{line[0].label}{_budgets(line)}{_star(frontier, line)}",
            zorder=3,
        )
    axes.axhline(0, color="#a0a0a0", linewidth=0.8, zorder=0)
    axes.set_xscale("log")
    _plain_ticks(axes)
    axes.set_ylabel(f"linear datamodeling score ({_judges(frontier.bank)})")
    axes.grid(color="#ebebeb", linewidth=0.8)
    handles, labels = axes.get_legend_handles_labels()
    first = labels.index("best for its compute")
    order = [place for place in range(len(labels)) if place != first] + [first]
    axes.legend(
        [handles[place] for place in order],
        [labels[place] for place in order],
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        fontsize=7.5,
        labelspacing=0.6,
        handlelength=3.2,
    )


def _plain_ticks(axes: Any) -> None:
    """1, 2, 5, 10 in place of powers; the powers of ten only where there are many."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim()
    steps = (1.0, 2.0, 5.0) if high < 1e3 * low else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=steps, numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:,.10g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _budgets(line: Sequence[FrontierPoint]) -> str:
    """(1, 3, 10): the budgets along a line."""
    if not line[0].budget:
        return ""
    noun = {"checkpoints": "M", "runs": "runs", "bank": "models"}[line[0].reads]
    return f" ({noun} = {', '.join(str(budget) for budget in sorted(point.budget for point in line))})"


def _judges(bank: Mapping[str, Any]) -> str:
    return f"{bank['num_subsets']} subsets, {bank['num_targets']} targets"


def _star(frontier: Frontier, line: Sequence[FrontierPoint]) -> str:
    """A mark for methods that fewer subsets or targets judge, said in the label itself."""
    if not any(frontier.is_judged_by_less(point) for point in line):
        return ""
    return f"\n  by {line[0].num_subsets} subsets, {line[0].num_targets} targets"


def _failures(frontier: Frontier) -> str:
    failed = sorted({point.label for point in frontier.points if point.lds is None})
    if not failed:
        return ""
    rows = [", ".join(failed[start : start + 4]) for start in range(0, len(failed), 4)]
    return "\nfailed at some budget, see the table: " + ",\n".join(rows)
