"""One checkpoint: from a file, a folder, a module, a mapping or a callable; see the package for what is read."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trak.checkpoints.fit import fit_names, with_frozen
from trak.checkpoints.peft import adapter_names, check_adapter_config
from trak.checkpoints.steps import steps_in
from trak.errors import CheckpointError, InputError

CheckpointSource: TypeAlias = "Mapping[str, Any] | nn.Module | str | os.PathLike[str] | Callable[[], Any]"
"""Anything `load_checkpoint` reads."""

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pth.tar")
NESTED_UNDER = ("state_dict", "model", "model_state_dict")
"""Keys under which training frameworks keep the state dict in a larger dictionary."""

_SAFETENSORS = ".safetensors"
_INDEX = ".index.json"
_KNOWN = (_SAFETENSORS, _INDEX, *PICKLE_SUFFIXES)
_FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
# Modules may put anything under such a key; it is no parameter and no buffer.
_EXTRA_STATE = "_extra_state"
CONTENTS, TRAINABLE = "trak.contents", "trainable parameters"
"""In the metadata of a safetensors file: says that it holds these only."""
_SHOWN = 6
_CALLS = 4


def load_checkpoint(
    source: CheckpointSource,
    *,
    model: nn.Module | None = None,
    trust_pickle: bool = False,
    map_location: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, detached.

    Without `model` names are as stored: a prefix such as "model." stays. With it they are the model's own:

    - A prefix under which the checkpoint holds the whole model is left out, and so is what lies outside of it (a `LightningModule`
      that holds the model, its other parts).
    - An adapter's names are those of the model's active PEFT adapter.
    - Where the checkpoint holds a part of the model only (an adapter; trainable parameters, as a
      `CheckpointCallback(trainable_only=True)` saves them), the rest is the model's own, in memory once.

    Args:
        source: where it is; see the package `trak.checkpoints`.
        model: the model it is for; not changed.
        trust_pickle: allow pickles that run code when loaded. Only for files from people you trust.
        map_location: device for tensors read from files. Tensors in memory stay where they are, not copied.

    Raises:
        CheckpointError: there is no such file, it is damaged or empty, it needs more than a plain pickle, what it holds is no
            mapping of names to tensors, or an adapter that the model does not have.
        InputError: a model that is none.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    for _ in range(_CALLS):
        if isinstance(source, (nn.Module, Mapping)):
            where = describe(source)
            state = _tensors(_module_state(source) if isinstance(source, nn.Module) else source, where)
            return state if model is None else fit_names(model, state, where)
        if isinstance(source, (str, os.PathLike)):
            file = _file(Path(source))
            state = _load_file(file, trust_pickle, torch.device(map_location))
            return state if model is None else _fit_file(model, state, file)
        if not callable(source):
            raise CheckpointError(
                "A checkpoint must be a state dict, a module, a path, or a callable that returns one of "
                f"these; got {type(source).__name__}."
            )
        source = source()
    raise CheckpointError(
        f"A callable checkpoint returned a callable, {_CALLS} times over; expected a state dict or path."
    )


def checkpoint_hash(state: Mapping[str, Tensor]) -> str:
    """sha256 over name, dtype, shape and bytes of every tensor in order of names: 64 hexadecimal digits.

    The same for a state dict in memory, on any device, and read back from any file; whether tensors share
    memory or are contiguous makes no difference. A name counts: files from which a tied duplicate's name was
    dropped hash differently from those that have both, so compare states after they were fitted to the model.
    One tensor at a time is brought to the CPU.

    Raises:
        CheckpointError: a tensor that is not dense.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach()
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise CheckpointError(
                f"{name!r} is no dense tensor with values ({tensor.layout}, {tensor.dtype}): it has no hash. "
                "Checkpoints are dense tensors; leave out what is not a parameter, or make it dense with to_dense()."
            )
        head = json.dumps([name, str(tensor.dtype), list(tensor.shape)])
        digest.update(f"{len(head)}:{head}".encode())
        # Resolved, because the bytes of a lazily conjugated or negated view are not its values.
        flat = tensor.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


def describe(source: CheckpointSource) -> str:
    """A short name of a source for messages."""
    if isinstance(source, nn.Module):
        return f"module {type(source).__name__}"
    if isinstance(source, Mapping):
        return f"state dict with {len(source)} {'entry' if len(source) == 1 else 'entries'}"
    if isinstance(source, (str, os.PathLike)):
        return str(source)
    if isinstance(source, functools.partial) and source.func is load_checkpoint and source.args:
        return describe(source.args[0])
    return f"callable {getattr(source, '__name__', type(source).__name__)}"


