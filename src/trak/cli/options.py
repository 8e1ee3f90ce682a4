"""Words of the command line to trak's objects."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from trak.errors import InputError

if TYPE_CHECKING:
    from trak.precondition import Damping
    from trak.projection import Projection


def parse_projection(words: str) -> Projection:
    """A projection from `kind:dim`, with further options after commas: `sparse:2048,nonzeros=4,seed=1`,
    `sparse:64,per_layer`, `eigenbasis:4096,whitening=none`; `identity`; or `whitened:` and another, `whitened:sparse:4096`.

    Raises:
        InputError: a kind or option that is not there, or another value than an option takes.
    """
    from trak.projection.kinds import KINDS

    kind, _, rest = words.strip().partition(":")
    if kind not in KINDS:
        raise InputError(
            f"--projection is KIND:DIM with a kind of {', '.join(KINDS)}, such as kronecker:4096; got {words!r}"
        )
    # How much memory a drawn matrix may take is no matter of the numbers, so no option here.
    fields = sorted(dataclasses.fields(KINDS[kind]), key=lambda field: field.name != "dim")  # type: ignore[arg-type]
    known = {field.name: field for field in fields if field.name not in ("cache_bytes", "inner")}
    options: dict[str, Any] = {}
    inner: list[str] = []
    for place, part in enumerate(filter(None, rest.split(","))):
        name, equals, value = part.partition("=")
        if kind == "whitened" and name not in known:
            inner.append(part)
            continue
        if not equals and place == 0 and name not in known:
            name, value = "dim", part
        if name not in known:
            allowed = ", ".join(known) or "no options"
            raise InputError(f"--projection {kind} takes {allowed}; got {part!r} in {words!r}")
        if isinstance(known[name].default, bool) and not equals:
            options[name] = True
        else:
            options[name] = _value(known[name], value, words)
    if kind == "whitened":
        if not inner:
            raise InputError(
                f"--projection whitened needs another projection, such as whitened:sparse:4096; got {words!r}"
            )
        options["inner"] = parse_projection(",".join(inner))
    # A default is for code; on the command line a number of columns is to be seen.
    if "dim" in known and "dim" not in options:
        raise InputError(f"--projection {kind} needs its dimension, such as {kind}:4096; got {words!r}")
    return KINDS[kind](**options)


def _value(field: dataclasses.Field[Any], text: str, words: str) -> Any:
    """An option's value, by the type it is declared with."""
    declared = str(field.type)
    if "None" in declared and text == "none":
        return None
    if declared == "str":
        return text
    if "float" not in declared:
        number = _whole(text, words)
        return bool(number) if declared == "bool" else number
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--projection takes a number for {field.name}; got {text!r} in {words!r}") from None


def parse_damping(words: str) -> float | str | Damping:
    """A damping from `auto`, a number λ ≥ 0, or `relative:RATIO` of the mean eigenvalue.

    Raises:
        InputError: anything else.
    """
    if words == "auto":
        return words
    kind, colon, number = words.partition(":")
    if colon and kind == "relative":
        from trak.precondition import RelativeDamping

        return RelativeDamping(_number(number, words))
    return _number(words, words)


def _whole(number: str, words: str) -> int:
    try:
        return int(number)
    except ValueError:
        raise InputError(f"--projection takes whole numbers; got {number!r} in {words!r}") from None


def _number(number: str, words: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise InputError(
            f"--damping is auto, a number ≥ 0, or relative:RATIO, such as relative:0.1; got {words!r}"
        )
    return value
