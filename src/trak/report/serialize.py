"""A report as JSON: the same values that the page shows."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from trak._version import __version__
from trak.report import images
from trak.report.data import Example, Report

FORMAT = 1
"""Raised whenever the names or the meaning of the JSON change."""


def to_json(report: Report, *, pixels: bool = True, indent: int | None = None) -> str:
    """The report as JSON text.

    Sections are objects with a "kind" and the fields of their dataclass. Numbers that are not finite become null.

    Args:
        report: the report.
        pixels: images as PNG data URIs. Without them (as in the HTML, which has them already) only their size is told.
        indent: spaces per level; None gives one line.
    """
    return json.dumps(to_dict(report, pixels=pixels), indent=indent, allow_nan=False, ensure_ascii=False)


def to_dict(report: Report, *, pixels: bool = True) -> dict[str, Any]:
    """As `to_json`, as plain dicts, lists, strings and numbers."""
    return {
        "format": FORMAT,
        "trak": __version__,
        "summary": _plain(report.summary, pixels),
        "sections": [{"kind": section.kind, **_plain(section, pixels)} for section in report.sections],
    }


def _plain(value: Any, pixels: bool) -> Any:
    if isinstance(value, Example):
        return _example(value, pixels)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name), pixels) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, pixels) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(entry, pixels) for entry in value]
    return _scalar(value)


def _scalar(value: Any) -> Any:
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()  # numpy and torch scalars
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def _example(example: Example, pixels: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {"kind": example.kind, "label": example.label, "caption": example.caption}
    if example.kind == "text":
        shown["text"] = example.content
    if example.kind == "image":
        shown["width"], shown["height"] = images.size(example.content)
        if pixels:
            shown["image"] = images.data_uri(example.content, example.value_range)
    return shown
