"""Recorded results on their pages: what stands between two comments is written by the experiment, not by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ASSETS = ROOT / "docs" / "assets"
PAGES = ROOT / "docs" / "experiments"


def with_section(text: str, name: str, section: str) -> str:
    """The page's text with `section` between `<!-- begin NAME -->` and `<!-- end NAME -->`."""
    inside = f"<!-- begin {name} -->\n\n{section.strip()}\n\n<!-- end {name} -->"
    text, count = re.subn(
        rf"<!-- begin {name} -->.*?<!-- end {name} -->", lambda _: inside, text, flags=re.DOTALL
    )
    if count != 1:
        raise SystemExit(
            f"the page needs the comments <!-- begin {name} --> and <!-- end {name} --> once each"
        )
    return text


def record(page: str, name: str, result: dict[str, Any], section: str) -> None:
    """Keep a result as benchmarks/results/experiments-NAME.json, and its section in docs/experiments/PAGE.md."""
    (RESULTS / f"experiments-{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    file = PAGES / f"{page}.md"
    file.write_text(with_section(file.read_text(encoding="utf-8"), name, section), encoding="utf-8")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    """A correlation with three digits and a true minus sign."""
    return f"{value:.3f}".replace("0.", ".", 1).replace("-", "−")


def interval(ends: Sequence[float], *, signed: bool = False) -> str:
    """[low, high], with a plus sign where it is a gain."""
    return "[" + ", ".join(("+" if signed and end >= 0 else "") + number(end) for end in ends) + "]"


def lds_table(methods: Sequence[Mapping[str, Any]], what: str, first: str) -> str:
    """Rows of `alternatives.compared` for several numbers of checkpoints, M.

    Args:
        methods: the rows, with "checkpoints", perhaps "seconds", and what was scored under `what`.
        what: head of the first column.
        first: what gains are over.
    """
    rows = [
        [
            row[what],
            str(row["checkpoints"]),
            number(row["lds"]),
            interval((row["low"], row["high"])),
            interval(row["gain"], signed=True) if "gain" in row else "",
            f"{row['seconds']:.0f}" if "seconds" in row else "",
        ]
        for row in methods
    ]
    return table([what, "M", "LDS", "95% interval", f"gain over {first}", "s"], rows)
