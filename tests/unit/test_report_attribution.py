from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from trak.errors import InputError
from trak.report import Example, build_attribution_report, example_of, ranking_report, target_cards
from trak.report.data import Provenance, ScoresSection, TargetsSection
from trak.results import Attribution
from trak.scores import ArrayScores

NAMES = ("cat", "dog", "frog")


@dataclass
class Rows:
    """A row source: `example(row)` is a batch of one."""

    inputs: torch.Tensor
    labels: torch.Tensor
    asked: list = field(default_factory=list)

    def example(self, row):
        self.asked.append(row)
        return self.inputs[row : row + 1], self.labels[row : row + 1]


def attribution(num_train=30, num_targets=25, **more):
    scores = np.random.default_rng(0).normal(size=(num_train, num_targets)).astype(np.float32)
    return Attribution(
        ArrayScores(scores), outputs=torch.linspace(-1, 1, num_targets), info={"method": "TRAK"}, **more
    )


def section(report, kind):
    return next(one for one in report.sections if isinstance(one, kind))


def test_cards_are_the_rankings():
    of = attribution()
    report = build_attribution_report(of, k=4, targets=[3, 11])
    cards = section(report, TargetsSection).cards
    top, bottom = of.top(4), of.bottom(4)
    assert [card.index for card in cards] == [3, 11]
    for card in cards:
        assert [one.row for one in card.proponents] == top.rows[card.index].tolist()
        assert [one.score for one in card.proponents] == top.scores[card.index].tolist()
        assert [one.row for one in card.opponents] == bottom.rows[card.index].tolist()
        assert card.output == float(of.outputs[card.index])
    assert section(report, Provenance).entries == {"method": "TRAK"}


def test_scores_of_several_checkpoints_have_their_standard_errors():
    members = tuple(
        ArrayScores(np.random.default_rng(seed).normal(size=(30, 5)).astype(np.float32)) for seed in (1, 2, 3)
    )
    mean = ArrayScores(np.mean([member.tensor().numpy() for member in members], axis=0))
    of = Attribution(mean, members=members)
    report = build_attribution_report(of, k=4, targets=[2])
    shown = section(report, TargetsSection)
    entries = (*shown.cards[0].proponents, *shown.cards[0].opponents)
    assert [one.error for one in entries] == [
        float(of.standard_error.tensor()[one.row, 2]) for one in entries
    ]
    assert shown.has_errors
    assert not section(build_attribution_report(attribution(), targets=[2]), TargetsSection).has_errors


def test_first_targets_are_shown_where_nobody_says_which():
    report = build_attribution_report(attribution(num_targets=25))
    assert [card.index for card in section(report, TargetsSection).cards] == list(range(20))
    assert report.summary.tiles[1].detail == "20 shown here"


def test_histogram_counts_the_scores_of_the_shown_targets():
    histogram = section(build_attribution_report(attribution(), targets=[0, 5]), ScoresSection)
    assert sum(histogram.counts) == 2 * 30


def test_examples_come_from_the_rows_once_each_with_names():
    rows = Rows(torch.rand(30, 3, 8, 8), torch.arange(30) % 3)
    targets = Rows(torch.rand(25, 3, 8, 8), torch.arange(25) % 3)
    report = build_attribution_report(attribution(train_rows=rows, target_rows=targets), class_names=NAMES)
    card = section(report, TargetsSection).cards[1]
    assert card.example.kind == "image"
    assert card.example.label == "dog"
    assert card.prediction is None
    one = card.proponents[0]
    assert one.example.label == NAMES[one.row % 3]
    np.testing.assert_array_equal(one.example.content, rows.inputs[one.row])
    assert len(rows.asked) == len(set(rows.asked))


def test_predictions_are_set_beside_labels():
    targets = Rows(torch.rand(25, 8, 8), torch.arange(25) % 3)
    said = [0] * 25
    report = build_attribution_report(attribution(target_rows=targets), class_names=NAMES, predictions=said)
    cards = section(report, TargetsSection).cards
    assert (cards[0].prediction, cards[0].truth, cards[0].is_wrong) == ("cat", "cat", False)
    assert (cards[1].prediction, cards[1].truth, cards[1].is_wrong) == ("cat", "dog", True)


def test_show_functions_go_first():
    report = build_attribution_report(
        attribution(train_rows=Rows(torch.rand(30, 8, 8), torch.zeros(30))),
        show_train=lambda row: f"text of row {row}",
        show_target=lambda row: Example(label=f"target {row}"),
    )
    card = section(report, TargetsSection).cards[2]
    assert card.example.label == "target 2"
    assert card.proponents[0].example.content == f"text of row {card.proponents[0].row}"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"targets": [25]}, "targets 0 to 24; got 25"),
        ({"targets": [-1]}, "got -1"),
        ({"k": 0}, "at least 1; got 0"),
        ({"predictions": [1]}, "25 targets; got 1"),
        ({"show_train": ["text"] * 30}, "show_train is a function .* got list"),
        ({"show_target": "text"}, "show_target is a function .* got str"),
    ],
)
def test_wrong_options_are_refused(options, match):
    with pytest.raises(InputError, match=match):
        build_attribution_report(attribution(), **options)


def test_attribution_writes_it(tmp_path):
    path = attribution(num_targets=3).report(tmp_path / "report.html", title="Mine", k=2)
    text = path.read_text()
    assert "<h1>Mine</h1>" in text
    assert text.count("<article") == 3


@pytest.mark.parametrize(
    ("item", "kind", "label"),
    [
        ((torch.rand(3, 8, 8), torch.tensor(1)), "image", "dog"),
        ((np.zeros((8, 8), np.uint8), 2), "image", "frog"),
        ({"text": "hello", "label": 0}, "text", "cat"),
        ({"input_ids": torch.arange(9), "labels": torch.tensor(9)}, "none", "class 9"),
        ((torch.rand(20), 1), "none", "dog"),
        ((torch.rand(20), 0.5), "none", None),
        ("bare text", "text", None),
        (torch.arange(500).reshape(20, 25), "none", None),
        (Example(label="ready"), "none", "ready"),
    ],
)
def test_example_of(item, kind, label):
    example = example_of(item, NAMES)
    assert (example.kind, example.label) == (kind, label)


def test_only_scores_of_their_sign_are_proponents_and_opponents():
    (card,) = target_cards(
        (torch.tensor([[0, 1, 2]]), torch.tensor([[0.5, 0.0, -0.1]])),
        (torch.tensor([[2, 1, 0]]), torch.tensor([[-0.1, 0.0, 0.5]])),
        indices=[42],
    )
    assert card.index == 42
    assert [one.row for one in card.proponents] == [0]
    assert [one.row for one in card.opponents] == [2]


def test_rankings_must_fit_together():
    good = (np.zeros((2, 3), int), np.zeros((2, 3)))
    with pytest.raises(InputError, match="shape"):
        target_cards((np.zeros((2, 3)), np.zeros((2, 2))))
    with pytest.raises(InputError, match="2 targets and opponents for 1"):
        target_cards(good, (np.zeros((1, 3), int), np.zeros((1, 3))))


def test_an_attribution_without_targets_has_a_report_without_cards():
    report = ranking_report((), num_train=5, num_targets=0)
    assert not [one for one in report.sections if isinstance(one, TargetsSection)]
