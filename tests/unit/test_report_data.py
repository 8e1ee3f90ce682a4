import json

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from trak.errors import InputError
from trak.report import (
    Example,
    HowToRead,
    LdsScatter,
    LdsSection,
    MislabelCurve,
    MislabelSection,
    Provenance,
    Report,
    ScoresSection,
    Summary,
    TargetCard,
    TargetsSection,
    to_json,
)
from trak.report.numbers import MINUS, NO_NUMBER, fixed, number, percent, signed


@pytest.mark.parametrize(
    "make",
    [
        lambda: Example("video", None),
        lambda: Example("text", 3),
        lambda: Example("image"),
        lambda: TargetsSection(()),
        lambda: LdsSection(()),
        lambda: LdsScatter("t", (1.0,), ()),
        lambda: LdsScatter("t", (), ()),
        lambda: MislabelCurve("m", (0.0, 1.0), (0.0,)),
        lambda: MislabelSection(()),
        lambda: ScoresSection((0.0, 1.0), (1, 2)),
        lambda: ScoresSection.from_scores([]),
        lambda: ScoresSection.from_scores([1.0, float("nan")]),
    ],
)
def test_values_that_cannot_be_are_refused(make):
    with pytest.raises(InputError, match=r"got|needs"):
        make()


def test_a_card_is_wrong_only_if_both_words_are_known_and_differ():
    card = Example(label="x")
    assert TargetCard(0, card, prediction="a", truth="b").is_wrong
    assert not TargetCard(0, card, prediction="a", truth="a").is_wrong
    assert not TargetCard(0, card, prediction="a").is_wrong


def test_a_curve_is_read_between_its_points():
    curve = MislabelCurve("m", (0.05, 0.1, 0.2), (0.2, 0.4, 0.6))
    found = [curve.found_at(x) for x in (0.0, 0.025, 0.1, 0.15, 1.0)]
    assert found == pytest.approx([0.0, 0.1, 0.4, 0.5, 0.6])


@example([5e-324], 3)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.integers(1, 30))
def test_histogram_counts_every_score_around_zero(scores, bins):
    section = ScoresSection.from_scores(scores, bins=bins)
    assert sum(section.counts) == len(scores)
    assert section.edges[0] == -section.edges[-1]
    assert len(section.edges) == bins + 1


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=40), st.integers(1, 39))
def test_histogram_does_not_depend_on_blocks(scores, cut):
    values = np.asarray(scores)
    limit = float(np.abs(values).max())
    blocks = [part for part in (values[:cut], values[cut:]) if len(part)]
    assert ScoresSection.from_blocks(blocks, limit=limit) == ScoresSection.from_scores(values)


def test_histogram_of_zeros_lies_in_the_middle():
    section = ScoresSection.from_scores(np.zeros((4, 3)), bins=5)
    assert section.counts == (0, 0, 12, 0, 0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.25789, "0.258"),
        (-0.0123, f"{MINUS}0.0123"),
        (12.34, "12.3"),
        (1234.5, "1\N{NARROW NO-BREAK SPACE}234"),
        (2e-7, f"2.00e{MINUS}7"),
        (float("nan"), NO_NUMBER),
        (None, NO_NUMBER),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


def test_signs_and_columns():
    assert signed(1.5) == "+1.50"
    assert signed(-1.5) == f"{MINUS}1.50"
    assert signed(0.0) == "0"
    assert fixed(-0.0301) == f"{MINUS}0.030"
    assert percent(0.5) == "50\N{NARROW NO-BREAK SPACE}%"
    assert percent(0.57, 1) == "57.0\N{NARROW NO-BREAK SPACE}%"


def test_json_holds_all_values_and_only_json():
    report = Report(
        Summary("Title", "Lead"),
        (
            TargetsSection(
                (TargetCard(3, Example("image", torch.rand(3, 5, 7), label="cat"), output=float("nan")),)
            ),
            Provenance(
                {"steps": np.int64(4), "lr": np.float32(0.5), "nested": {"path": torch.device("cpu")}}
            ),
            HowToRead(),
        ),
    )
    values = json.loads(to_json(report))
    card = values["sections"][0]["cards"][0]
    assert [section["kind"] for section in values["sections"]] == ["targets", "provenance", "how"]
    assert (card["index"], card["output"]) == (3, None)
    assert (card["example"]["width"], card["example"]["height"]) == (7, 5)
    assert card["example"]["image"].startswith("data:image/png;base64,")
    assert values["sections"][1]["entries"] == {"steps": 4, "lr": 0.5, "nested": {"path": "cpu"}}
    assert "image" not in json.loads(to_json(report, pixels=False))["sections"][0]["cards"][0]["example"]
