"""PEFT adapters: the names under which they are saved, and those that they have in a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trak.errors import CheckpointError, MissingDependencyError

# What changes f for the same tensors. The rest of a config says where the adapter came from and how it was trained.
_MATTERS = (
    "peft_type",
    "r",
    "lora_alpha",
    "alpha_pattern",
    "rank_pattern",
    "use_rslora",
    "use_dora",
    "fan_in_fan_out",
)
_PROMPTS = "prompt_embeddings"


def adapter_names(model: nn.Module, state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """An adapter's tensors as saved by peft, under the names of the model's active adapter.

    Raises:
        CheckpointError: the model has no adapter, several active ones, or one with other tensors.
        MissingDependencyError: peft is not installed.
    """
    adapter = _active_adapter(model, where)
    try:
        from peft import get_peft_model_state_dict
    except ImportError as error:
        raise MissingDependencyError(f"{where} holds a PEFT adapter: pip install peft ({error})") from error
    own = dict(model.state_dict(keep_vars=True))
    # peft itself says what it would save, and under which names: the tensors' identity leads back to the model's.
    places = {id(tensor): name for name, tensor in own.items()}
    saved = get_peft_model_state_dict(
        model, state_dict=own, adapter_name=adapter, save_embedding_layers=_has_embeddings(model, state)
    )
    names = {name: places[id(tensor)] for name, tensor in saved.items() if id(tensor) in places}
    prompts = f"prompt_encoder.{adapter}.embedding.weight"
    if _PROMPTS in saved and prompts in own:
        names[_PROMPTS] = prompts  # peft computes what it saves of prompts: the rows of this table
    missing = [name for name in names if name not in state]
    unknown = [name for name in state if name not in names]
    if missing or unknown:
        which, kind = (
            (missing, "are missing from it") if missing else (unknown, "are not in the model's adapter")
        )
        raise CheckpointError(
            f"{where} does not fit the model's adapter {adapter!r}: {len(which)} tensors {kind}, first {which[0]!r}. Build the model "
            "with the adapter's own config: peft.PeftModel.from_pretrained(base, folder, is_trainable=True)."
        )
    return {names[name]: tensor for name, tensor in state.items()}


def check_adapter_config(model: nn.Module, path: Path) -> None:
    """That the model's active adapter computes what the saved one does: the same kind, rank and scale.

    Raises:
        CheckpointError: it does not, or the file is no adapter's config.
    """
    adapter = _active_adapter(model, str(path.parent))
    try:
        saved = dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise CheckpointError(f"{path} is no adapter's config: expected a JSON object ({error}).") from error
    configs: Any = model.peft_config
    own = configs[adapter].to_dict()
    differing = [
        f"{name} {saved[name]!r} there and {_plain(own[name])!r} in the model"
        for name in _MATTERS
        if name in saved and name in own and saved[name] != _plain(own[name])
    ]
    if differing:
        raise CheckpointError(
            f"{path.parent} holds another kind of adapter than the model's {adapter!r}: {'; '.join(differing)}. Build the model with the "
            "adapter's own config: peft.PeftModel.from_pretrained(base, folder, is_trainable=True)."
        )


def _active_adapter(model: nn.Module, where: str) -> str:
    if not getattr(model, "peft_config", None):
        raise CheckpointError(
            f"{where} holds a PEFT adapter, and {type(model).__name__} has none: pass the model with its adapter, "
            "peft.PeftModel.from_pretrained(base, folder, is_trainable=True)."
        )
    # A property of peft's own models; a method of transformers' models with an adapter loaded into them.
    active: Any = getattr(model, "active_adapters", None)
    active = active() if callable(active) else active
    active = [active] if isinstance(active, str) else list(active or model.peft_config)  # type: ignore[arg-type]
    if len(active) != 1:
        raise CheckpointError(
            f"{where} holds one adapter, and {len(active)} of the model's are active ({', '.join(active)}): call model.set_adapter(name) for "
            "the one that is meant."
        )
    return active[0]


def _has_embeddings(model: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Whether the file holds whole embedding tables, which peft saves after the vocabulary was extended."""
    finders = [getattr(model, f"get_{side}_embeddings", None) for side in ("input", "output")]
    layers = [find() for find in finders if callable(find)]
    names = [
        name
        for name, module in model.named_modules()
        if any(module is layer for layer in layers if layer is not None)
    ]
    return any(f"{name}.weight" in state for name in names)


def _plain(value: Any) -> Any:
    """As JSON would give it back."""
    return getattr(value, "value", value)
