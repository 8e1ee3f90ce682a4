"""The kinds by name, and a projection back from its fingerprint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from trak.errors import ProjectionError
from trak.projection.base import Projection
from trak.projection.eigenbasis import Eigenbasis
from trak.projection.gaussian import Gaussian
from trak.projection.identity import Identity
from trak.projection.kronecker import Kronecker
from trak.projection.rademacher import Rademacher
from trak.projection.sparse import Sparse
from trak.projection.whitened import Whitened

KINDS: Mapping[str, type[Projection]] = MappingProxyType(
    {
        "gaussian": Gaussian,
        "identity": Identity,
        "kronecker": Kronecker,
        "rademacher": Rademacher,
        "sparse": Sparse,
        "eigenbasis": Eigenbasis,
        "whitened": Whitened,
    }
)


def from_fingerprint(fingerprint: Mapping[str, Any]) -> Projection:
    """The projection whose `fingerprint()` this is, as read back from a manifest.

    Raises:
        ProjectionError: a kind that is not built in, a version whose numbers this release does not draw, or
            options that the kind does not have or refuses.
    """
    kind = fingerprint.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ProjectionError(
            f"unknown projection kind {kind!r}, expected one of {', '.join(KINDS)}; "
            "a projection of your own has to be given as an object"
        )
    options = {option: value for option, value in fingerprint.items() if option not in ("kind", "version")}
    if isinstance(options.get("inner"), Mapping):
        options["inner"] = from_fingerprint(options["inner"])
    known = {field.name for field in fields(KINDS[kind])}  # type: ignore[arg-type]
    expected = {option for option in known if option != "cache_bytes"}
    if set(options) != expected:
        raise ProjectionError(
            f"fingerprint of projection {kind!r} has options {sorted(options)}, expected {sorted(expected)}; "
            "it was written by another release, or changed since"
        )
    projection = KINDS[kind](**options)
    if fingerprint.get("version") != projection.version:
        raise ProjectionError(
            f"projection {kind!r} was drawn by version {fingerprint.get('version')} of its generator, this "
            f"release draws version {projection.version}; the numbers differ, so use the release "
            "that wrote them or featurize again"
        )
    return projection
