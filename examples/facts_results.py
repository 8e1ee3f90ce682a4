"""What `facts.py` found, as intervals, tables, figures, and the recorded run on its page."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from experiment_page import with_section

from trak.evaluation import bootstrap_mean

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "experiments-facts.json"
PAGE = ROOT / "docs" / "experiments" / "facts.md"
FIGURES = tuple(
    ROOT / "docs" / "assets" / f"experiments-facts-{name}.png" for name in ("retrieval", "counterfactual")
)
PAIRS = (
    ("TRAK", "BM25"),
    ("TRAK", "ground truth"),
    ("TRAK", "TracIn"),
    ("TRAK", "representation"),
    ("BM25", "ground truth"),
)
COLORS = {
    "TRAK": "#2a83c9",
    "TRAK, less damped": "#8fbfe6",
    "TracIn": "#d9691f",
    "GAS": "#e0a04a",
    "representation": "#8a6fb0",
    "BM25": "#c23b5e",
    "ground truth": "#3b8f5a",
    "random": "#999999",
}


@dataclass(frozen=True)
class Mean:
    """A mean with its 95% bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]".replace("-", "−")


def mean_of(values: Sequence[float]) -> Mean:
    """Of values [n]; the interval resamples them."""
    interval = bootstrap_mean(np.asarray(values, dtype=np.float64), num_bootstrap=2000, seed=0)
    return Mean(float(np.mean(values)), interval.low, interval.high)


@dataclass(frozen=True, kw_only=True)
class Forgetting:
    """One way to remove rows.

    Attributes:
        title: in words.
        k: rows removed for each target.
        given: by method, the share of facts that retrained models still give.
        lead: by method, the mean lead of the true object over the best rival, a difference of logits.
        differences: (a, b) -> share given without a's rows minus without b's, paired.
        lead_differences: the same of leads.
        counts: groups, targets and seeds.
    """

    title: str
    k: int
    given: dict[str, Mean]
    lead: dict[str, Mean]
    differences: dict[tuple[str, str], Mean]
    lead_differences: dict[tuple[str, str], Mean]
    counts: tuple[int, int, int]


def forgetting(title: str, k: int, found: dict[str, Any]) -> Forgetting:
    """Intervals resample groups, whose targets share their models; seeds are averaged."""
    leads = {name: np.array(one["leads"]) for name, one in found.items()}  # [G, R, size]
    groups, seeds, size = next(iter(leads.values())).shape
    shares = {name: (values > 0).mean((1, 2)) for name, values in leads.items()}
    means = {name: values.mean((1, 2)) for name, values in leads.items()}
    pairs = [(a, b) for a, b in PAIRS if a in leads and b in leads]
    return Forgetting(
        title=title,
        k=k,
        given={name: mean_of(share) for name, share in shares.items()},
        lead={name: mean_of(mean) for name, mean in means.items()},
        differences={(a, b): mean_of(shares[a] - shares[b]) for a, b in pairs},
        lead_differences={(a, b): mean_of(means[a] - means[b]) for a, b in pairs},
        counts=(groups, groups * size, seeds),
    )


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Everything that tables and figures show.

    Attributes:
        result: what `facts.py` wrote.
        together: removal of several targets' rows together, for each k.
        alone: of one target's rows, if it was done.
        kept_lead: mean lead of the targets without removal.
    """

    result: dict[str, Any]
    together: tuple[Forgetting, ...]
    alone: Forgetting | None
    kept_lead: Mean

    @property
    def removals(self) -> tuple[Forgetting, ...]:
        return self.together if self.alone is None else (*self.together, self.alone)


def summarise(result: dict[str, Any]) -> Summary:
    """From what `facts.py` wrote."""
    size, single_k = result["plan"]["group_size"], result["plan"]["single_k"]
    together = tuple(
        forgetting(f"{size} targets together, k = {k}", int(k), one) for k, one in result["together"].items()
    )
    alone = forgetting(f"alone, k = {single_k}", single_k, result["alone"]) if "alone" in result else None
    controls = np.array(result["controls"])  # [C, Q]
    targets = [target for group in result["groups"] for target in group]
    return Summary(
        result=result, together=together, alone=alone, kept_lead=mean_of(controls[:, targets].mean(0))
    )


# ---------------------------------------------------------------------------------------------------------------------- tables


def retrieval_rows(summary: Summary) -> list[list[str]]:
    rows = [["method", "MRR", "recall@10, any", "recall@10, all"]]
    for name, one in summary.result["retrieval"].items():
        numbers = [
            Mean(*(one[key][part] for part in ("mean", "low", "high")))
            for key in ("mrr", "recall any", "recall all")
        ]
        rows.append([name, *map(str, numbers)])
    return rows


def forgetting_rows(summary: Summary) -> list[list[str]]:
    rows = [["facts given without the rows of", *(removal.title for removal in summary.removals)]]
    for name in summary.removals[0].given:
        rows.append([name, *(str(removal.given[name]) for removal in summary.removals)])
    return rows


def lead_rows(summary: Summary) -> list[list[str]]:
    rows = [["mean lead without the rows of", *(removal.title for removal in summary.removals)]]
    for name in summary.removals[0].given:
        rows.append([name, *(str(removal.lead[name]) for removal in summary.removals)])
    return rows


def content_rows(summary: Summary) -> list[list[str]]:
    contents = summary.result["contents"]
    kinds = list(next(iter(next(iter(contents.values())).values())))
    rows = [["share of the first k rows", *(f"{kind}, k = {k}" for kind in kinds for k in contents)]]
    for name in next(iter(contents.values())):
        rows.append([name, *(f"{contents[k][name][kind]:.0%}" for kind in kinds for k in contents)])
    return rows


def difference_rows(summary: Summary) -> list[list[str]]:
    rows = [["paired difference", *(removal.title for removal in summary.removals)]]
    for a, b in summary.removals[0].differences:
        rows.append(
            [f"facts given, {a} − {b}", *(str(removal.differences[a, b]) for removal in summary.removals)]
        )
    for a, b in summary.removals[0].differences:
        rows.append(
            [f"lead, {a} − {b}", *(str(removal.lead_differences[a, b]) for removal in summary.removals)]
        )
    return rows


def markdown(rows: list[list[str]]) -> str:
    """A table with the first row for a header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def facts_of(summary: Summary) -> str:
    """Sizes in a paragraph."""
    result, recipe, plan, sizes = (
        summary.result,
        summary.result["recipe"],
        summary.result["plan"],
        summary.result["sizes"],
    )
    parts = [
        f"{sizes['rows']:,} masked sentences of at most {recipe['max_words']} words; {sizes['queries']} queries with {sizes['relevant rows']} "
        f"true sentences among them; on average {sizes['rivals']:.0f} rival objects. A model has {sizes['parameters']:,} parameters and "
        f"{sizes['words']:,} words, and is trained for {recipe['epochs']} epochs.",
        f"Without removal {plan['controls']} models give {result['given by the controls']:.0%} of the facts; {len(result['known'])} are given by all "
        f"{plan['models']} attributed models and all {plan['controls']} controls.",
    ]
    for what, removal in (("together", summary.together[0]), ("alone", summary.alone)):
        if removal is not None:
            groups, targets, seeds = removal.counts
            models = f"{seeds} model{'s' * (seeds > 1)}"
            parts.append(
                f"Removed {what}: the rows of {targets} targets in {groups} sets, {models} for each set, k and method."
            )
    parts.append(f"The mean lead of the targets without removal is {summary.kept_lead}.")
    if result["seconds for a model"] is not None:
        parts.append(f"Training a model takes {result['seconds for a model']:.1f} s of one core.")
    return " ".join(parts) + "\n"


