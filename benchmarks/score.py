"""Solving and scoring against their floors: a plain matrix product, and a plain read of the disk.

    python benchmarks/score.py                                       # all, about ten minutes and 8 GB of disk
    python benchmarks/score.py --rows 20000 --dim 512 --memory-rows 8192 --rounds 2    # small

In memory, interleaved, medians of ratios: features of --memory-rows rows in a store, against `torch.mm` over the same numbers in one
tensor. `blocks`: all scores, block by block. `extremes`: the ten strongest rows at both ends of every target, and the scores themselves thrown
away. `gram`: the Gram matrix.

From disk, in a process of its own whose peak memory is recorded: the ten strongest rows for --targets targets out of --rows rows in float16,
against reading the same files from the front to the end; the page cache is emptied of them before each. Once with --threads, and once with
each of --more-threads. Shards are written to --folder and removed in the end.

`stages`: processor time of each thing that has to be done to one shard, alone and with one thread, in nanoseconds for each number.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from records import RESULTS, clock_for, conditions, read_record, write_record
from torch import Tensor

from trak.precondition import accumulate_moments, fit_preconditioner, resolve_damping
from trak.scores import KernelScores, Member
from trak.store import Header, RowSet, open_store

BLOCK_ROWS = 1024
TOP = 10


def make_rows(folder: str | None, num_rows: int, dim: int, dtype: str) -> RowSet:
    """A store's rows: random features, drawn once and scaled anew for every shard."""
    header = Header(
        num_rows=num_rows,
        dim=dim,
        columns=[("all", 0, dim)],
        parameters={"w": (dim,)},
        projection={"kind": "none"},
        task={"name": "none"},
        feature_dtype=dtype,
    )
    store = open_store(folder, header, shard_rows=BLOCK_ROWS)
    store.add_checkpoint(0, "0" * 64)
    rows = store.rows(0)
    generator = torch.Generator().manual_seed(0)
    drawn_RK = torch.randn(BLOCK_ROWS, dim, generator=generator)
    with rows.writer() as writer:
        for start in range(0, num_rows, BLOCK_ROWS):
            count = min(BLOCK_ROWS, num_rows - start)
            scale_R1 = torch.rand(count, 1, generator=generator) + 0.5
            values_R = torch.rand(count, generator=generator)
            writer.add(torch.arange(start, start + count), drawn_RK[:count] * scale_R1, values_R, values_R)
    return rows


def make_scores(rows: RowSet, dim: int, num_targets: int) -> KernelScores:
    generator = torch.Generator().manual_seed(1)
    solved_TK = torch.randn(num_targets, dim, generator=generator)
    weights_N = torch.rand(rows.num_rows, generator=generator)
    return KernelScores((Member(rows, solved_TK),), weights_N, torch.device("cpu"), False)


