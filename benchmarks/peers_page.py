"""The recorded peer benchmarks on their page: docs/benchmarks.md and docs/assets/benchmarks-peers.png.

    python benchmarks/peers_page.py

The tables stand between the comments `<!-- begin peers -->` and `<!-- end peers -->`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from contenders import CONTENDERS, PLAIN, Contender  # noqa: E402

RESULTS = HERE / "results" / "peers.json"
PAGE = HERE.parent / "docs" / "benchmarks.md"
PICTURE = HERE.parent / "docs" / "assets" / "benchmarks-peers.png"
BY_KEY = {contender.key: contender for contender in CONTENDERS}
COLOURS = {"floor": "0.45", "ours": "tab:blue", "all": "tab:red", "layers": "tab:orange", "other": "0.7"}
OURS = {
    "all": ("ours-kronecker", "ours-eigenbasis", "ours-sparse", "ours-rademacher"),
    "layers": ("ours-layers",),
}
"""Ours that do the same work, by group of peers."""
NAMES = {
    "ours": "ours",
    "all": "peers: all parameters, projected",
    "layers": "peers: linear layers, projected",
    "other": "other work",
}


def clock_of(record: dict[str, Any]) -> str:
    """Seconds of the processor where one thread works, of the wall elsewhere."""
    settings = record["settings"]
    return "cpu" if settings["device"] == "cpu" and settings["threads"] == 1 else "wall"


def heading(case: dict[str, Any]) -> str:
    tokens = f", {case['tokens']} tokens" if case["tokens"] else ""
    return f"{case['title']}{tokens}: {case['parameters']:,} parameters"


def number(value: float) -> str:
    """Three significant digits, no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def row(contender: Contender, entry: dict[str, Any], case: dict[str, Any], clock: str) -> str:
    if "error" in entry:
        message = entry["error"].replace("|", "\\|")
        return f"| {contender.label} | {contender.does} | – | – | – | – | {message} |"
    per_second = (case["tokens"] or 1) / entry[f"{clock}_seconds_per_example"]
    facts = entry["facts"]
    seen = facts["parameters"] / case["parameters"]
    share = "all" if seen >= 1 else f"{100 * seen:.3g}%" if seen >= 0.01 else "< 1%"
    kept = f"{facts['kept']:,}" if "kept" in facts else "–"
    note = f"{len(entry['cpu_ratios'])} × {entry['rows']}"
    if "fit_seconds" in facts:
        note += f"; factors: {number(sum(facts['fit_seconds'].values()))} s"
    ratio = number(entry[f"{clock}_ratio"])
    megabytes = entry["peak_bytes"] / 2**20
    return f"| {contender.label} | {contender.does} | {ratio} | {number(per_second)} | {megabytes:,.0f} | {share}, {kept} | {note} |"


def beaten(case: dict[str, Any], clock: str) -> list[str]:
    """Where a peer that projects gradients of about the same parameters does better than ours, a phrase for each."""
    done = {key: entry for key, entry in case["contenders"].items() if "error" not in entry}
    phrases = []
    for measure, unit, what in ((f"{clock}_ratio", 1.0, "faster"), ("peak_bytes", 2**20, "less memory")):
        for key, entry in done.items():
            own = OURS.get(BY_KEY[key].group, ())
            lost = [
                f"{BY_KEY[other].label}: {number(done[other][measure] / unit)}"
                for other in own
                if other in done
                and entry[measure] < done[other][measure]
                and entry["facts"]["parameters"] >= 0.9 * done[other]["facts"]["parameters"]
            ]
            if lost:
                phrases.append(
                    f"**{what}**: {BY_KEY[key].label}, {number(entry[measure] / unit)} ({', '.join(lost)})"
                )
    return phrases


