"""Measured time, and its limit."""

from __future__ import annotations

import json
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from trak._version import __version__
from trak.errors import InputError
from trak.files import write_whole
from trak.frontier.values import Seconds


class OverTimeError(BaseException):
    """The time limit of a point is over. No `Exception`: libraries that catch those must not swallow it."""


class Stopwatch:
    """Both clocks from now on."""

    def __init__(self) -> None:
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def read(self) -> Seconds:
        """Since the beginning; waits for an accelerator's work."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return Seconds(wall=time.perf_counter() - self._wall, processor=time.process_time() - self._processor)


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise OverTimeError in the block after so many seconds on the wall; None for no limit.

    Raises:
        InputError: the system has no such alarm, or this is not the main thread.
    """
    if seconds is None:
        yield
        return
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        raise InputError(
            "a time limit needs a system with alarm signals, and the main thread: leave the limit out"
        )

    def stop(number: int, frame: FrameType | None) -> None:
        raise OverTimeError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True, kw_only=True)
class Training:
    """What training one model of the bank costs.

    Attributes:
        seconds: of one model.
        passes: plain passes over the whole training set that it is: epochs times the share of the rows; None if not known.
    """

    seconds: Seconds
    passes: float | None = None

    def __post_init__(self) -> None:
        if min(self.seconds.wall, self.seconds.processor) < 0:
            raise InputError(f"seconds of training must be ≥ 0; got {self.seconds}")
        if self.passes is not None and not self.passes > 0:
            raise InputError(f"passes of training must be > 0; got {self.passes!r}")


def measure_training(
    train_part: Callable[[], Any], *, folder: str | Path, passes: float | None = None
) -> Training:
    """Time the training of a model once; what was measured is kept in the folder.

    Args:
        train_part: trains a model as one of the bank's, or the beginning of it, and returns the share of a training that it
            did, in (0, 1]; None for all of it.
        folder: made if it is not there.
        passes: see `Training`.

    Raises:
        InputError: another share.
    """
    folder = Path(folder)
    file, machine = folder / "training.json", machine_facts()
    machine.pop("date")
    if file.is_file():
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["machine"] == machine:
            return Training(seconds=Seconds(**kept["seconds"]), passes=passes)
    watch = Stopwatch()
    share = train_part()
    share = 1.0 if share is None else share
    if not (isinstance(share, (int, float)) and 0 < share <= 1):
        raise InputError(
            f"train_part must return the share of a model's training that it did, in (0, 1], or None for all of it; got {share!r}"
        )
    seconds = watch.read() * (1 / share)
    folder.mkdir(parents=True, exist_ok=True)
    values = {"seconds": asdict(seconds), "share": share, "machine": machine}
    write_whole(file, json.dumps(values, indent=1).encode())
    return Training(seconds=seconds, passes=passes)


def machine_facts() -> dict[str, Any]:
    """What seconds depend on."""
    return {
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "trak": __version__,
        "date": date.today().isoformat(),
    }


def default_clock(options: Mapping[str, Any]) -> str:
    """Processor time on CPUs, where other programs lengthen the wall's; wall time with an accelerator, which it does not see."""
    device = options.get("device")
    if device is not None:
        return "processor" if torch.device(device).type == "cpu" else "wall"
    has_accelerator = torch.cuda.is_available() or torch.backends.mps.is_available()
    return "wall" if has_accelerator else "processor"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