def tables(summary: Summary) -> str:
    """All of them, in Markdown."""
    return "\n".join(
        [
            facts_of(summary),
            markdown(retrieval_rows(summary)),
            *(
                markdown(rows(summary))
                for rows in (forgetting_rows, lead_rows, difference_rows, content_rows)
            ),
        ]
    )


def write_tables(summary: Summary, out: Path) -> str:
    """tables.md and a CSV file for each table; returns the Markdown."""
    for name, rows in (
        ("retrieval", retrieval_rows(summary)),
        ("counterfactual", forgetting_rows(summary)),
        ("differences", difference_rows(summary)),
        ("leads", lead_rows(summary)),
        ("contents", content_rows(summary)),
    ):
        with open(out / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    text = tables(summary)
    (out / "tables.md").write_text(text, encoding="utf-8")
    return text


# --------------------------------------------------------------------------------------------------------------------- figures


def bars(
    axes: Any, names: list[str], means: list[Mean], shift: float = 0.0, height: float = 0.6, **look: Any
) -> None:
    """Horizontal bars with intervals."""
    errors = [[max(0.0, m.mean - m.low) for m in means], [max(0.0, m.high - m.mean) for m in means]]
    places = np.arange(len(names)) + shift
    axes.barh(
        places, [m.mean for m in means], xerr=errors, height=height, ecolor="#333333", capsize=3, **look
    )
    axes.set_yticks(np.arange(len(names)), names)
    axes.spines[["top", "right"]].set_visible(False)


def draw(summary: Summary, retrieval_file: Path, counterfactual_file: Path) -> None:
    """How high the true sentences rank, and what is still known without the top rows."""
    from matplotlib.figure import Figure

    retrieval = summary.result["retrieval"]
    names = list(retrieval)
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    labels = ("mean reciprocal rank", "recall@10: any true sentence", "recall@10: share of them")
    for axes, key, label in zip(panels, ("mrr", "recall any", "recall all"), labels):
        means = [Mean(*(retrieval[name][key][part] for part in ("mean", "low", "high"))) for name in names]
        bars(axes, names, means, color=[COLORS[name] for name in names])
        axes.set_xlim(0, 1)
        axes.set_title(label, fontsize=10)
    panels[0].invert_yaxis()
    figure.savefig(retrieval_file, dpi=120)

    removals = summary.removals
    figure = Figure(figsize=(max(6.0, 1.2 + 2.4 * len(removals)), 4.8), layout="constrained")
    rows = figure.subplots(2, len(removals), sharey=True, sharex="row", squeeze=False)
    for upper, lower, removal in zip(*rows, removals):
        colors = [COLORS[name] for name in removal.given]
        bars(upper, list(removal.given), list(removal.given.values()), color=colors)
        bars(lower, list(removal.lead), list(removal.lead.values()), color=colors)
        upper.set_xlim(0, 1)
        upper.set_title(f"{removal.title}\n{removal.counts[1]} targets", fontsize=10)
        upper.set_xlabel("share of facts still given")
        lower.set_xlabel("mean lead, logits")
        lower.axvline(0, color="#333333", linewidth=0.8)
    rows[0, 0].invert_yaxis()
    figure.savefig(counterfactual_file, dpi=120)


# ------------------------------------------------------------------------------------------------------------------------ page


def page(text: str, summary: Summary) -> str:
    """The page with the recorded tables between its comments."""
    return with_section(text, "facts", tables(summary))


def write_page() -> None:
    """Tables and figures of the recorded results."""
    if not RESULTS.is_file():
        raise SystemExit(f"There is no {RESULTS}: copy a result.json there first.")
    summary = summarise(json.loads(RESULTS.read_text()))
    FIGURES[0].parent.mkdir(parents=True, exist_ok=True)
    draw(summary, *FIGURES)
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), summary), encoding="utf-8")
