"""From plain values (rankings, data sets, names) to the standard report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from trak.errors import InputError
from trak.report.data import (
    Example,
    HowToRead,
    Influence,
    Provenance,
    Report,
    ScoresSection,
    Section,
    Summary,
    TargetCard,
    TargetsSection,
    Tile,
)
from trak.report.numbers import signed

TITLE = "Which training data made the model do this?"
TEXT_KEYS = ("text", "sentence", "content", "prompt")
IMAGE_KEYS = ("image", "pixel_values", "img")
LABEL_KEYS = ("label", "labels", "target")


def example_of(item: Any, class_names: Sequence[str] | None = None) -> Example:
    """What can be shown of an item of a data set.

    An (input, label) pair, a mapping with an image, text or label in it, or a bare input. Images are arrays and tensors
    that have the shape of one, or PIL images; texts are strings. Anything else is shown by its label alone.

    Args:
        item: what `dataset[row]` gives.
        class_names: names for integer labels.
    """
    if isinstance(item, Example):
        return item
    content, label = _parts(item)
    named = _label(label, class_names)
    if isinstance(content, str):
        return Example("text", content, label=named)
    if _looks_like_image(content):
        return Example("image", content, label=named)
    return Example(label=named)


def target_cards(
    proponents: tuple[Any, Any],
    opponents: tuple[Any, Any] | None = None,
    *,
    targets: Sequence[int] | None = None,
    indices: Sequence[int] | None = None,
    train_example: Callable[[int], Example] = lambda row: Example(),
    target_example: Callable[[int], Example] = lambda index: Example(),
    outputs: Any = None,
    predictions: Sequence[str] | None = None,
    truths: Sequence[str] | None = None,
    note: Callable[[int], str | None] = lambda row: None,
    errors: tuple[Any, Any] | None = None,
) -> tuple[TargetCard, ...]:
    """Cards from rankings. Only positive scores make proponents, only negative ones opponents.

    Args:
        proponents: (rows [T, k], scores [T, k]), best first.
        opponents: (rows [T, k], scores [T, k]), lowest first.
        targets: which of the T targets get a card; None for all.
        indices: the number on each target's card, [T], where the rankings are for a selection of targets; None for
            its place in the rankings.
        train_example: from a training row to what is shown of it.
        target_example: from a target's place in the rankings to what is shown of it.
        outputs: f of each target, [T].
        predictions: what the model says of each target, in words, of length T.
        truths: what is right, in words, of length T.
        note: a remark on a training row, or None.
        errors: standard errors of the proponents' and of the opponents' scores, [T, k] each; None where there are none.

    Raises:
        InputError: rows and scores that do not fit together.
    """
    top_rows, top_scores = _ranking(proponents, "proponents")
    low_rows, low_scores = (
        _ranking(opponents, "opponents") if opponents is not None else (top_rows[:, :0], top_scores[:, :0])
    )
    if len(low_rows) != len(top_rows):
        raise InputError(
            f"proponents are for {len(top_rows)} targets and opponents for {len(low_rows)}; expected the same"
        )

    def influences(rows: Any, scores: Any, errors_k: Any, sign: int) -> tuple[Influence, ...]:
        spread = [None] * len(rows) if errors_k is None else [float(error) for error in errors_k]
        return tuple(
            Influence(int(row), float(score), train_example(int(row)), note(int(row)), error)
            for row, score, error in zip(rows, scores, spread)
            if sign * score > 0
        )

    top_errors, low_errors = errors if errors is not None else (None, None)

    return tuple(
        TargetCard(
            index=int(target if indices is None else indices[target]),
            example=target_example(int(target)),
            output=None if outputs is None else float(outputs[target]),
            prediction=None if predictions is None else predictions[target],
            truth=None if truths is None else truths[target],
            proponents=influences(
                top_rows[target], top_scores[target], None if top_errors is None else top_errors[target], +1
            ),
            opponents=influences(
                low_rows[target], low_scores[target], None if low_errors is None else low_errors[target], -1
            ),
        )
        for target in (range(len(top_rows)) if targets is None else targets)
    )


def ranking_report(
    cards: Sequence[TargetCard],
    *,
    num_train: int,
    num_targets: int,
    title: str | None = None,
    lead: str | None = None,
    tiles: Sequence[Tile] = (),
    histogram: ScoresSection | None = None,
    info: Mapping[str, Any] | None = None,
    command: str | None = None,
    more: Sequence[Section] = (),
    output: str | None = None,
) -> Report:
    """The standard report: key figures, a card per target, all scores at a glance, how to read it, how it was made.

    Args:
        cards: see `target_cards`.
        num_train: training rows of the whole attribution.
        num_targets: its targets, of which the cards may show a part.
        title: the head.
        lead: the paragraph below it; None says what was attributed.
        tiles: key figures after the two sizes.
        histogram: see `ScoresSection.from_scores`.
        info: provenance, name to value.
        command: the line that makes the report again.
        more: further sections, after the cards.
        output: what f is, in a sentence.
    """
    if lead is None:
        lead = (
            f"Scores of {num_train:,} training examples for {num_targets:,} targets. A positive score says that the "
            "training example raised the model output at the target, a negative one that it lowered it."
        )
    figures = [
        Tile("Training examples", f"{num_train:,}"),
        Tile(
            "Targets", f"{num_targets:,}", None if len(cards) == num_targets else f"{len(cards)} shown here"
        ),
        *tiles,
    ]
    strongest = max(
        (abs(one.score) for card in cards for one in card.proponents + card.opponents), default=None
    )
    if strongest is not None and len(figures) < 4:
        best = max((one.score for card in cards for one in card.proponents), default=None)
        worst = min((one.score for card in cards for one in card.opponents), default=None)
        figures.append(
            Tile(
                "Strongest scores", f"{signed(worst)} … {signed(best)}", "in units of f, over the cards shown"
            )
        )
    sections: list[Section] = [TargetsSection(tuple(cards))] if cards else []
    sections += list(more)
    if histogram is not None:
        sections.append(histogram)
    sections.append(HowToRead(output=output))
    if info or command:
        sections.append(Provenance(dict(info or {}), command))
    return Report(Summary(title or TITLE, lead, tuple(figures)), tuple(sections))


def _ranking(ranking: tuple[Any, Any], name: str) -> tuple[Any, Any]:
    rows, scores = (_array(part) for part in ranking)
    if rows.ndim != 2 or rows.shape != scores.shape:
        raise InputError(
            f"{name} are (rows, scores), both of shape [targets, k]; got {list(rows.shape)} and {list(scores.shape)}"
        )
    return rows, scores


def _array(values: Any) -> Any:
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


def _parts(item: Any) -> tuple[Any, Any]:
    """(content, label) of an item."""
    if isinstance(item, Mapping):
        content = next((item[key] for key in TEXT_KEYS + IMAGE_KEYS if key in item), None)
        return content, next((item[key] for key in LABEL_KEYS if key in item), None)
    if isinstance(item, (tuple, list)) and item:
        return item[0], item[1] if len(item) > 1 else None
    return item, None


def _label(label: Any, class_names: Sequence[str] | None) -> str | None:
    if label is None or isinstance(label, str):
        return label
    array = _array(label)
    if array.size != 1 or array.dtype.kind not in "iub":
        return None
    index = int(array.reshape(()))
    if class_names is None:
        return f"class {index}"
    return class_names[index] if 0 <= index < len(class_names) else f"class {index}"


def _looks_like_image(content: Any) -> bool:
    """[H, W], or three axes of which one end is channels; both sides at least 4 pixels, so that feature vectors do not pass."""
    if hasattr(content, "getbands"):
        return True
    shape = tuple(getattr(content, "shape", ()))
    if len(shape) == 2:
        return min(shape) >= 4 and _may_be_grey_values(content)
    if len(shape) == 3:
        sides = shape[1:] if shape[0] in (1, 3, 4) else shape[:2] if shape[-1] in (1, 3, 4) else (0,)
        return min(sides) >= 4 and _may_be_grey_values(content)
    return False


def _may_be_grey_values(content: Any) -> bool:
    """Whether the numbers can be grey values: floats, booleans, or integers from 0 to 255 (token ids seldom are)."""
    values = _array(content)
    if values.dtype.kind in "fb":
        return True
    return values.dtype.kind in "iu" and bool(values.min() >= 0 and values.max() <= 255)
