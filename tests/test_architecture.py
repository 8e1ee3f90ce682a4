"""The import directions of the design, walked over the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "trak"

# What each room may import of trak. Rooms are packages or modules directly under src/trak.
VOCABULARY = {"errors", "blocks", "batches", "files", "hardware", "progress", "logs", "_version"}
STAGES = {"tasks", "gradients", "projection", "store", "precondition", "scores"}
WIRING = {"allocator", "setting", "projector", "pipeline"}
ALLOWED = {
    "errors": set(),
    "logs": set(),
    "files": set(),
    "memory": set(),
    "hardware": set(),
    "_version": set(),
    "blocks": set(),
    "progress": set(),
    "batches": {"errors"},
    "datasets": {"errors", "batches"},
    # The stages: none imports another one, and tasks are what gradients are computed of.
    "tasks": VOCABULARY,
    "gradients": VOCABULARY | {"tasks"},
    "projection": VOCABULARY,
    "store": VOCABULARY | {"ahead"},
    "precondition": VOCABULARY,
    "ahead": set(),
    "ranking": {"errors"},
    "products": set(),
    "scores": VOCABULARY | {"ahead", "memory", "products", "ranking"},
    "uncertainty": VOCABULARY | {"scores"},
    "checkpoints": VOCABULARY,
    # The wiring.
    "allocator": {"memory"},
    "transfer": set(),
    "setting": VOCABULARY | {"tasks", "gradients", "projection"},
    "projector": VOCABULARY | {"transfer", "setting", "tasks", "gradients", "projection"},
    "pipeline": VOCABULARY | STAGES | {"allocator", "setting", "projector", "datasets"},
    "results": VOCABULARY | {"datasets", "scores", "uncertainty", "report"},
    "methods": VOCABULARY | STAGES | WIRING | {"datasets", "memory", "checkpoints", "results"},
    "attribution": {"gradients", "methods", "precondition", "projection", "results", "tasks"},
    "traker": VOCABULARY | STAGES | WIRING | {"datasets", "checkpoints", "results", "methods"},
    # Around it: evaluation and report work on values.
    "evaluation": VOCABULARY | {"scores"},
    "report": VOCABULARY,
    # A measurement of all methods by a bank: it needs both sides.
    "frontier": VOCABULARY
    | {
        "datasets",
        "tasks",
        "gradients",
        "projection",
        "store",
        "precondition",
        "checkpoints",
        "methods",
        "evaluation",
        "report",
    },
}
# The outer rooms may import anything, and nothing imports them.
OUTER = {"cli", "demo", "integrations", "testing"}
OUTER_IMPORTS = {"cli": {"demo"}}


def modules():
    return sorted(ROOT.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "trak":
                rooms |= {
                    alias.name
                    for alias in node.names
                    if (ROOT / alias.name).is_dir() or (ROOT / f"{alias.name}.py").exists()
                }
                rooms |= {"<public api>" for alias in node.names if alias.name not in rooms}
            elif (node.module or "").startswith("trak."):
                rooms.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "trak":
                    rooms.add("<public api>")
                elif alias.name.startswith("trak."):
                    rooms.add(alias.name.split(".")[1])
    return rooms


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_import_directions(path):
    room = room_of(path)
    if room == "__init__":
        return
    imported = imported_rooms(path) - {room}
    if room in OUTER:
        assert not (imported & OUTER) - OUTER_IMPORTS.get(room, set()), f"{path} imports an outer room"
        return
    assert room in ALLOWED, f"{room} is a new room: say in tests/test_architecture.py what it may import"
    assert not imported - ALLOWED[room], f"{path} imports {sorted(imported - ALLOWED[room])}"


def test_rule_is_not_vacuous():
    assert "tasks" in imported_rooms(ROOT / "setting.py")
    assert len(modules()) > 30


def test_import_has_no_side_effects_and_needs_core_dependencies_only():
    import subprocess
    import sys

    code = """
import logging, sys
before = list(logging.getLogger().handlers)
import trak
assert logging.getLogger().handlers == before
optional = {"typer", "rich", "jinja2", "matplotlib", "PIL", "scipy", "pandas", "transformers", "sklearn", "numba", "quanda"}
optional |= {"curvlinops", "backpack", "bm25s", "triton"}
loaded = optional & set(sys.modules)
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True)
