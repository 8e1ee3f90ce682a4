"""Models that embed images and texts (or any two kinds of thing) in one space: how to ask them for embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trak.batches import describe
from trak.errors import InputError


@dataclass(frozen=True)
class DualEncoder:
    """How a model embeds both sides of a batch of pairs, as three functions.

    Attributes:
        image_features: (model, batch) -> [B, D], of any length: the task normalises them.
        text_features: the same for the other side.
        logit_scale: (model) -> the factor of cosines in the logits: a number, or a tensor of one element. Often the exponential of a
            parameter.
        name: distinguishes encoders in a store's fingerprint.
    """

    image_features: Callable[[nn.Module, Any], Tensor]
    text_features: Callable[[nn.Module, Any], Tensor]
    logit_scale: Callable[[nn.Module], Tensor | float]
    name: str = "custom"


def transformers_encoder() -> DualEncoder:
    """For `transformers.CLIPModel` and its kin; batches are mappings as their processor gives them (pixel_values, input_ids, …)."""
    return DualEncoder(_transformers_image, _transformers_text, _exponential_scale, "transformers")


def open_clip_encoder() -> DualEncoder:
    """For models of `open_clip`; batches are (images, tokenised texts)."""
    return DualEncoder(_open_clip_image, _open_clip_text, _exponential_scale, "open_clip")


def resolve_encoder(encoder: DualEncoder | str) -> DualEncoder:
    """An encoder from an object or a name.

    Raises:
        InputError: something else.
    """
    known = {"transformers": transformers_encoder, "open_clip": open_clip_encoder}
    if isinstance(encoder, DualEncoder):
        return encoder
    if encoder in known:
        return known[encoder]()
    raise InputError(
        f"encoder must be one of {', '.join(known)}, or trak.DualEncoder(image_features, text_features, logit_scale); got {encoder!r}"
    )


def _transformers_image(model: nn.Module, batch: Any) -> Tensor:
    inputs = _fields(batch, ("pixel_values",))
    return _features(_method(model, "get_image_features", "transformers")(**inputs))


def _transformers_text(model: nn.Module, batch: Any) -> Tensor:
    inputs = _fields(batch, ("input_ids", "attention_mask", "position_ids"))
    return _features(_method(model, "get_text_features", "transformers")(**inputs))


def _features(output: Any) -> Tensor:
    """The projected features: the output itself, or, from version 5 on, its pooled part."""
    return getattr(output, "pooler_output", output)


def _fields(batch: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Those of `names` that are there; the first must be."""
    if not isinstance(batch, Mapping) or names[0] not in batch:
        raise InputError(
            f'pairs for encoder="transformers" are mappings with pixel_values, input_ids and attention_mask; got {describe(batch)}'
        )
    return {name: batch[name] for name in names if name in batch}


def _open_clip_image(model: nn.Module, batch: Any) -> Tensor:
    return _method(model, "encode_image", "open_clip")(_side(batch, 0))


def _open_clip_text(model: nn.Module, batch: Any) -> Tensor:
    return _method(model, "encode_text", "open_clip")(_side(batch, 1))


def _side(batch: Any, index: int) -> Any:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise InputError(
            f'pairs for encoder="open_clip" are (images, tokenised texts); got {describe(batch)}'
        )
    return batch[index]


def _method(model: nn.Module, name: str, library: str) -> Callable[..., Any]:
    method = getattr(model, name, None)
    if method is None:
        raise InputError(
            f"{type(model).__name__} has no {name}(), which models of {library} have: pass encoder=trak.DualEncoder(image_features, "
            'text_features, logit_scale), or the name of its library, "transformers" or "open_clip"'
        )
    return method


def _exponential_scale(model: nn.Module) -> Tensor:
    scale = getattr(model, "logit_scale", None)
    if not isinstance(scale, Tensor):
        raise InputError(
            f"{type(model).__name__} has no logit_scale: pass encoder=trak.DualEncoder(…, logit_scale=lambda model: 100.0)"
        )
    return scale.exp()
