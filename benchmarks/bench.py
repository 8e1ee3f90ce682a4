"""This library beside its peers: seconds per example against a plain pass, and memory, measured in one run and in turns.

    python benchmarks/bench.py [--quick] [--cases resnet9 gpt2-128] [--threads 1] [--rounds 5] [--dim 2048]

Every peer runs in an environment of its own (benchmarks/.envs, made on first use from benchmarks/envs) on the same models and data. Writes
benchmarks/results/peers.json after every case, then the page docs/benchmarks.md and its picture.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from cases import CASES
from contenders import CONTENDERS, Contender
from environments import SHARED, ensure, python_of, versions
from measure import Settings, measure_case

import trak

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "peers.json"
QUICK_CASES = ("resnet9-small", "bert-128")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help=f"only {' and '.join(QUICK_CASES)}, three rounds, no page")
    add(
        "--cases",
        nargs="+",
        choices=list(CASES),
        default=None,
        help="all that the machine can do if left out",
    )
    add(
        "--contenders",
        nargs="+",
        choices=[c.key for c in CONTENDERS],
        default=None,
        help="beside the plain pass",
    )
    add("--rounds", type=int, default=None, help="at most, for each contender; 5, or 3 with --quick")
    add("--dim", type=int, default=2048, help="K")
    add("--threads", type=int, default=1, help="of every process, 1 if left out")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--keep", action="store_true", help="keep the recorded cases that are not measured again")
    add("--out", type=Path, default=None, help="the results' file; the page is only written for the default")
    return parser.parse_args()


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine(device: str) -> dict[str, Any]:
    return {
        "processor": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "system": platform.system(),
    }


def peer_versions(contenders: list[Contender], pythons: dict[str, Path | str]) -> dict[str, str]:
    """Of every package that takes part."""
    found = {"trak-attribution": trak.__version__, "torch": str(torch.__version__)}
    packages = {"traker", "dattri", "bergson", "logix-ai", "captum", "kronfluence", "transformers"}
    for env in {contender.env for contender in contenders} - {"main", SHARED}:
        if isinstance(pythons[env], Path):
            found |= {name: version for name, version in versions(env).items() if name in packages}
    return dict(sorted(found.items()))


def show(title: str, entries: dict[str, Any]) -> None:
    labels = {contender.key: contender.label for contender in CONTENDERS}
    print(f"\n{title}", flush=True)
    for key, entry in entries.items():
        if "error" in entry:
            print(f"  {labels[key]:30s} {entry['error']}", flush=True)
            continue
        print(
            f"  {labels[key]:30s} {entry['cpu_ratio']:7.2f} x (wall clock {entry['wall_ratio']:7.2f} x), "
            f"{entry['peak_bytes'] / 2**20:6.0f} MiB, {len(entry['cpu_ratios'])} rounds",
            flush=True,
        )


def main() -> None:
    options = parse()
    out = options.out or (RESULTS if not options.quick else RESULTS.with_name("peers-quick.json"))
    settings = Settings(
        dim=options.dim,
        rounds=options.rounds or (3 if options.quick else 5),
        threads=options.threads,
        device=options.device,
        budget=15.0 if options.quick else 30.0,
    )
    wanted = options.cases or (
        QUICK_CASES
        if options.quick
        else [n for n, c in CASES.items() if options.device == "cuda" or not c.gpu]
    )
    contenders = [
        c
        for c in CONTENDERS
        if options.contenders is None or c.key in options.contenders or c.group == "floor"
    ]
    problems = ensure(dict.fromkeys(contender.env for contender in contenders))
    pythons: dict[str, Path | str] = {env: problem or python_of(env) for env, problem in problems.items()}
    record: dict[str, Any] = {
        "machine": machine(options.device),
        "versions": peer_versions(contenders, pythons),
        "settings": {**vars(settings), "quick": options.quick},
        "cases": json.loads(out.read_text())["cases"] if options.keep and out.exists() else {},
    }
    for name in wanted:
        case, start = CASES[name], time.time()
        load = os.getloadavg()[0]
        entries = measure_case(case, [c for c in contenders if case.kind in c.kinds], pythons, settings)
        record["cases"][name] = {
            "title": case.title,
            "kind": case.kind,
            "tokens": case.tokens,
            "parameters": sum(p.numel() for p in case.model().parameters()),
            "date": date.today().isoformat(),
            "minutes": (time.time() - start) / 60,
            "load": [load, os.getloadavg()[0]],
            "contenders": entries,
        }
        record["cases"] = {key: record["cases"][key] for key in CASES if key in record["cases"]}
        out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        show(f"{case.title}, {case.name}", entries)
    print(f"\nwritten to {out}")
    if out.resolve() == RESULTS:
        from peers_page import write_page

        write_page()


if __name__ == "__main__":
    main()
