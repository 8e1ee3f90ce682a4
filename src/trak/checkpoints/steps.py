"""The checkpoints of one training run in a folder, by the step in their names."""

from __future__ import annotations

import re
from pathlib import Path

_FOLDER = re.compile(r"checkpoint-(\d+)")
_FILE = re.compile(r"(?:.*[-_])?step[-_=](\d+)(?:\D.*)?\.(?:safetensors|ckpt|pt|pth|bin)")


def steps_in(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) by ascending step: folders called checkpoint-500, files with step-500, step=500 or step_500 in their names.

    Names that begin with a dot are files in writing.
    """
    found = []
    for entry in folder.iterdir():
        pattern = _FOLDER if entry.is_dir() else _FILE
        match = None if entry.name.startswith(".") else pattern.fullmatch(entry.name)
        if match:
            found.append((int(match[1]), entry))
    return sorted(found)
