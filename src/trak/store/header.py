"""The header of a store: everything that makes features comparable, and how two of them are told apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from trak.errors import FingerprintError, InputError, StoreError

FORMAT_VERSION = 1
"""Version of the on-disk format (docs/format.md), raised when older readers would misread newer stores."""

FEATURE_DTYPES = ("float64", "float32", "bfloat16", "float16")
COMPUTE_DTYPES = ("float64", "float32", "bfloat16", "float16")

ABSENT = "(absent)"
"""Stands in a difference for a field that one side does not have."""

_PARAMETERS_SHOWN = 5
_VALUE_WIDTH = 120

Difference = tuple[str, Any, Any]
"""(field, stored, asked)."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """The fingerprint of a store. Two sets of features may be compared only if their headers are equal.

    Attributes:
        num_rows: number of training rows N.
        dim: number of features K per row.
        columns: how the K columns split over layers, as (name, start, stop).
        parameters: attributed parameters, canonical name to shape, in the model's order.
        projection: the projection's fingerprint (kind, version, seed, dim, ...), JSON values only.
        task: the task's fingerprint, JSON values only.
        compute_dtype: dtype in which gradients and projections were computed, e.g. "float32".
        feature_dtype: dtype in which features are stored: "float64", "float32", "bfloat16" or "float16".
        format_version: version of the on-disk format.
        extra: anything else that decides the numbers, JSON values only.

    Raises:
        InputError: a field that cannot be (no features, an unknown dtype, values that JSON cannot hold).
    """

    num_rows: int
    dim: int
    columns: Sequence[tuple[str, int, int]]
    parameters: Mapping[str, Sequence[int]]
    projection: Mapping[str, Any]
    task: Mapping[str, Any]
    compute_dtype: str = "float32"
    feature_dtype: str = "float32"
    format_version: int = FORMAT_VERSION
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, smallest in (("num_rows", 0), ("dim", 1), ("format_version", 1)):
            check_integer(getattr(self, name), name=name, smallest=smallest)
        for name, allowed in (("compute_dtype", COMPUTE_DTYPES), ("feature_dtype", FEATURE_DTYPES)):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}.")
        try:
            columns = tuple((str(name), int(start), int(stop)) for name, start, stop in self.columns)
            parameters = {str(name): tuple(int(n) for n in shape) for name, shape in self.parameters.items()}
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(
                "columns must be (name, start, stop) triples and parameters a mapping of names to shapes; "
                f"got {self.columns!r} and {self.parameters!r}."
            ) from error
        object.__setattr__(self, "columns", columns)
        object.__setattr__(self, "parameters", parameters)
        for name in ("projection", "task", "extra"):
            object.__setattr__(self, name, _json_values(name, getattr(self, name)))

    def __hash__(self) -> int:
        return hash(self.digest())

    @property
    def value_dtype(self) -> str:
        """Dtype of stored `outputs` and `weights`: float64 if computed or stored in float64, else float32."""
        return "float64" if "float64" in (self.compute_dtype, self.feature_dtype) else "float32"

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values, in a fixed order."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        values["columns"] = [list(column) for column in self.columns]
        values["parameters"] = {name: list(shape) for name, shape in self.parameters.items()}
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Header:
        """The header that `to_json` wrote.

        Raises:
            StoreError: fields are missing, unknown or impossible.
        """
        names = {item.name for item in fields(cls)}
        if not isinstance(values, Mapping) or set(values) != names:
            found = sorted(values) if isinstance(values, Mapping) else type(values).__name__
            raise StoreError(f"a header must have exactly the fields {sorted(names)}; got {found}.")
        try:
            return cls(**values)
        except (InputError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"a header holds impossible values: {error}") from error

    def digest(self) -> str:
        """sha256 of the header's JSON text, as 64 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.to_json()).encode()).hexdigest()

    def difference(self, other: Header) -> list[Difference]:
        """Where `other` departs from this header: (field, stored here, asked for there); nested as `a.b`."""
        stored, asked = self.to_json(), other.to_json()
        out: list[Difference] = []
        for name in stored:
            out += _differences(name, stored[name], asked[name])
        if not out and list(self.parameters) != list(other.parameters):
            out.append(("parameters (order)", list(self.parameters), list(other.parameters)))
        return out


def refuse_difference(where: str, stored: Header, asked: Header) -> None:
    """Nothing if the headers agree.

    Raises:
        FingerprintError: they do not; the message has one line per field and says what to do next.
    """
    differences = stored.difference(asked)
    if not differences:
        return
    lines = [f"The store at {where} was made with other settings than those asked for:", ""]
    shown = 0
    for name, old, new in differences:
        if name.startswith("parameters."):
            shown += 1
            if shown > _PARAMETERS_SHOWN:
                continue
        lines.append(f"  {name}: stored {_short(old)}, asked for {_short(new)}")
    if shown > _PARAMETERS_SHOWN:
        lines.append(f"  ... and {shown - _PARAMETERS_SHOWN} more parameters")
    lines += [
        "",
        "Features made with different settings cannot be compared. Give another save_dir for the new "
        "settings, or ask for the stored ones to go on with this store.",
    ]
    raise FingerprintError("\n".join(lines))


def check_integer(value: object, *, name: str, smallest: int) -> None:
    """Nothing if `value` is an integer (no bool) of at least `smallest`.

    Raises:
        InputError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
        raise InputError(f"{name} must be an integer of at least {smallest}; got {value!r}.")


def _json_values(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy with tuples as lists, so that a header read back equals the one that was written."""
    if not isinstance(values, Mapping):
        raise InputError(f"header field {name} must be a mapping; got {type(values).__name__}.")
    try:
        out: dict[str, Any] = json.loads(json.dumps(dict(values), allow_nan=False, sort_keys=True))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"header field {name} must hold only finite JSON values ({error}); got {values!r}."
        ) from error
    return out


def _differences(name: str, stored: Any, asked: Any) -> Iterable[Difference]:
    if isinstance(stored, dict) and isinstance(asked, dict):
        for key in [*stored, *(key for key in asked if key not in stored)]:
            yield from _differences(f"{name}.{key}", stored.get(key, ABSENT), asked.get(key, ABSENT))
    elif stored != asked or isinstance(stored, bool) != isinstance(asked, bool):
        yield name, stored, asked


def _short(value: Any) -> str:
    text = value if value is ABSENT else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _VALUE_WIDTH else f"{text[: _VALUE_WIDTH - 4]} ..."
