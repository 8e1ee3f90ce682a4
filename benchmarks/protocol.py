"""The side of a peer benchmark that runs in a peer's own environment. Needs torch alone.

A runner is a script that calls `serve` with its contenders. The parent starts one process for a contender and a case, sends lines of JSON
to its standard input, and reads one line for each from its standard output:

    {"do": "prepare", "contender": ..., "case": ..., "dim": ..., "threads": ..., "device": ..., "rows": ..., "batch_size": ...}
        -> {"ready": true, "setup_seconds": ..., "facts": {...}}
    {"do": "round"} -> {"seconds": ..., "cpu_seconds": ..., "peak_bytes": ...}
    {"do": "stop"}  -> the process ends

Any of them may be answered with {"error": ...}. Whatever the peer prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cases import CASES, Case
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Job:
    """What a contender is to do.

    Attributes:
        case: model and data.
        model: on the device, in eval mode.
        inputs, labels: the examples of one round, on the device.
        batch_size: examples of a batch.
        dim: K.
        device: "cpu" or "cuda".
        folder: a temporary folder.
    """

    case: Case
    model: nn.Module
    inputs: Tensor
    labels: Tensor
    batch_size: int
    dim: int
    device: str
    folder: Path

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The round's batches."""
        yield from zip(self.inputs.split(self.batch_size), self.labels.split(self.batch_size))

    def loader(self) -> torch.utils.data.DataLoader:
        """The same for peers that want a data loader, not shuffled."""
        data = torch.utils.data.TensorDataset(self.inputs, self.labels)
        return torch.utils.data.DataLoader(data, batch_size=self.batch_size, shuffle=False)


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a contender returns.

    Attributes:
        round: processes the examples of a round once.
        facts: numbers for the results, such as how many are kept of an example ("kept") and how many parameters are attributed
            ("parameters").
    """

    round: Callable[[], Any]
    facts: Mapping[str, Any]


Contender = Callable[[Job], Prepared]


def serve(contenders: Mapping[str, Contender]) -> None:
    """Answer the parent until it says stop."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    prepared, start_bytes, device = None, 0, "cpu"
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "stop":
            break
        try:
            if request["do"] == "prepare":
                device = request["device"]
                job = make_job(request)
                start_bytes = start_memory(device)
                begin = time.perf_counter()
                prepared = contenders[request["contender"]](job)
                answer(ready=True, setup_seconds=time.perf_counter() - begin, facts=dict(prepared.facts))
            else:
                answer(**timed(prepared, device), peak_bytes=peak_memory(device) - start_bytes)
        except NotImplementedError as error:
            answer(error=str(error))
        except Exception as error:
            traceback.print_exc()
            answer(error=f"{type(error).__name__}: {error}" if str(error) else where(error))


def where(error: Exception) -> str:
    """An error without words, by its place."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(last.filename).name}, {last.name}: {last.line}"


def make_job(request: Mapping[str, Any]) -> Job:
    torch.set_num_threads(request["threads"])
    case, device = CASES[request["case"]], request["device"]
    inputs, labels = (tensor.to(device) for tensor in case.data(request["rows"]))
    model = case.model().to(device)
    folder = Path(request["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    return Job(case, model, inputs, labels, request["batch_size"], request["dim"], device, folder)


def timed(prepared: Prepared, device: str) -> dict[str, float]:
    start, start_cpu = time.perf_counter(), time.process_time()
    prepared.round()
    if device == "cuda":
        torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - start_cpu}


def start_memory(device: str) -> int:
    """What is held with the peer imported and model and data made; the peak is counted from here on."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_memory(device: str) -> int:
    """The most that was held at once since `start_memory`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}: memory is measured on Linux only")
