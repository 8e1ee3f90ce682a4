"""Recipes: Python files that say what to attribute.

    # recipe.py
    model = make_model()
    train_set, targets = TensorDataset(...), TensorDataset(...)
    task = "image_classification"
    checkpoints = ["run1.pt", "run2.pt"]

or a function that returns a mapping with these names: `recipe.py:make`.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from trak.cli.output import prints_aside, say
from trak.errors import InputError, TrakError

REQUIRED = ("model", "train_set", "targets", "task")
SHOWING = (
    "train_labels",
    "target_labels",
    "class_names",
    "predictions",
    "show_train",
    "show_target",
    "title",
    "lead",
)
"""Names that say how results are shown."""
MEASURING = (
    "train_part",
    "seconds_per_model",
    "passes_per_model",
    "runs",
    "learning_rates",
    "train_texts",
    "target_texts",
)
"""Names that `trak frontier` reads; see its help."""


@dataclass(frozen=True, eq=False)
class Recipe:
    """What a recipe said.

    Attributes:
        arguments: for `trak.attribute`.
        showing: how to show results; see SHOWING.
        measuring: what a comparison of methods needs besides; see MEASURING.
    """

    arguments: Mapping[str, Any]
    showing: Mapping[str, Any]
    measuring: Mapping[str, Any] = field(default_factory=dict)


def load_recipe(place: str) -> Recipe:
    """Run `FILE.py` or `FILE.py:FUNCTION` and take what it defines or returns.

    Raises:
        InputError: no such file or function, an error in it, or names that are missing or unknown.
    """
    path, function = _split(place)
    module = _run_file(path)
    allowed = (*_attribute_arguments(), *SHOWING, *MEASURING)
    if function is None:
        values = {name: getattr(module, name) for name in allowed if hasattr(module, name)}
        _remark_on_misspelt(path, module, [name for name in allowed if name not in values])
    else:
        values = dict(_call(module, path, function))
        unknown = [name for name in values if name not in allowed]
        if unknown:
            close = difflib.get_close_matches(str(unknown[0]), allowed, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(allowed)}"
            raise InputError(
                f"the recipe {place} returns {unknown[0]!r}, which is nothing that can be set{hint}"
            )
    missing = [name for name in REQUIRED if name not in values]
    if missing:
        functions = [] if function else _functions(module)
        hint = f". To take what a function returns: {path}:{functions[0]}" if functions else ""
        raise InputError(
            f"the recipe {place} does not define {', '.join(missing)}; "
            f"a recipe defines {', '.join(REQUIRED)} and, if you like, checkpoints and other arguments of trak.attribute{hint}"
        )
    return Recipe(
        {name: value for name, value in values.items() if name not in (*SHOWING, *MEASURING)},
        {name: value for name, value in values.items() if name in SHOWING},
        {name: value for name, value in values.items() if name in MEASURING},
    )


def _split(place: str) -> tuple[Path, str | None]:
    """The file, and the function after a colon, if there is one."""
    path, colon, function = place.rpartition(":")
    if not colon or not function.isidentifier():
        path, function = place, ""
    file = Path(path)
    if not file.is_file():
        raise InputError(f"there is no recipe {file}; expected a Python file, or FILE.py:FUNCTION")
    return file, function or None


def _run_file(path: Path) -> ModuleType:
    """Run the file as a module of its own, with its folder first on the search path, as Python itself would."""
    name = f"trak_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is not a Python file; a recipe is FILE.py or FILE.py:FUNCTION")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    # Worker processes of data loaders look their classes up here.
    sys.modules[name] = module
    try:
        with prints_aside():
            spec.loader.exec_module(module)
    except TrakError:
        raise
    except Exception as error:
        raise _recipe_error(path, error) from error
    return module


def _call(module: ModuleType, path: Path, function: str) -> Mapping[str, Any]:
    make = getattr(module, function, None)
    if not callable(make):
        raise InputError(f"the recipe {path} has no function {function!r}")
    try:
        with prints_aside():
            values = make()
    except TrakError:
        raise
    except Exception as error:
        raise _recipe_error(path, error) from error
    if not isinstance(values, Mapping):
        raise InputError(
            f"the recipe {path}:{function} returns {type(values).__name__}; expected a mapping with {', '.join(REQUIRED)}"
        )
    return values


def _remark_on_misspelt(path: Path, module: ModuleType, unset: list[str]) -> None:
    """A file may define whatever it likes, so a name that is almost an argument's is no error; but it has no effect."""
    for name, value in vars(module).items():
        if name.startswith("_") or name in unset or isinstance(value, (ModuleType, type)) or callable(value):
            continue
        close = difflib.get_close_matches(name, unset, n=1, cutoff=0.85)
        if close:
            say(f"Note: {path} defines {name!r}, which is not used; did you mean {close[0]!r}?")


def _functions(module: ModuleType) -> list[str]:
    """Functions of the file itself that can be called without arguments, the ones meant first."""
    own = [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__ == module.__name__
        and not name.startswith("_")
        and not inspect.signature(value).parameters
    ]
    return sorted(own, key=lambda name: name not in ("make", "recipe", "main"))


def _recipe_error(path: Path, error: Exception) -> InputError:
    """What went wrong in the recipe, and on which of its lines."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    if isinstance(error, SyntaxError):
        lines = [error.lineno]
    where = f"{path}, line {lines[-1]}" if lines else str(path)
    what = error.msg if isinstance(error, SyntaxError) else error
    return InputError(
        f"the recipe stopped at {where}: {type(error).__name__}: {what} (trak --debug shows the traceback)"
    )


def _attribute_arguments() -> tuple[str, ...]:
    import trak

    return tuple(inspect.signature(trak.attribute).parameters)
