"""Recorded measurements on their pages: tables of docs/performance.md and docs/numerics.md, and the picture of growth.

    python benchmarks/performance_page.py

What stands between the comments `<!-- begin NAME -->` and `<!-- end NAME -->` of a page is written from benchmarks/results/*.json. A result
that is not there is said to be missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "assets" / "growth.png"
COLUMNS = ("factors", "Kronecker", "gradients", "Sparse", "functional", "Rademacher")
TARGETS = {"Kronecker": 0.9, "Sparse": 1.5, "Rademacher": 6.0}


def load(name: str) -> dict | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown; the first column is text, the others numbers."""
    lines = [
        "| " + " | ".join(head) + " |",
        "| --- " + "| ---: " * (len(head) - 1) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines)


def facts(record: dict) -> str:
    threads = record["threads"]
    clock = record.get("clock") or record.get("clock_in_memory")
    time = {"process_time": "processor time", "perf_counter": "wall-clock time"}.get(clock, "")
    return (
        f"{threads} thread{'s' if threads > 1 else ''} of {record['machine']}, torch {record['torch']}, trak {record['trak']}"
        + (f", {time}" if time else "")
        + (f", {record['date']}." if "date" in record else ".")
    )


def number(value: float, digits: int = 3) -> str:
    """Three significant digits, no exponent."""
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    text = f"{value:.{digits}g}"
    return f"{value:.1e}" if "e" in text else text


def featurize(record: dict) -> str:
    rows = []
    for name, case in record["results"].items():
        ratios = case["ratios"]
        cells = []
        for column in COLUMNS:
            if column not in ratios:
                cells.append("")
                continue
            missed = column in TARGETS and round(ratios[column], 2) > TARGETS[column]
            cells.append(f"{ratios[column]:.2f}{' ✗' if missed else ''}")
        plain = 1000 * case["plain_pass_seconds"] / case["batch_size"]
        rows.append([name, f"{case['parameters']:,}", f"{case['batch_size']}", f"{plain:.1f}", *cells])
    head = ["model", "parameters", "batch", "plain pass, ms an example", *COLUMNS]
    rounds = sorted({case["rounds"] for case in record["results"].values()})
    dates = sorted({case["date"] for case in record["results"].values()})
    return (
        f"{table(head, rows)}\n\nK = {record['dim']:,}; {facts(record)} Medians of {' or '.join(map(str, rounds))} interleaved rounds, "
        f"{dates[-1]}."
    )


def paths(record: dict) -> str:
    rows = []
    for name, path in record["paths"].items():
        passes = [one["plain_passes"] for one in path["checkpoints"]]
        seconds = [one["seconds"] for one in path["checkpoints"]]
        cells = [
            f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]" for found in path["lds"].values()
        ]
        rows.append([name, *cells, f"{sum(passes) / len(passes):.2f}", f"{sum(seconds) / len(seconds):.0f}"])
    counts = list(next(iter(record["paths"].values()))["lds"])
    head = [
        "path",
        *(f"LDS, {count} checkpoint{'s' if count != '1' else ''}" for count in counts),
        "plain passes a checkpoint",
        "seconds",
    ]
    dim = next(iter(record["paths"].values()))["dim"]
    setup = (
        f"{record['title']}, {record['parameters']:,} parameters, {record['targets']:,} targets, K = {dim:,}."
    )
    return f"{table(head, rows)}\n\n{setup} {facts(record)}"


def score(record: dict) -> str:
    rows = []
    for case in record.get("memory", []):
        rows.append(
            [
                f"{case['rows']:,} × {case['dim']:,} in {case['feature_dtype']}, {case['targets']:,} targets",
                f"{case['mm_gflops']:.0f}",
                f"{100 * case['rate_of_mm']:.0f}%",
                f"{100 * (case['extremes_over_blocks'] - 1):+.0f}%",
            ]
        )
    gram = record.get("gram")
    if gram:
        rows.append(
            [
                f"Gram matrix, {gram['rows']:,} × {gram['dim']:,}",
                f"{gram['mm_gflops']:.0f}",
                f"{100 * gram['rate_of_mm']:.0f}%",
                "",
            ]
        )
    head = ["in memory", "torch.mm, GFLOP/s", "rate of torch.mm", "ten strongest at both ends"]
    parts = [table(head, rows)] if rows else []
    disk = record.get("disk")
    if disk:
        seconds, read = sorted(disk["scoring_seconds"]), sorted(disk["plain_read_seconds"])
        parts.append(
            f"From disk, {disk['rows']:,} × {disk['dim']:,} in float16 ({disk['bytes'] / 1e9:.1f} GB), the ten strongest at both ends for "
            f"{disk['targets']:,} targets: {seconds[len(seconds) // 2]:.1f} s; a plain read of the same files takes "
            f"{read[len(read) // 2]:.1f} s ({disk['plain_read_mb_per_second']:.0f} MB/s), the product alone "
            f"{disk['product_alone_seconds']:.1f} s, and all of it {disk['scoring_cpu_seconds'][0]:.1f} s of processor time. That is "
            f"{100 * disk['rate_of_plain_read']:.0f}% of the plain read's rate. Peak memory {disk['peak_rss_mib']:,.0f} MiB, of which "
            f"{disk['rss_before_mib']:,.0f} MiB were Python's and PyTorch's before anything was read."
        )
    return "\n\n".join([*parts, facts(record)])


