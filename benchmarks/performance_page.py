"""Recorded measurements on their pages: tables of docs/performance.md and docs/numerics.md, and the picture of growth.

    python benchmarks/performance_page.py

What stands between the comments `<!-- begin NAME -->` and `<!-- end NAME -->` of a page is written from benchmarks/results/*.json. A result
that is not there is said to be missing.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "assets" / "growth.png"
COLUMNS = ("factors", "Kronecker", "Eigenbasis", "gradients", "Sparse", "functional", "Rademacher")
TARGETS = {"Kronecker": 0.9, "Sparse": 1.5, "Rademacher": 6.0, "functional": 1.2}
"""Most plain passes; for the functional path, most of plain `vmap(grad)`."""


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
    columns = (
        ["float32", *(name for name in COLUMNS if name != "functional")]
        if record.get("autocast")
        else COLUMNS
    )
    for name, case in record["results"].items():
        ratios = case["ratios"]
        cells = []
        for column in columns:
            if column not in ratios:
                cells.append("")
                continue
            missed = (
                column in TARGETS and column != "functional" and round(ratios[column], 2) > TARGETS[column]
            )
            cells.append(f"{ratios[column]:.2f}{' ✗' if missed else ''}")
        plain = 1000 * case["plain_pass_seconds"] / case["batch_size"]
        rows.append([name, f"{case['parameters']:,}", f"{case['batch_size']}", f"{plain:.1f}", *cells])
    head = ["model", "parameters", "batch", "plain pass, ms an example", *columns]
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
        own = disk.get("multiplying_thread_seconds", [])
        of_thread = f", {own[0]:.1f} s of them in the thread that multiplies" if own else ""
        parts.append(
            f"From disk, {disk['rows']:,} × {disk['dim']:,} in float16 ({disk['bytes'] / 1e9:.1f} GB), the ten strongest at both ends for "
            f"{disk['targets']:,} targets: {seconds[len(seconds) // 2]:.1f} s; a plain read of the same files takes "
            f"{read[len(read) // 2]:.1f} s ({disk['plain_read_mb_per_second']:.0f} MB/s), the product alone "
            f"{disk['product_alone_seconds']:.1f} s, and all of it {disk['scoring_cpu_seconds'][0]:.1f} s of processor time{of_thread}. That is "
            f"{100 * disk['rate_of_plain_read']:.0f}% of the plain read's rate. Peak memory {disk['peak_rss_mib']:,.0f} MiB, of which "
            f"{disk['rss_before_mib']:,.0f} MiB were Python's and PyTorch's before anything was read."
            + "".join(
                f" With {one['threads']} threads: {statistics.median(one['scoring_seconds']):.1f} s, "
                f"{100 * one['rate_of_plain_read']:.0f}%."
                for one in disk.get("more_threads", [])
            )
        )
    return "\n\n".join([*parts, facts(record)])


def growth(record: dict) -> str:
    parts = ["![Growth with examples, scores and parameters](assets/growth.png)"]
    rows = [
        [
            name,
            f"{one['rows']:,}",
            f"{one['cpu_seconds']:.1f}",
            f"{1e6 * one['cpu_seconds'] / one['rows']:.0f}",
            f"{one['peak_rss_mib'] - one['rss_before_mib']:.0f}",
        ]
        for part, name in (
            ("featurize", "`TRAKer`, Sparse(512)"),
            ("attribute", "`TRAK`, by default, with fitting and solving"),
        )
        for one in record.get(part, [])
    ]
    if rows:
        parts.append(
            table(["", "examples", "processor seconds", "µs an example", "MiB above the start"], rows)
        )
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
        names = ("plain", "Kronecker", "Eigenbasis", "Sparse", "Rademacher")
        rows = [
            [family, f"{size:,}", *(number(found[name]) if name in found else "" for name in names)]
            for (family, size), found in by_model.items()
        ]
        parts.append(table(["model", "parameters", *(f"{name}, ms an example" for name in names)], rows))
    return "\n\n".join([*parts, facts(record)])


def batches(record: dict) -> str:
    ragged, loading = record["ragged"], record["loading"]
    measured = []
    for one in record["functional"]:
        ratios, chunk = one["ratios"], one["floor"].removeprefix("vmap(grad), ")
        chunked = next(name for name in ratios if name.startswith("Functional(chunk_size="))
        measured.append(
            [
                f"{one['title']}",
                f"{one['batch_size']}",
                f"{1000 * one['seconds']:.0f}",
                chunk,
                f"{ratios['Functional()']:.2f}{' ✗' if round(ratios['Functional()'], 2) > TARGETS['functional'] else ''}",
                f"{ratios[chunked]:.2f}",
            ]
        )
    head = [
        "model",
        "batch",
        "fastest plain `vmap(grad)`, ms",
        "its chunk",
        "`Functional()`",
        "in four chunks",
    ]
    rows = [
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
    return (
        f"{table(head, measured)}\n\n{table(['', 'time'], rows)}\n\n{facts(record)} Loading: wall-clock time."
    )


def compiling(record: dict) -> str:
    rows = []
    for name, case in record["results"].items():
        seconds, ratios = case["seconds"], case["ratios"]
        for pair in [name for name in seconds if f"{name}, compiled" in seconds]:
            fast = f"{pair}, compiled"
            # What trak has for the same numbers may be faster than the function that was compiled.
            best = min(seconds[pair], seconds["factors"]) if pair.startswith("factors") else seconds[pair]
            saved = (best - seconds[fast]) / case["batch_size"]
            takes = case["compiled"][fast]["compile_seconds"]
            rows.append(
                [
                    f"{name}: {pair}",
                    f"{ratios[pair]:.2f}",
                    f"{ratios[fast]:.2f}",
                    f"{takes:.0f}",
                    f"{takes / saved:,.0f}" if saved > 0 else "never",
                ]
            )
        rows.append([f"{name}: factors, as they are computed here", f"{ratios['factors']:.2f}", "", "", ""])
    head = ["", "as it is", "compiled", "seconds of compiling", "pays after examples"]
    rounds = sorted({case["rounds"] for case in record["results"].values()})
    setup = f"In plain passes that are not compiled. Medians of {' or '.join(map(str, rounds))} interleaved rounds."
    return f"{table(head, rows)}\n\n{setup} {facts(record)}"


def fitting(record: dict) -> str:
    rows = []
    for name, case in record["results"].items():
        ratios, kept = case["ratios"], case["bytes"]
        passes = (ratios["moments"], ratios["squares"], ratios["moments"] + ratios["squares"])
        rows.append(
            [
                name,
                f"{case['parameters']:,}",
                number(1000 * case["plain_pass_seconds"] / case["batch_size"]),
                *(f"{passed:.2f}" for passed in passes),
                f"{sum(case['fixed_seconds'].values()):.1f}",
                *(f"{ratios[kind]:.2f}" for kind in ("Eigenbasis", "Sparse")),
                *(f"{kept[what] / 2**20:.1f}" for what in ("model", "moments", "kept")),
            ]
        )
    head = [
        "model",
        "parameters",
        "plain pass, ms an example",
        "first pass",
        "second pass",
        "both",
        "fixed part, s",
    ]
    head += ["then: Eigenbasis", "Sparse", "model, MiB", "moments, MiB", "kept, MiB"]
    batches = sorted({case["batches"] for case in record["results"].values()})
    dates = sorted({case["date"] for case in record["results"].values()})
    setup = (
        f"K = {record['dim']:,}. Medians of {' or '.join(map(str, batches))} batches, {' and '.join(dates)}."
    )
    return f"{table(head, rows)}\n\n{setup} {facts(record)}"


def signed(value: float) -> str:
    """Five places, with a sign."""
    return f"{value:+.5f}".replace("-", "−")


def precision(record: dict) -> str:
    rows, slow = [], None
    count = str(record["checkpoints"])
    for name, one in record["settings"].items():
        cells = [number(one[key], 2) for key in ("feature_error_median", "feature_error_largest")]
        if "lds" in one:
            cells.append(number(one["score_error"], 2))
            for lds in one["lds"].values():
                interval = f"[{signed(lds['difference_low'])}, {signed(lds['difference_high'])}]"
                cells.append(f"{lds['mean']:.4f}")
                cells.append(f"{signed(lds['difference'])} {interval}" if lds["difference_high"] else "")
            cells.append(f"{one['cpu_seconds']:.0f}")
        else:
            slow = one["rows"]
            cells += [""] * (2 + 2 * len(exact_lds(record)))
        rows.append([name, *cells])
    head = ["setting", "features, median", "largest", "scores"]
    for number_of in exact_lds(record):
        head += [f"LDS, {number_of} checkpoint{'s' if number_of != '1' else ''}", "difference to float64"]
    intervals = " and ".join(f"[{one['low']:.3f}, {one['high']:.3f}]" for one in exact_lds(record).values())
    kind, _, dim = record["projection"].partition(":")
    setup = f"{record['title']}, {kind}({int(dim):,}), {count} checkpoints: each alone (errors of features and scores, and mean LDS), and all."
    setup += f" Intervals of the LDS: {intervals}; of differences on the same resamples."
    if slow:
        setup += f" Computing in half precision: {slow:,} of the training images."
    return f"{table([*head, 'processor seconds a checkpoint'], rows)}\n\n{setup} {facts(record)}"


def exact_lds(record: dict) -> dict:
    """Those of float64, by number of checkpoints."""
    return next(iter(record["settings"].values()))["lds"]


SECTIONS: dict[str, tuple[str, str, Callable[[dict], str]]] = {
    "featurize": ("performance", "featurize", featurize),
    "featurize-epyc": ("performance", "featurize-epyc", featurize),
    "featurize-bfloat16": ("performance", "featurize-bfloat16", featurize),
    "paths": ("performance", "paths", paths),
    "score": ("performance", "score", score),
    "growth": ("performance", "growth", growth),
    "batches": ("performance", "batches", batches),
    "compile": ("performance", "compile", compiling),
    "fitting": ("performance", "fitting", fitting),
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

    figure = Figure(figsize=(13.5, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for part, name, colour in (
        ("featurize", "Sparse(512)", "C1"),
        ("attribute", "default, with fitting", "C2"),
    ):
        found = record.get(part, [])
        rows = [one["rows"] for one in found]
        left.loglog(rows, [one["cpu_seconds"] for one in found], "o-", color=colour, label=f"{name}, seconds")
        left.loglog(
            rows, [one["peak_rss_mib"] for one in found], "s--", color=colour, label=f"{name}, peak MiB"
        )
    left.set(xlabel="examples N", title="featurizing")
    left.legend(fontsize=7)
    found = sorted(record.get("score", []), key=lambda one: one["rows"] * one["targets"])
    middle.loglog([one["rows"] * one["targets"] for one in found], [one["seconds"] for one in found], "o")
    middle.set(xlabel="scores N · T", ylabel="seconds", title="scoring, K = 512")
    colours = {"plain": "0.5", "Kronecker": "C0", "Eigenbasis": "C2", "Sparse": "C1", "Rademacher": "C3"}
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
        right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    # What was measured, and no ticks between powers of ten, whose labels would overlap.
    _label(left.xaxis, sorted({one["rows"] for one in record.get("featurize", [])}))
    _label(middle.xaxis, sorted({one["rows"] * one["targets"] for one in found}))
    _label(middle.yaxis, [0.003, 0.01, 0.03, 0.1, 0.3])
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _label(axis, values: list[float]) -> None:
    axis.set_ticks(values, [f"{value:,}" if value >= 1 else f"{value:g}" for value in values], fontsize=8)
    axis.set_ticks([], minor=True)


def main() -> None:
    record = load("growth")
    if record is not None:
        draw(record, PICTURE)
    for name in sorted({where for where, *_ in SECTIONS.values()}):
        file = ROOT / "docs" / f"{name}.md"
        file.write_text(page(name, file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