def _fit_file(model: nn.Module, state: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """A file's tensors under the model's names, with the model's own where the file is known to hold a part only."""
    if file.name.startswith("adapter_model."):
        config = file.parent / "adapter_config.json"
        if config.is_file():
            check_adapter_config(model, config)
        return with_frozen(model, adapter_names(model, state, str(file)))
    state = fit_names(model, state, str(file))
    return with_frozen(model, state) if _metadata(file).get(CONTENTS) == TRAINABLE else state


def _metadata(file: Path) -> Mapping[str, str]:
    """What a safetensors file says about itself; nothing for others."""
    if not file.name.endswith(_SAFETENSORS):
        return {}
    with safe_open(file, framework="pt") as opened:
        return opened.metadata() or {}


def _module_state(module: nn.Module) -> dict[str, Any]:
    """Its state dict, without what quantised layers and parameters save beside them, which cannot be exchanged.

    Names that are no tensor's may also be those of a wrapper that saves under other names than it has: they stay.
    """
    state = module.state_dict()
    parts = {name for name, _ in module.named_modules(remove_duplicate=False)}
    tensors = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    tensors |= {name for name, _ in module.named_buffers(remove_duplicate=False)}
    return {
        name: value
        for name, value in state.items()
        if name in tensors or not (name.rpartition(".")[0] in parts or _is_within(name, tensors))
    }


def _is_within(name: str, others: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:count]) in others for count in range(1, len(parts)))


def _file(path: Path) -> Path:
    """The file to read: the path itself, or the checkpoint in a folder.

    Raises:
        CheckpointError: there is none.
    """
    if path.is_dir():
        path = _file_in(path)
    if not path.is_file():
        raise CheckpointError(_not_found(path))
    return path


def _load_file(path: Path, trust_pickle: bool, device: torch.device) -> dict[str, Tensor]:
    if path.stat().st_size == 0:
        raise CheckpointError(
            f"{path} is empty (0 bytes): the checkpoint was never written, or its disk was full."
        )
    if path.name.endswith(_INDEX):
        return _load_index(path, trust_pickle, device)
    if path.name.endswith(_SAFETENSORS):
        return _load_safetensors(path, device)
    if path.name.endswith(PICKLE_SUFFIXES):
        return _load_pickle(path, trust_pickle, device)
    raise CheckpointError(
        f"{path} is no checkpoint that can be told by its name; expected one that ends with "
        f"{', '.join(_KNOWN)}. "
        "For another format give a callable that returns the state dict."
    )


def _load_safetensors(path: Path, device: torch.device) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is damaged or no safetensors file: {error}. Save or download it again."
        ) from error
    return _tensors(state, str(path))


def _load_pickle(path: Path, trust_pickle: bool, device: torch.device) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location=device, weights_only=not trust_pickle)
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        wanted = _wanted_by(path, error)
        if wanted and not trust_pickle:
            raise CheckpointError(
                f"{path} needs more than tensors and plain containers: it wants to load {wanted}, which can "
                "run any code. "
                "If you trust whoever made the file, pass trust_pickle=True; else save its state_dict() "
                "again."
            ) from error
        raise CheckpointError(
            f"{path} cannot be read: {type(error).__name__}: {error}. It may be truncated: save or download it again."
        ) from error
    if isinstance(loaded, nn.Module):
        loaded = loaded.state_dict()
    return _tensors(loaded, str(path))


def _wanted_by(path: Path, error: Exception) -> str:
    """Names of what a pickle asked for that weights_only refuses; empty if that was not the trouble."""
    if "weights_only" not in str(error) and "Weights only" not in str(error):
        return ""
    lister = getattr(torch.serialization, "get_unsafe_globals_in_checkpoint", None)
    names: list[str] = []
    if lister is not None:
        try:
            names = sorted(lister(path))
        except Exception:  # the first error is the one that counts
            names = []
    names = (
        names
        or re.findall(r"GLOBAL ([\w.]+)", str(error))
        or re.findall(r"Unsupported (?:class|operand) (\S+)", str(error))
    )
    return _list(names) if names else "something beyond that"


