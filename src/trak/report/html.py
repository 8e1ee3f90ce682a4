"""A report as one HTML file that needs nothing beside it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trak._version import __version__
from trak.errors import InputError
from trak.report import figures, images, numbers
from trak.report.data import (
    Example,
    LdsSection,
    MislabelSection,
    Report,
    Section,
    TargetCard,
)
from trak.report.dependencies import require
from trak.report.serialize import to_json

if TYPE_CHECKING:
    from jinja2 import Environment

SMALL_IMAGE = 96
"""Images up to this many pixels wide and high are magnified with hard edges."""
SHOWN_CHARACTERS = 240
"""Longer texts are cut near here; the rest is one click away."""


def write_report(report: Report, path: str | os.PathLike[str]) -> Path:
    """Write the report as one HTML file. The file appears whole or not at all.

    Returns:
        The path written.

    Raises:
        MissingDependencyError: jinja2, matplotlib or pillow is not installed.
        InputError: an image or text cannot be shown, or the folder does not exist.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file, such as {path / 'report.html'}")
    if not path.parent.is_dir():
        raise InputError(
            f"the report cannot be written to {path}: there is no folder {path.parent}; create it first"
        )
    _write_atomically(path, render_html(report).encode("utf-8"))
    return path


def render_html(report: Report) -> str:
    """The report as HTML text; see `write_report`."""
    require("jinja2", "matplotlib", "PIL")
    from markupsafe import Markup

    template = _environment().get_template("report.html.j2")
    return template.render(
        report=report,
        sections=list(_with_ids(report.sections)),
        version=__version__,
        data=Markup(_for_script(to_json(report, pixels=False))),
    )


def split_text(text: str, shown: int = SHOWN_CHARACTERS) -> tuple[str, str]:
    """(what is shown, the rest): cut between words if there is a gap near the limit. The rest is empty for short texts."""
    if len(text) <= shown + shown // 4:
        return text, ""
    gap = max(text.rfind(space, shown // 2, shown) for space in (" ", "\n", "\t"))
    cut = gap if gap > 0 else shown
    return text[:cut].rstrip(), text[cut:].strip()


def lds_sentence(section: LdsSection) -> str:
    """What was done, with its numbers, in a sentence."""
    models = "Models" if section.num_models is None else f"{section.num_models} models"
    subsets = "random subsets" if section.num_subsets is None else f"{section.num_subsets} random subsets"
    share = (
        ""
        if section.subset_fraction is None
        else f", each {numbers.percent(section.subset_fraction)} of the training set"
    )
    targets = "over targets" if section.num_targets is None else f"over {section.num_targets} targets"
    return (
        f"{models} were retrained on {subsets}{share}. The LDS is the rank correlation between their outputs and those "
        f"that the scores predict, averaged {targets}."
    )


def mislabel_sentence(section: MislabelSection) -> str:
    """How many labels were wrong, in a sentence; empty where that is not known."""
    if section.num_corrupted is None:
        return ""
    of = "" if section.num_rows is None else f" of {section.num_rows}"
    share = f" ({numbers.percent(section.num_corrupted / section.num_rows)})" if section.num_rows else ""
    return (
        f"{section.num_corrupted}{of} training labels{share} were changed to a wrong class before training."
    )


def flat(entries: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """(name, text) pairs; nested mappings give dotted names, sequences one line."""
    for name, value in entries.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _as_text(value)


def _as_text(value: Any) -> str:
    if value is None:
        return numbers.NO_NUMBER
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}".replace("-", numbers.MINUS)
    if isinstance(value, (list, tuple, set, frozenset)):
        return ", ".join(_as_text(entry) for entry in value) or numbers.NO_NUMBER
    return str(value)


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("trak.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        signed=numbers.signed,
        spread=lambda value: numbers.number(value, 1),
        fixed=numbers.fixed,
        percent=numbers.percent,
        grouped=lambda count: f"{count:,}".replace(",", "\N{NARROW NO-BREAK SPACE}"),
        image_uri=lambda example, side: images.data_uri(
            example.content, example.value_range, longest_side=side
        ),
        is_small=lambda example: max(images.size(example.content)) <= SMALL_IMAGE,
        any_image=lambda entries: any(entry.example.kind == "image" for entry in entries),
        split_text=split_text,
        largest_score=largest_score,
        card_words=card_words,
        lds_sentence=lds_sentence,
        mislabel_sentence=mislabel_sentence,
        flat=flat,
        histogram=lambda section: Markup(figures.score_histogram(section.edges, section.counts)),
        lds_bars=lambda section: Markup(figures.lds_bars(section.methods)),
        lds_scatter=lambda scatter: Markup(figures.lds_scatter(scatter)),
        mislabel_curve=lambda section: Markup(figures.mislabel_curve(section.curves)),
    )
    return environment


def largest_score(card: TargetCard) -> float:
    """The largest |score| of the card: the full length of its bars."""
    return max((abs(one.score) for one in card.proponents + card.opponents), default=0.0)


def card_words(card: TargetCard) -> str:
    """What the filter above the cards searches: rows, labels, notes, and the start of texts, in lower case."""
    words = [f"target {card.index}", card.prediction, card.truth, card.note]
    shown: list[Example] = [card.example]
    for one in card.proponents + card.opponents:
        words += [f"row {one.row}", one.note]
        shown.append(one.example)
    for example in shown:
        words += [example.label, example.caption]
        words.append(example.content[:SHOWN_CHARACTERS] if example.kind == "text" else None)
    # Each word once: the attribute is for searching, not for reading.
    unique = dict.fromkeys(" ".join(word for word in words if word).lower().split())
    return " ".join(unique)


def _with_ids(sections: Iterable[Section]) -> Iterable[tuple[str, Section]]:
    """(id, section): the kind, numbered from the second of its kind on."""
    seen: dict[str, int] = {}
    for section in sections:
        if not hasattr(section, "kind"):
            raise InputError(
                f"a report is made of sections such as TargetsSection; got {type(section).__name__}"
            )
        seen[section.kind] = seen.get(section.kind, 0) + 1
        yield (section.kind if seen[section.kind] == 1 else f"{section.kind}-{seen[section.kind]}"), section


def _for_script(json_text: str) -> str:
    """JSON that may stand in a <script> element: no text of an example can end the element."""
    escapes = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
    for character, escape in escapes.items():
        json_text = json_text.replace(character, escape)
    return json_text


def _write_atomically(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes files private; a report is for showing around, as far as the umask allows.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
