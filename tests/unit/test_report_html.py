import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import trak.report.html as html_room
from trak.errors import InputError, MissingDependencyError
from trak.report import (
    Example,
    HowToRead,
    Influence,
    LdsScatter,
    LdsSection,
    MethodLds,
    MislabelCurve,
    MislabelSection,
    Provenance,
    Report,
    ScoresSection,
    Summary,
    Suspect,
    TargetCard,
    TargetsSection,
    Tile,
    dependencies,
    render_html,
    to_dict,
    write_report,
)
from trak.report.html import lds_sentence, split_text

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \u2028"
IMAGE = Example("image", np.arange(64, dtype=np.uint8).reshape(8, 8), label="cat", caption="a <caption>")
VOID = {"meta", "link", "img", "input", "br"}


class Page(HTMLParser):
    """Elements with their attributes; checks that they are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.words = [], [], []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def whole_report():
    text = Example("text", "word " * 200 + "the end", label=EVIL)
    cards = (
        TargetCard(
            7,
            IMAGE,
            1.25,
            "dog",
            "cat",
            (Influence(1, 0.5, IMAGE, EVIL),),
            (Influence(2, -0.25, IMAGE),),
            note=EVIL,
        ),
        TargetCard(
            8, text, -0.5, "a", "a", (Influence(3, 0.125, text),), (Influence(4, -0.0625, Example()),)
        ),
        TargetCard(9, Example(label="bare"), proponents=(), opponents=(Influence(5, -1e-9),)),
    )
    return Report(
        Summary(EVIL, EVIL, (Tile("Rows", "1,000", EVIL), Tile("LDS", "0.34"))),
        (
            TargetsSection(cards),
            TargetsSection(cards[:1], title="More"),
            ScoresSection.from_scores([0.5, -0.25, 0.0]),
            LdsSection(
                (MethodLds("TRAK", 0.34, 0.3, 0.4, EVIL), MethodLds("random", 0.0)),
                (LdsScatter("t", (1.0, 2.0), (2.0, 1.0), -1.0),),
                num_subsets=10,
                num_models=20,
                num_targets=5,
                subset_fraction=0.5,
            ),
            MislabelSection(
                (MislabelCurve("TRAK", (0.0, 0.1, 1.0), (0.0, 0.75, 1.0), 0.9),),
                (
                    Suspect(1, 3.0, IMAGE, "dog", "cat"),
                    Suspect(2, 2.0, IMAGE, "cat", "cat"),
                    Suspect(3, 1.0, text, "x"),
                ),
                num_rows=100,
                num_corrupted=10,
            ),
            HowToRead(output="f is <special>"),
            Provenance(
                {"model": EVIL, "projection": {"kind": "sparse", "dim": 64}, "empty": None, "ok": True}, EVIL
            ),
        ),
    )


@pytest.fixture(scope="module")
def text():
    return render_html(whole_report())


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_nothing_is_loaded_from_anywhere(text, page):
    for tag in ("img", "script", "iframe", "source", "video", "audio", "object", "embed"):
        for attributes in page.all(tag):
            assert attributes.get("src", "data:").startswith("data:")
    assert all(attributes["href"].startswith("data:") for attributes in page.all("link"))
    css = text[text.index("<style>") : text.index("</style>")]
    assert "@import" not in css
    assert "url(" not in css
    assert all(part.startswith("url(#") for part in re.findall(r"url\([^)]*\)", text))
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_text_of_examples_never_becomes_markup(text, page):
    assert "alert(1)" not in "".join(re.findall(r"<script[^>]*>(?!\{)(.*?)</script>", text, re.S))
    assert all("onerror" not in attributes for _, attributes in page.elements)
    assert len(page.all("script")) == 2
    assert not [tag for tag, _ in page.elements if tag in ("caption>", "special")]


def test_the_same_data_is_in_it_as_json(text):
    found = re.search(r'<script type="application/json" id="report-data">(.*?)</script>', text, re.S)
    assert json.loads(found[1]) == to_dict(whole_report(), pixels=False)


def test_images_have_words_and_small_ones_hard_edges(page):
    images = page.all("img")
    assert images
    assert all(attributes["alt"] for attributes in images)
    assert all("pixels" in attributes["class"] for attributes in images)
    assert {"Target 7, cat", "Training row 1, cat", "Training row 1, labelled dog"} <= {
        a["alt"] for a in images
    }


def test_large_images_are_smooth():
    large = Example("image", np.zeros((200, 120), np.uint8))
    report = Report(Summary("x"), (TargetsSection((TargetCard(0, large),)),))
    assert all("pixels" not in attributes["class"] for attributes in Page(render_html(report)).all("img"))


def test_headings_go_down_step_by_step_and_ids_are_unique(page):
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:]))  # noqa: RUF007
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [a["href"][1:] for a in page.all("a") if a["href"].startswith("#")]
    assert set(links) <= set(ids)


def test_it_says_what_it_shows(page):
    words = " ".join(" ".join(page.words).split())
    for expected in (
        "predicted dog ✗ wrong",
        "predicted a ✓ right",
        "output f +1.25",
        "+0.500",
        "−0.250",
        "None of the scores has this sign.",
        "20 models were retrained on 10 random subsets, each 50 % of the training set",
        "0.300 to 0.400",
        "10 of 100 training labels",
        "75.0 %",
        "✓ found",
        "label was right",
        "projection.kind sparse",
        "f is <special>",
        "arXiv:2303.14186",
    ):
        assert expected in words, expected


def test_a_lead_takes_the_place_of_the_sentence():
    section = LdsSection((MethodLds("TRAK", 0.3),), lead="As I said.", num_models=12345)
    text = render_html(Report(Summary("x"), (section,)))
    assert "As I said." in text
    assert "12345 models" not in text
    assert "12345 models" in lds_sentence(section)


def test_long_texts_fold_and_lose_nothing(page):
    details = page.all("details")
    assert len(details) >= 3
    head, rest = split_text("word " * 200 + "the end")
    assert head.endswith("word")
    assert rest.endswith("the end")
    assert (head + " " + rest).split() == ("word " * 200 + "the end").split()
    assert split_text("short") == ("short", "")
    assert "".join(split_text("x" * 1000)) == "x" * 1000


def test_without_javascript_everything_is_there(text, page):
    without = re.sub(r"<script>.*?</script>", "", text, flags=re.S)
    assert len(Page(without).all("article")) == 4
    assert all("hidden" not in attributes for tag, attributes in page.elements if tag == "article")
    assert all("hidden" in attributes for attributes in page.all("form"))


def test_one_section_is_enough_and_no_section_too():
    assert "<h1>Only</h1>" in render_html(Report(Summary("Only")))
    assert "<nav" not in render_html(Report(Summary("Only"), (HowToRead(),)))


def test_what_is_no_section_is_refused():
    with pytest.raises(InputError, match="made of sections"):
        render_html(Report(Summary("x"), ("text",)))


def test_same_report_same_bytes(text):
    assert render_html(whole_report()) == text


def test_it_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    assert write_report(whole_report(), str(path)) == path
    before = path.read_bytes()
    assert before.startswith(b"<!doctype html>")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(Report(Summary("other")), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="create it first"):
        write_report(Report(Summary("x")), tmp_path / "nowhere" / "report.html")
    with pytest.raises(InputError, match="is a folder; give the name of a file"):
        write_report(Report(Summary("x")), tmp_path)


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib", "PIL"])
def test_missing_packages_are_named(monkeypatch, missing, tmp_path):
    monkeypatch.setattr(dependencies, "_installed", lambda module: module != missing)
    with pytest.raises(MissingDependencyError, match=r"pip install 'trak-attribution\[report\]'"):
        write_report(whole_report(), tmp_path / "report.html")


# Colours


def variables(block):
    return dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6})", block))


def contrast(one, other):
    """WCAG 2 contrast ratio of two colours."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def themes():
    css = (Path(html_room.__file__).parent / "templates" / "report.css").read_text()
    light, dark, paper = (variables(block) for block in re.findall(r":root \{(.*?)\}", css, re.S))
    return {"light": light, "dark": dark, "print": paper}


@pytest.mark.parametrize("theme", ["light", "dark", "print"])
def test_colours_can_be_told_from_their_ground(theme):
    colours = themes()[theme]
    grounds = [colours[name] for name in ("--paper", "--card", "--sunk")]
    for name in ("--ink", "--ink-soft", "--positive", "--negative", "--accent", "--right"):
        assert min(contrast(colours[name], ground) for ground in grounds) >= 4.5, name
    for place in range(1, 7):
        assert contrast(colours[f"--series-{place}"], colours["--paper"]) >= 3, place


def test_figures_use_variables_that_the_page_has():
    from trak.report.figures import VARIABLES

    assert {name for name, _ in VARIABLES.values()} <= set(themes()["light"])