def _load_index(path: Path, trust_pickle: bool, device: torch.device) -> dict[str, Tensor]:
    """Every tensor that the index names, from the files it names beside it."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is no index of a sharded checkpoint: expected JSON with a 'weight_map' of tensor names "
            "to file names."
        ) from error
    outside = sorted({file for file in files.values() if Path(file).name != file or "\\" in file})
    if outside:
        raise CheckpointError(
            f"{path} names files outside its folder: {_list(outside)}. It is not loaded: put the files beside it, and their plain names into it."
        )
    absent = sorted({file for file in files.values() if not (path.parent / file).is_file()})
    if absent:
        raise CheckpointError(
            f"{path} names files that are not there: {_list(absent)}. The download or copy is not complete."
        )
    state: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        part = _load_file(path.parent / file, trust_pickle, device)
        names = [name for name, place in files.items() if place == file]
        lacking = [name for name in names if name not in part]
        if lacking:
            raise CheckpointError(
                f"{path} says that {file} holds {_list(lacking)}, and it does not: files of different "
                "versions?"
            )
        state |= {name: part[name] for name in names}
    return _tensors({name: state[name] for name in files}, str(path))


def _file_in(folder: Path) -> Path:
    """The checkpoint in a folder."""
    for name in _FOLDER_FILES:
        if (folder / name).is_file():
            return folder / name
    names = sorted(entry.name for entry in folder.iterdir())
    known = [name for name in names if name.endswith(_KNOWN) and (folder / name).is_file()]
    if len(known) == 1:
        return folder / known[0]
    if run := steps_in(folder):
        raise CheckpointError(
            f"{folder} holds the checkpoints of a run, not one: {_list(path.name for _, path in run)}. Give the path of one, or "
            f"checkpoints=trak.list_checkpoints({str(folder)!r}) for all of them in order."
        )
    found = f"found {_list(known or names)}" if names else "it is empty"
    raise CheckpointError(
        f"{folder} holds {'several checkpoints' if known else 'no checkpoint'}: {found}. Give the path of "
        "one file; "
        f"in a folder, {', '.join(_FOLDER_FILES)} or a single *{', *'.join(_KNOWN)} is looked for."
    )


def _tensors(loaded: object, where: str) -> dict[str, Tensor]:
    """A mapping of names to tensors, unwrapped if it is nested under one known key."""
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"{where} holds a {type(loaded).__name__}; expected a mapping of names to tensors (a state dict)."
        )
    flat = _flat(loaded)
    if flat is None:
        nested = {key: state for key in NESTED_UNDER if (state := _flat(loaded.get(key))) is not None}
        if len(nested) > 1:
            raise CheckpointError(
                f"{where} holds state dicts under {_list(nested)}: which one is meant? Give the one itself, "
                "e.g. with a "
                "callable that loads the file and returns it."
            )
        if not nested:
            raise CheckpointError(_no_state(loaded, where))
        flat = next(iter(nested.values()))
    if not flat:
        raise CheckpointError(f"{where} holds no tensors: it is an empty state dict.")
    return flat


def _flat(value: object) -> dict[str, Tensor] | None:
    """The tensors of a state dict, detached; None if it is none."""
    if isinstance(value, nn.Module):
        value = value.state_dict()
    if not isinstance(value, Mapping):
        return None
    entries = {key: item for key, item in value.items() if not str(key).endswith(_EXTRA_STATE)}
    if not all(isinstance(key, str) and isinstance(item, Tensor) for key, item in entries.items()):
        return None
    return {key: item.detach() for key, item in entries.items()}


def _no_state(loaded: Mapping[Any, Any], where: str) -> str:
    others = [
        f"{key!r} ({type(item).__name__})" for key, item in loaded.items() if not isinstance(item, Tensor)
    ]
    others = others or [
        f"{key!r} (a {type(key).__name__} as name)" for key in loaded if not isinstance(key, str)
    ]
    return (
        f"{where} is no mapping of names to tensors, and has none under {_list(NESTED_UNDER)}: it holds "
        f"{_list(others)}. "
        "Give the state dict itself, e.g. with a callable that loads the file and returns it."
    )


def _not_found(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        while not folder.is_dir() and folder != folder.parent:
            folder = folder.parent
        return f"There is no file {path}: its folder {path.parent} does not exist (there is {folder})."
    names = sorted(entry.name for entry in folder.iterdir())
    near = difflib.get_close_matches(path.name, names, n=3)
    candidates = near or [name for name in names if name.endswith(_KNOWN)]
    hint = (
        f"Did you mean {_list(candidates)}?" if near else f"Checkpoints there: {_list(candidates) or 'none'}."
    )
    where = "the current folder" if folder == Path() else folder
    return f"There is no file {path.name} in {where}. {hint}"


def _list(names: Any) -> str:
    listed = list(map(str, names))
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more