def interleaved(functions: dict, rounds: int, clock) -> dict[str, list[float]]:
    """Seconds of each function in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            start = clock()
            function()
            seconds[name].append(clock() - start)
    return seconds


def ratios(seconds: dict[str, list[float]], name: str, floor: str) -> float:
    """The median over rounds of one function's time divided by another's."""
    return statistics.median(one / other for one, other in zip(seconds[name], seconds[floor]))


def in_memory(num_rows: int, dim: int, num_targets: int, dtype: str, rounds: int, clock) -> dict:
    """Scoring, both ends of the ranking, against `torch.mm`."""
    rows = make_rows(None, num_rows, dim, dtype)
    scores = make_scores(rows, dim, num_targets)
    features_NK = rows.read(0, num_rows).features
    product_NT = torch.empty(num_rows, num_targets)
    solved_KT = scores.members[0].solved_TK.T

    def consume() -> None:
        for _ in scores.blocks():
            pass

    seconds = interleaved(
        {
            "torch.mm": lambda: torch.mm(features_NK, solved_KT, out=product_NT),
            "blocks": consume,
            "extremes": lambda: scores.extremes(TOP),
            "top": lambda: scores.top(TOP),
        },
        rounds,
        clock,
    )
    flops = 2 * num_rows * dim * num_targets
    return {
        "rows": num_rows,
        "dim": dim,
        "targets": num_targets,
        "feature_dtype": dtype,
        "mm_gflops": flops / statistics.median(seconds["torch.mm"]) / 1e9,
        "rate_of_mm": 1 / ratios(seconds, "blocks", "torch.mm"),
        "extremes_over_blocks": ratios(seconds, "extremes", "blocks"),
        "top_over_blocks": ratios(seconds, "top", "blocks"),
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
    }


def gram(num_rows: int, dim: int, rounds: int, clock) -> dict:
    """The Gram matrix and its factorisation."""
    rows = make_rows(None, num_rows, dim, "float32")
    features_NK = rows.read(0, num_rows).features
    gram_KK = torch.empty(dim, dim)

    def moments():
        return accumulate_moments(((block.features, block.outputs) for block in rows.blocks()), [(0, dim)])

    seconds = interleaved(
        {
            "torch.mm": lambda: torch.mm(features_NK.T, features_NK, out=gram_KK),
            "moments": moments,
        },
        rounds,
        clock,
    )
    found = moments()
    start = clock()
    fitted = fit_preconditioner(found, resolve_damping("auto"))
    solving = clock() - start
    start = clock()
    fitted.solve(features_NK[:100])
    return {
        "rows": num_rows,
        "dim": dim,
        "mm_gflops": 2 * num_rows * dim * dim / statistics.median(seconds["torch.mm"]) / 1e9,
        "rate_of_mm": 1 / ratios(seconds, "moments", "torch.mm"),
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "factorise_seconds": solving,
        "solve_100_targets_seconds": clock() - start,
    }


def files_of(folder: str) -> list[Path]:
    return sorted(path for path in Path(folder).rglob("rows-*.safetensors"))


def forget(folder: str) -> None:
    """Drop the files' pages from the page cache."""
    for path in files_of(folder):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def plain_read(folder: str) -> tuple[float, int]:
    """Seconds to read all shards from front to end, and their bytes."""
    buffer, total = bytearray(1 << 23), 0
    start = time.perf_counter()
    for path in files_of(folder):
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return time.perf_counter() - start, total


def peak_kib() -> int:
    """This process's peak resident memory; `ru_maxrss` would count its parent's, from before the new program was started."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _score_from_disk(folder: str, num_rows: int, dim: int, num_targets: int, threads: int, answer) -> None:
    """In a process of its own: its peak memory is the library's, Python's and PyTorch's."""
    torch.set_num_threads(threads)
    before = peak_kib()
    from trak.store import load_store

    scores = make_scores(load_store(folder).rows(0), dim, num_targets)
    start, cpu, own = time.perf_counter(), time.process_time(), time.thread_time()
    ranking: Tensor = scores.extremes(TOP).top.rows
    wall, cpu, own = time.perf_counter() - start, time.process_time() - cpu, time.thread_time() - own
    answer.put((wall, cpu, before, peak_kib(), ranking[:2].tolist(), own))


