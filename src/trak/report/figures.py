"""The figures of a report, as SVG text.

Colours are CSS variables with fall-backs that read on white and on black, so that one figure serves the light page, the
dark page, and a file of its own. Text stays text: it can be selected, and takes the fonts of the page. The figures
are drawn through matplotlib's objects; pyplot's state and the caller's rcParams are left alone.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from trak.report.data import LdsScatter, MethodLds, MislabelCurve
from trak.report.dependencies import require
from trak.report.numbers import fixed, number

INK, SOFT, GRID, BACK = "#0a0a01", "#0a0a02", "#0a0a03", "#0a0a04"
POSITIVE, NEGATIVE = "#0a0a05", "#0a0a06"
SERIES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05", "#0a0b06")

VARIABLES = {
    INK: ("--ink", "#767676"),
    SOFT: ("--ink-soft", "#808080"),
    GRID: ("--rule", "#80808055"),
    BACK: ("--paper", "none"),
    POSITIVE: ("--positive", "#2a83c9"),
    NEGATIVE: ("--negative", "#d9691f"),
    SERIES[0]: ("--series-1", "#2a83c9"),
    SERIES[1]: ("--series-2", "#d9691f"),
    SERIES[2]: ("--series-3", "#1a9a78"),
    SERIES[3]: ("--series-4", "#b86a9c"),
    SERIES[4]: ("--series-5", "#a88410"),
    SERIES[5]: ("--series-6", "#767676"),
}
"""Placeholder colour, as matplotlib is told it, to (CSS variable, fall-back). The hues follow Okabe and Ito's palette."""

FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), "-.", (0, (8, 2, 2, 2)), (0, (1, 1)))
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10.0,
    "axes.unicode_minus": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
}


def lds_bars(methods: Sequence[MethodLds]) -> str:
    """Mean LDS of each method as a bar with its interval."""

    def draw(axes: Any) -> None:
        places = range(len(methods))
        axes.barh(places, [entry.mean for entry in methods], height=0.55, color=SERIES[0], alpha=0.85)
        for place, entry in zip(places, methods):
            if entry.low is not None and entry.high is not None:
                axes.plot(
                    [entry.low, entry.high], [place, place], color=INK, linewidth=1.6, solid_capstyle="butt"
                )
                axes.plot(
                    [entry.low, entry.high], [place, place], "|", color=INK, markersize=8, markeredgewidth=1.6
                )
            end = max(0.0, entry.mean, entry.high if entry.high is not None else 0.0)
            axes.annotate(
                fixed(entry.mean), (end, place), xytext=(6, 0), textcoords="offset points", va="center"
            )
        axes.set_yticks(places, [_shorten(entry.method) for entry in methods])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.axvline(0, color=SOFT, linewidth=0.8)
        axes.set_xlabel("LDS (mean rank correlation; 1 is perfect)")
        axes.grid(axis="x")
        axes.margins(x=0.16)
        axes.spines["left"].set_visible(False)

    words = "; ".join(f"{entry.method} {_interval(entry)}" for entry in methods)
    return _svg(draw, (5.4, 0.75 + 0.42 * max(2, len(methods))), "Linear datamodeling score by method", words)


def lds_scatter(scatter: LdsScatter) -> str:
    """Predicted against actual model output, one point per subset."""

    def draw(axes: Any) -> None:
        axes.scatter(scatter.predicted, scatter.actual, s=16, color=SERIES[0], alpha=0.6, linewidths=0)
        axes.set_xlabel("predicted from scores")
        axes.set_ylabel("actual output f")
        axes.locator_params(nbins=4)
        axes.grid()

    rho = "" if scatter.correlation is None else f", rank correlation {fixed(scatter.correlation, 2)}"
    words = f"{len(scatter.predicted)} subsets{rho}"
    return _svg(draw, (2.9, 2.5), f"Predicted and actual outputs, {scatter.label}", words)