def case_section(case: dict[str, Any], clock: str) -> str:
    lines = [
        f"### {heading(case)}",
        "",
        "| | what the time pays for | time / plain pass | "
        f"{'tokens' if case['tokens'] else 'examples'} per second | memory, MiB | parameters, numbers kept | rounds × examples |",
        "|---|---|---:|---:|---:|---|---|",
    ]
    lines += [row(BY_KEY[key], entry, case, clock) for key, entry in case["contenders"].items()]
    better = beaten(case, clock)
    if better:
        lines += ["", f"Peers that do the same work better than some of ours: {'; '.join(better)}."]
    else:
        lines += ["", "No peer that does the same work is faster or takes less memory than ours."]
    loads = " to ".join(f"{load:.1f}" for load in case["load"])
    lines += ["", f"Measured {case['date']} in {case['minutes']:.0f} minutes; load average {loads}."]
    return "\n".join(lines)


def section(record: dict[str, Any]) -> str:
    """Picture, facts, and a table for every case."""
    settings, machine, clock = record["settings"], record["machine"], clock_of(record)
    count = settings["threads"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    seconds = "processor seconds" if clock == "cpu" else "seconds of the wall clock"
    facts = (
        f"{machine['processor']}, {count} thread{'s' if count > 1 else ''} of {machine['cores']} cores, Python {machine['python']}; "
        f"K = {settings['dim']}, float32, {seconds}. {versions}."
    )
    picture = "![Time of this library and its peers, in units of a plain pass](assets/benchmarks-peers.png)"
    cases = "\n\n".join(case_section(case, clock) for case in record["cases"].values())
    return f"{picture}\n\n{facts}\n\n{cases}"


def page(text: str, record: dict[str, Any]) -> str:
    """The page with the recorded results."""
    inside = f"<!-- begin peers -->\n\n{section(record)}\n\n<!-- end peers -->"
    text, count = re.subn(
        r"<!-- begin peers -->.*?<!-- end peers -->", lambda _: inside, text, flags=re.DOTALL
    )
    if count != 1:
        raise SystemExit(f"{PAGE} needs the comments <!-- begin peers --> and <!-- end peers --> once each")
    return text


def colour(contender: Contender, entry: dict[str, Any], case: dict[str, Any]) -> str:
    """By what it does; who sees less than half of the parameters does other work."""
    few = contender.group == "layers" and entry["facts"]["parameters"] < case["parameters"] / 2
    return COLOURS["other" if few else contender.group]


def draw(record: dict[str, Any], path: Path) -> None:
    """A panel for each case: time over a plain pass, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    clock, cases = clock_of(record), list(record["cases"].values())
    columns = min(2, len(cases))
    rows = -(-len(cases) // columns)
    figure = Figure(figsize=(6.2 * columns, 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels[len(cases) :]:
        panel.axis("off")
    for panel, case in zip(panels, cases):
        done = [(BY_KEY[key], entry) for key, entry in case["contenders"].items() if "error" not in entry]
        done = [(contender, entry) for contender, entry in done if contender.key != PLAIN][::-1]
        values = [entry[f"{clock}_ratio"] for _, entry in done]
        places = range(len(done))
        panel.barh(
            places, values, color=[colour(contender, entry, case) for contender, entry in done], height=0.7
        )
        for place, value in zip(places, values):
            panel.annotate(
                number(value), (value, place), (3, 0), textcoords="offset points", va="center", fontsize=7
            )
        panel.set_yticks(places, [contender.label for contender, _ in done], fontsize=7)
        panel.set_xscale("log")
        panel.set_xlim(min(0.3, min(values) / 1.5), max(values) * 2.2)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_title(heading(case), fontsize=8)
        panel.tick_params(axis="x", labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    handles = [matplotlib.patches.Patch(color=COLOURS[group], label=name) for group, name in NAMES.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=8, frameon=False)
    figure.supxlabel("time per example / one forward and backward pass", fontsize=8)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def write_page() -> None:
    record = json.loads(RESULTS.read_text(encoding="utf-8"))
    draw(record, PICTURE)
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), record), encoding="utf-8")


if __name__ == "__main__":
    write_page()
