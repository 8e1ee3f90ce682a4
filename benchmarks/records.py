"""What the benchmarks that write a record have in common: the clock, the conditions of a run, and the file."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch

import trak

RESULTS = Path(__file__).parent / "results"


def clock_for(threads: int) -> Callable[[], float]:
    """Seconds of the processor where one thread works, so that other load does not count; of the wall elsewhere."""
    return time.process_time if threads == 1 else time.perf_counter


def conditions(threads: int) -> dict[str, Any]:
    """When, with what and on what a run was measured."""
    return {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "trak": trak.__version__,
        "machine": processor(),
        "threads": threads,
    }


def processor() -> str:
    """What kind it is, and whether it has AMX, on which products in few bits depend."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    name = capabilities.get("cpu_name") or platform.processor() or platform.machine()
    return f"{name} with AMX" if capabilities.get("amx_tile") else name


def read_record(path: Path) -> dict[str, Any]:
    """The record that is there, for a run that measures a part of it again; empty where there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Replace the record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")


def record_cases(
    path: Path,
    names: Iterable[str],
    order: Iterable[str],
    run: Callable[[str, dict], dict],
    threads: int,
    **facts: Any,
) -> None:
    """Run cases, each put beside those that the file has from before and written at once, with its own date.

    Args:
        path: the record.
        names: of the cases to run.
        order: of all cases in the file.
        run: what gives a case's results, from its name and what the file has of it.
        threads: of torch.
        **facts: of all cases.
    """
    record, shared = read_record(path), conditions(threads) | facts
    today = shared.pop("date")
    results = record.get("results", {})
    for name in names:
        results[name] = run(name, results.get(name, {})) | {"date": today}
        record |= {**shared, "results": {name: results[name] for name in order if name in results}}
        write_record(path, record)
    print(f"\nwritten to {path}")