def mislabel_curve(curves: Sequence[MislabelCurve]) -> str:
    """Fraction of wrong labels found against fraction of rows inspected, beside random inspection."""

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1.4, linestyle=(0, (1, 2)), label="random")
        for place, curve in enumerate(curves):
            axes.plot(
                curve.inspected,
                curve.found,
                color=SERIES[place % len(SERIES)],
                linestyle=DASHES[place % len(DASHES)],
                linewidth=2.2,
                label=_shorten(curve.method),
            )
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("fraction of the training set inspected")
        axes.set_ylabel("fraction of wrong labels found")
        axes.grid()
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[1:] + handles[:1], labels[1:] + labels[:1], loc="lower right", handlelength=2.6)

    words = "; ".join(f"{curve.method}: {_found(curve)}" for curve in curves)
    return _svg(draw, (5.4, 3.5), "Wrong labels found by inspection", words)


def score_histogram(edges: Sequence[float], counts: Sequence[int]) -> str:
    """How many scores fall in each bin, on a logarithmic count axis; negative and positive in their colours."""

    def draw(axes: Any) -> None:
        middles = [(low + high) / 2 for low, high in pairwise(edges)]
        widths = [high - low for low, high in pairwise(edges)]
        tolerance = 1e-9 * (edges[-1] - edges[0])
        colors = [POSITIVE if x > tolerance else NEGATIVE if x < -tolerance else SOFT for x in middles]
        axes.bar(middles, counts, width=widths, color=colors, linewidth=0)
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(0, max(2.0, 2.0 * max(counts)))
        ticks = [0] + [
            10**power
            for power in range(0, 16, 1 + len(str(max(counts))) // 6)
            if 10**power <= 2 * max(counts)
        ]
        axes.set_yticks(ticks, [f"{tick:,}".replace(",", "\N{NARROW NO-BREAK SPACE}") for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("score: \N{MINUS SIGN} lowers f, + raises f")
        axes.set_ylabel("number of scores")
        axes.grid(axis="y")

    words = f"{sum(counts)} scores from {number(edges[0])} to {number(edges[-1])}"
    return _svg(draw, (7.0, 2.6), "Distribution of scores", words)


def _found(curve: MislabelCurve, inspected: float = 0.1) -> str:
    area = "" if curve.auc is None else f", ROC AUC {fixed(curve.auc)}"
    return f"{curve.found_at(inspected):.0%} found after inspecting {inspected:.0%}{area}"


def _interval(entry: MethodLds) -> str:
    around = (
        "" if entry.low is None or entry.high is None else f" ({fixed(entry.low)} to {fixed(entry.high)})"
    )
    return fixed(entry.mean) + around


def _shorten(name: str, longest: int = 26) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"


def _svg(draw: Callable[[Any], None], inches: tuple[float, float], title: str, description: str) -> str:
    """Draw on a fresh figure under a style of our own, and give clean SVG."""
    require("matplotlib")
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        # The reader's browser has the glyphs that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        matplotlib.rcdefaults()
        parameters: dict[Any, Any] = {**STYLE, "svg.hashsalt": title}
        matplotlib.rcParams.update(parameters)
        figure = Figure(figsize=inches, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        no_metadata: dict[str, Any] = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    return _clean(buffer.getvalue(), title, description)


def _clean(svg: str, title: str, description: str) -> str:
    """Only the <svg> element: named for screen readers, ids made unique, colours and fonts left to the page."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    # matplotlib's one style rule is for "*": inlined, it would hold for the whole page.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg, flags=re.DOTALL)
    prefix = "f" + format(hash_text(title + description + svg), "08x")
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    for placeholder, (variable, fallback) in VARIABLES.items():
        svg = svg.replace(placeholder, f"var({variable}, {fallback})")
    svg = re.sub(r"'DejaVu Sans'[^;\"]*sans-serif", FONTS, svg)
    head_end = svg.index(">")
    head = re.sub(r'\s(width|height)="[^"]*pt"', "", svg[:head_end])
    width = re.search(r'viewBox="0 0 ([0-9.]+)', head)
    # A point of the drawing is a third more in CSS pixels: the natural size, beyond which the page does not stretch it.
    widest = f"; max-width: {round(float(width.group(1)) * 4 / 3)}px" if width else ""
    style = f' style="stroke-linejoin: round{widest}"'
    name = f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
    label = escape(f"{title}: {description}", quote=True)
    return f'{head} role="img" aria-label="{label}"{style}>{name}{svg[head_end + 1 :]}'


def hash_text(text: str) -> int:
    """A 32-bit checksum: the same in every process, unlike `hash`."""
    import zlib

    return zlib.crc32(text.encode())
