"""An environment for each peer, in benchmarks/.envs, from the pinned lists in benchmarks/envs.

torch and numpy are installed once, with the versions of constraints.txt, and every peer's environment sees them through a `.pth` file.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
FOLDER = HERE / ".envs"
SHARED = "torch"
OPTIONS = {"logix": ["--ignore-requires-python"]}
"""Of pip, by environment."""


def python_of(name: str) -> Path:
    """The interpreter of an environment; that of this process for "main"."""
    if name == "main":
        return Path(sys.executable)
    return FOLDER / name / "bin" / "python"


def ensure(names: Iterable[str]) -> dict[str, str | None]:
    """Make the environments that are not there as listed, two at a time; for each what went wrong, in a line, or None."""
    shared = _problem(SHARED, ["--constraint", str(ROOT / "constraints.txt")])
    found = {"main": None, SHARED: shared}
    peers = [name for name in names if name not in found]

    def make(name: str) -> str | None:
        return shared or _problem(name, ["--no-deps", *OPTIONS.get(name, [])], sees=SHARED)

    with ThreadPoolExecutor(max_workers=2) as pool:
        return found | dict(zip(peers, pool.map(make, peers)))


def _problem(name: str, options: list[str], sees: str | None = None) -> str | None:
    try:
        _make(name, options, sees)
    except subprocess.CalledProcessError as error:
        lines = [line for line in (error.stderr or "").splitlines() if line.startswith("ERROR")]
        return f"the environment cannot be made: {lines[-1] if lines else error}"
    return None


def versions(name: str) -> dict[str, str]:
    """Installed distributions of an environment, without those it shares."""
    run = subprocess.run(
        [python_of(name), "-m", "pip", "list", "--local", "--format", "freeze"],
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(line.split("==", 1) for line in run.stdout.splitlines() if "==" in line)


def _make(name: str, options: list[str], sees: str | None) -> None:
    requirements = HERE / "envs" / f"{name}.txt"
    mark, folder = FOLDER / name / ".made", FOLDER / name
    content = requirements.read_text() + " ".join(options) + (sees or "")
    digest = hashlib.sha256(content.encode()).hexdigest()
    if mark.exists() and mark.read_text() == digest:
        return
    print(f"making the environment {folder.relative_to(ROOT)}", flush=True)
    _run(sys.executable, "-m", "venv", "--clear", folder)
    if sees is not None:
        (site,) = folder.glob("lib/python*/site-packages")
        (shared,) = (FOLDER / sees).glob("lib/python*/site-packages")
        (site / "shared.pth").write_text(f"{shared}\n")
    pip = [python_of(name), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run(*pip, *options, "--requirement", requirements)
    mark.write_text(digest)


def _run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
