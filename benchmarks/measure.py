"""Contenders in processes of their own, measured in turns.

Every round of a contender comes right after a round of the plain pass, so that drift of the machine falls on both alike; what is reported
is the median of the ratios.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import statistics
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cases import Case
from contenders import PLAIN, Contender

HERE = Path(__file__).resolve().parent
ERROR_LENGTH = 140


class PeerError(Exception):
    """A contender cannot do what it was asked for; the message is for the table."""


@dataclass(frozen=True)
class Settings:
    """How a run measures.

    Attributes:
        dim: K.
        rounds: at most so many of each contender, after one that warms up.
        threads: of every process.
        device: "cpu" or "cuda".
        budget: seconds for a contender's rounds in a case; at least one is measured.
        slow: a contender whose first round takes longer than so many seconds is measured by that round alone.
        timeout: seconds (of the wall clock) that one answer may take.
    """

    dim: int = 2048
    rounds: int = 5
    threads: int = 1
    device: str = "cpu"
    budget: float = 30.0
    slow: float = 20.0
    timeout: float = 900.0

    @property
    def clock(self) -> str:
        """Seconds of the processor where one thread works, of the wall elsewhere."""
        return "cpu_seconds" if self.device == "cpu" and self.threads == 1 else "seconds"


class Peer:
    """A contender's process."""

    def __init__(self, command: list[str], *, threads: int, timeout: float, log: Path):
        environment = {
            **os.environ,
            "PYTHONPATH": str(HERE),
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        self._timeout = timeout
        self._log = log.open("w")
        self._process: subprocess.Popen[str] = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
            cwd=log.parent,
        )
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request and its answer.

        Raises:
            PeerError: the answer is an error, or there is none.
        """
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=self._timeout)
        except queue.Empty:
            self.stop()
            raise PeerError(f"no answer in {self._timeout:g} seconds") from None
        except OSError:
            line = None
        if line is None:
            code = self._process.wait()
            raise PeerError(f"the process ended with code {code}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(shorten(answer["error"]))
        return answer

    def stop(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def shorten(message: str) -> str:
    """One line of at most `ERROR_LENGTH` characters."""
    line = " ".join(message.split())
    return line if len(line) <= ERROR_LENGTH else line[: ERROR_LENGTH - 1] + "…"


class Measured:
    """One contender in one case: its process and what was measured."""

    def __init__(self, contender: Contender, case: Case, settings: Settings):
        self.contender = contender
        self.rows = case.dense_rows if contender.dense else case.rows
        self.batch_size = case.dense_rows if contender.dense else case.batch_size
        self.pairs: list[tuple[dict[str, float], dict[str, float]]] = []
        self.rounds_left = settings.rounds
        self.warm: tuple[dict[str, float], dict[str, float]] | None = None
        self.peak_bytes = 0
        self.ready: dict[str, Any] = {}
        self.error: str | None = None
        self.peer: Peer | None = None

    @property
    def examples(self) -> int:
        """That a round's time is divided by."""
        return int(self.ready.get("facts", {}).get("examples", self.rows))

    def start(self, python: Path, case: Case, settings: Settings, folder: Path) -> None:
        name = self.contender.key
        (folder / name).mkdir()
        self.peer = Peer(
            [str(python), str(HERE / "peers" / f"run_{self.contender.runner}.py")],
            threads=settings.threads,
            timeout=settings.timeout,
            log=folder / f"{name}.log",
        )
        self.ready = self.peer.ask(
            do="prepare",
            contender=self.contender.call,
            case=case.name,
            dim=settings.dim,
            threads=settings.threads,
            device=settings.device,
            rows=self.rows,
            batch_size=self.batch_size,
            folder=str(folder / name),
        )

    def round(self) -> dict[str, float]:
        """Seconds per example of one round."""
        answer = self.peer.ask(do="round")
        self.peak_bytes = max(self.peak_bytes, answer["peak_bytes"])
        return {clock: answer[clock] / self.examples for clock in ("seconds", "cpu_seconds")}

    def stop(self) -> None:
        if self.peer is not None:
            self.peer.stop()
            self.peer = None


def measure_case(
    case: Case,
    contenders: Iterable[Contender],
    pythons: Mapping[str, Path | str],
    settings: Settings,
) -> dict[str, Any]:
    """Everything measured in one case.

    Args:
        case: model and data.
        contenders: with the plain pass among them.
        pythons: interpreter of each environment, or a sentence that says why there is none.
        settings: how.

    Returns:
        contender's key to its entry, see `entry`.
    """
    entrants = [Measured(contender, case, settings) for contender in contenders]
    (floor,) = (entrant for entrant in entrants if entrant.contender.key == PLAIN)
    with tempfile.TemporaryDirectory(prefix="trak-bench-") as name:
        try:
            for entrant in entrants:
                _guarded(entrant, lambda e=entrant: _start(e, case, pythons, settings, Path(name)))
            if floor.error is not None:
                raise SystemExit(f"{case.name}: the plain pass failed: {floor.error}")
            _warm_up(floor, entrants, settings)
            while any(entrant.rounds_left for entrant in entrants):
                for entrant in entrants:
                    if entrant.rounds_left:
                        _guarded(entrant, lambda e=entrant: _pair(floor, e))
        finally:
            for entrant in entrants:
                entrant.stop()
    return {entrant.contender.key: entry(entrant) for entrant in entrants}


def _start(
    entrant: Measured, case: Case, pythons: Mapping[str, Path | str], settings: Settings, folder: Path
):
    python = pythons[entrant.contender.env]
    if isinstance(python, str):
        raise PeerError(shorten(python))
    entrant.start(python, case, settings, folder)


def _guarded(entrant: Measured, run: Any) -> None:
    if entrant.error is not None:
        return
    try:
        run()
    except PeerError as error:
        entrant.error = str(error)
        entrant.rounds_left = 0
        entrant.stop()


def _warm_up(floor: Measured, entrants: list[Measured], settings: Settings) -> None:
    """One round of each, which also says how many more there is time for."""
    floor.round()
    for entrant in entrants:

        def first(entrant: Measured = entrant) -> None:
            base = floor.round()
            entrant.warm = (base, entrant.round())
            taken = entrant.warm[1][settings.clock] * entrant.examples
            if taken > settings.slow:
                entrant.pairs, entrant.rounds_left = [entrant.warm], 0
                if entrant is not floor:
                    entrant.stop()
            else:
                both = taken + base[settings.clock] * floor.examples
                entrant.rounds_left = min(settings.rounds, max(1, int(settings.budget / both)))

        _guarded(entrant, first)


def _pair(floor: Measured, entrant: Measured) -> None:
    base = floor.round()
    entrant.pairs.append((base, entrant.round()))
    entrant.rounds_left -= 1


def entry(entrant: Measured) -> dict[str, Any]:
    """What the results keep of a contender in a case; ratios are to the plain pass, per example."""
    kept: dict[str, Any] = {"rows": entrant.rows, "batch_size": entrant.batch_size}
    if entrant.error is not None:
        return {**kept, "error": entrant.error}
    for clock, name in (("seconds", "wall"), ("cpu_seconds", "cpu")):
        ratios = [one[clock] / base[clock] for base, one in entrant.pairs]
        kept[f"{name}_ratio"] = statistics.median(ratios)
        kept[f"{name}_ratios"] = ratios
        kept[f"{name}_seconds_per_example"] = statistics.median(one[clock] for _, one in entrant.pairs)
    kept["peak_bytes"] = entrant.peak_bytes
    kept["setup_seconds"] = entrant.ready["setup_seconds"]
    kept["facts"] = entrant.ready["facts"]
    return kept