def in_own_process(*arguments) -> tuple:
    """What `_score_from_disk` answers: seconds, processor seconds, peak memory before and after, two rows, processor seconds of the thread
    that multiplies."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    child = context.Process(target=_score_from_disk, args=(*arguments, answers))
    child.start()
    answer = answers.get()
    child.join()
    return answer


def stages(folder: str, dim: int, num_targets: int) -> dict[str, float]:
    """Nanoseconds for each number of one shard, which is in the page cache."""
    from trak.store import load_store
    from trak.store.files import checksum

    path = files_of(folder)[0]
    rows, buffer = load_store(folder).rows(0), bytearray(1 << 23)
    count = min(BLOCK_ROWS, rows.num_rows)
    (part,) = rows.read_stored(0, count)
    product_RT, solved_TK = torch.empty(count, num_targets), torch.randn(num_targets, dim)
    chunk = max(1, (1 << 22) // (4 * dim))
    decoded_rK, whole_RK = torch.empty(min(chunk, count), dim), torch.empty(count, dim)

    def copy() -> None:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    def decode() -> None:
        for start in range(0, count, chunk):
            stop = min(start + chunk, count)
            part.convert(start, stop, decoded_rK[: stop - start])

    seconds = interleaved(
        {
            "copy_from_page_cache": copy,
            "checksum": lambda: checksum(part.features),
            "decode": decode,
            "product": lambda: torch.mm(whole_RK, solved_TK.T, out=product_RT),
            "map_and_checksum": lambda: rows.read_stored(0, count),
        },
        15,
        time.process_time,
    )
    return {name: statistics.median(values) / (count * dim) * 1e9 for name, values in seconds.items()}


def from_disk(
    num_rows: int, dim: int, num_targets: int, threads: list[int], rounds: int, parent: str
) -> dict:
    """Shards that are not in memory, against a plain read."""
    folder = tempfile.mkdtemp(prefix="trak-score-", dir=parent)
    try:
        start = time.perf_counter()
        make_rows(folder, num_rows, dim, "float16")
        writing = time.perf_counter() - start
        reads, answers = [], {number: [] for number in threads}
        for _ in range(rounds):
            forget(folder)
            seconds, size = plain_read(folder)
            reads.append(seconds)
            for number in threads:
                forget(folder)
                answers[number].append(in_own_process(folder, num_rows, dim, num_targets, number))
        alone = stages(folder, dim, num_targets)
        # What the same product costs where nothing has to be read.
        features_RK, solved_TK = torch.randn(BLOCK_ROWS, dim), torch.randn(num_targets, dim)
        product = interleaved({"mm": lambda: torch.mm(features_RK, solved_TK.T)}, 9, time.process_time)["mm"]
        read = statistics.median(reads)

        def summary(number: int) -> dict:
            scored = answers[number]
            return {
                "scoring_seconds": [one[0] for one in scored],
                "scoring_cpu_seconds": [one[1] for one in scored],
                "multiplying_thread_seconds": [one[5] for one in scored],
                "rate_of_plain_read": read / statistics.median(one[0] for one in scored),
                "peak_rss_mib": max(one[3] for one in scored) / 1024,
                "rss_before_mib": max(one[2] for one in scored) / 1024,
            }

        return {
            "rows": num_rows,
            "dim": dim,
            "targets": num_targets,
            "feature_dtype": "float16",
            "bytes": size,
            "writing_seconds": writing,
            "plain_read_seconds": reads,
            "plain_read_mb_per_second": size / read / 1e6,
            "product_alone_seconds": statistics.median(product) * num_rows / BLOCK_ROWS,
            "stages_ns_per_number": alone,
            **summary(threads[0]),
            "more_threads": [{"threads": number, **summary(number)} for number in threads[1:]],
        }
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows on disk; 0 leaves the disk out")
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--targets", type=int, default=100)
    parser.add_argument("--memory-rows", type=int, default=32_768, help="rows in memory; 0 leaves memory out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--disk-rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--more-threads", type=int, nargs="*", default=[2], help="further counts of threads, from disk"
    )
    parser.add_argument(
        "--folder", default=None, help="where shards are written; the system's temporary folder"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "score.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = clock_for(options.threads)
    record = read_record(options.out) | conditions(options.threads)
    record |= {"clock_in_memory": clock.__name__, "rounds": options.rounds}
    size, rounds = options.memory_rows, options.rounds
    if size:
        record["memory"] = [
            in_memory(size, options.dim, targets, dtype, rounds, clock)
            for targets, dtype in (
                (options.targets, "float32"),
                (10 * options.targets, "float32"),
                (options.targets, "float16"),
            )
        ]
        record["gram"] = gram(max(1, size // 4), options.dim, max(1, rounds // 2), clock)
    if options.rows:
        record["disk"] = from_disk(
            options.rows,
            options.dim,
            options.targets,
            list(dict.fromkeys([options.threads, *options.more_threads])),
            options.disk_rounds,
            options.folder,
        )
    write_record(options.out, record)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