def growth(record: dict) -> str:
    parts = ["![Growth with examples, scores and parameters](assets/growth.png)"]
    if "featurize" in record:
        rows = [
            [
                f"{one['rows']:,}",
                f"{one['cpu_seconds']:.1f}",
                f"{1e6 * one['cpu_seconds'] / one['rows']:.0f}",
                f"{one['peak_rss_mib'] - one['rss_before_mib']:.0f}",
            ]
            for one in record["featurize"]
        ]
        parts.append(table(["examples", "processor seconds", "µs an example", "MiB above the start"], rows))
    if "score" in record:
        rows = [
            [
                f"{one['rows']:,}",
                f"{one['targets']:,}",
                f"{1000 * one['seconds']:.0f}",
                f"{1e9 * one['seconds'] / one['rows'] / one['targets']:.1f}",
            ]
            for one in record["score"]
        ]
        parts.append(table(["rows", "targets", "ms", "ns a score"], rows))
    if "parameters" in record:
        by_model: dict[tuple[str, int], dict[str, float]] = {}
        for one in record["parameters"]:
            by_model.setdefault((one["family"], one["parameters"]), {})[one["path"]] = one["ms_per_example"]
        names = ("plain", "Kronecker", "Sparse", "Rademacher")
        rows = [
            [family, f"{size:,}", *(number(found[name]) if name in found else "" for name in names)]
            for (family, size), found in by_model.items()
        ]
        parts.append(table(["model", "parameters", *(f"{name}, ms an example" for name in names)], rows))
    return "\n\n".join([*parts, facts(record)])


def batches(record: dict) -> str:
    functional, ragged, loading = record["functional"]["ratios"], record["ragged"], record["loading"]
    rows = [
        ["`Functional()`, of plain `vmap(grad)`", f"{functional['Functional()']:.2f}"],
        [
            "the same in chunks of 8 examples, whose gradients are copied together",
            f"{functional['Functional(chunk_size=8)']:.2f}",
        ],
        [
            f"`token_budget_rows`, of batches of 32 in the order given ({ragged['tokens_with_padding']['by tokens']:,} tokens with padding "
            f"instead of {ragged['tokens_with_padding']['by number']:,})",
            f"{ragged['ratio']:.2f}",
        ],
        [
            "`prefetched`, of loading and computing in turn, each taking about as long",
            f"{loading['ratio']:.2f}",
        ],
    ]
    return f"{table(['', 'time'], rows)}\n\n{facts(record)} Loading: wall-clock time."


def precision(record: dict) -> str:
    rows = [
        [
            name,
            number(one["feature_error_median"], 2),
            number(one["feature_error_largest"], 2),
            number(one["score_error"], 2),
            f"{one['lds']['mean']:.4f} [{one['lds']['low']:.4f}, {one['lds']['high']:.4f}]",
            f"{one['cpu_seconds']:.0f}",
        ]
        for name, one in record["settings"].items()
    ]
    head = ["setting", "features, median", "largest", "scores", "LDS", "processor seconds"]
    checkpoints = f"{record['checkpoints']} checkpoint{'s' if record['checkpoints'] > 1 else ''}"
    setup = f"{record['title']}, {checkpoints}, Rademacher({record['dim']:,})."
    return f"{table(head, rows)}\n\n{setup} {facts(record)}"


SECTIONS: dict[str, tuple[str, str, Callable[[dict], str]]] = {
    "featurize": ("performance", "featurize", featurize),
    "paths": ("performance", "paths", paths),
    "score": ("performance", "score", score),
    "growth": ("performance", "growth", growth),
    "batches": ("performance", "batches", batches),
    "precision": ("numerics", "precision", precision),
}
"""Name of a section to its page, its result and how the one becomes the other."""


def page(name: str, text: str) -> str:
    """The page with all of its sections."""
    for section, (where, result, write) in SECTIONS.items():
        if where != name:
            continue
        record = load(result)
        inside = f"Not recorded yet: benchmarks/results/{result}.json." if record is None else write(record)
        block = f"<!-- begin {section} -->\n\n{inside}\n\n<!-- end {section} -->"
        text, count = re.subn(
            rf"<!-- begin {section} -->.*?<!-- end {section} -->",
            lambda _, new=block: new,
            text,
            flags=re.DOTALL,
        )
        if count != 1:
            raise SystemExit(
                f"docs/{name}.md needs <!-- begin {section} --> and <!-- end {section} --> once each"
            )
    return text


def draw(record: dict, path: Path) -> None:
    """Three panels: examples, scores, parameters."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    found = record.get("featurize", [])
    rows = [one["rows"] for one in found]
    left.loglog(rows, [one["cpu_seconds"] for one in found], "o-", label="seconds")
    left.loglog(rows, [one["peak_rss_mib"] for one in found], "s--", color="0.5", label="peak MiB")
    left.set(xlabel="examples N", title="featurizing")
    left.legend()
    found = sorted(record.get("score", []), key=lambda one: one["rows"] * one["targets"])
    middle.loglog([one["rows"] * one["targets"] for one in found], [one["seconds"] for one in found], "o")
    middle.set(xlabel="scores N · T", ylabel="seconds", title="scoring, K = 512")
    colours = {"plain": "0.5", "Kronecker": "C0", "Sparse": "C1", "Rademacher": "C3"}
    styles = {"MLP": "s--", "transformer": "o-"}
    for family, style in styles.items():
        for name, colour in colours.items():
            points = sorted(
                (one["parameters"], one["ms_per_example"])
                for one in record.get("parameters", [])
                if one["family"] == family and one["path"] == name
            )
            if points:
                right.loglog(*zip(*points), style, color=colour, label=f"{name}, {family}", markersize=4)
    right.set(xlabel="parameters P", ylabel="ms an example", title="one example, K = 2,048")
    if record.get("parameters"):
        right.legend(fontsize=7)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    record = load("growth")
    if record is not None:
        draw(record, PICTURE)
    for name in sorted({where for where, *_ in SECTIONS.values()}):
        file = ROOT / "docs" / f"{name}.md"
        file.write_text(page(name, file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
