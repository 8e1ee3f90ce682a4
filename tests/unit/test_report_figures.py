import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest

from trak.errors import MissingDependencyError
from trak.report import LdsScatter, MethodLds, MislabelCurve, dependencies, figures

METHODS = (
    MethodLds("TRAK $x_1$ <b>", 0.34, 0.3, 0.38),
    MethodLds("日本語", -0.02),
    MethodLds("a" * 60, 0.1, 0.05, 0.2),
)
SCATTER = LdsScatter("target 3", (1.0, 2.0, 3.0), (0.5, 0.1, 2.0), 0.5)
CURVES = tuple(MislabelCurve(f"method {i}", (0.0, 0.1, 1.0), (0.0, 0.5, 1.0), 0.8) for i in range(8))
EDGES, COUNTS = (-2.0, -1.0, 0.0, 1.0, 2.0), (1, 20_000, 300, 0)


def all_figures():
    return {
        "lds_bars": figures.lds_bars(METHODS),
        "lds_scatter": figures.lds_scatter(SCATTER),
        "mislabel_curve": figures.mislabel_curve(CURVES),
        "score_histogram": figures.score_histogram(EDGES, COUNTS),
    }


@pytest.fixture(scope="module")
def drawn():
    return all_figures()


def test_they_are_named_scalable_xml_with_unique_ids(drawn):
    seen = set()
    for svg in drawn.values():
        root = ET.fromstring(svg)
        assert root.tag.endswith("svg")
        assert "viewBox" in root.attrib
        assert not {"width", "height"} & set(root.attrib)
        assert root.attrib["role"] == "img"
        assert root.attrib["aria-label"]
        ids = re.findall(r'\bid="([^"]+)"', svg)
        assert len(ids) == len(set(ids))
        assert not seen & set(ids)
        seen |= set(ids)


def test_what_they_refer_to_is_in_them(drawn):
    for svg in drawn.values():
        ids = set(re.findall(r'\bid="([^"]+)"', svg))
        referred = re.findall(r'xlink:href="#([^"]+)"', svg) + re.findall(r"url\(#([^)]+)\)", svg)
        assert referred
        assert set(referred) <= ids


def test_colours_are_the_pages_own_and_text_is_text(drawn):
    for svg in drawn.values():
        assert "#0a0" not in svg
        assert "var(--ink, " in svg
        assert "DejaVu" not in svg
        assert "<style" not in svg
        assert "<metadata" not in svg
        assert "<text" in svg
    words = "".join(ET.fromstring(drawn["lds_bars"]).itertext())
    assert "TRAK $x_1$ <b>" in words
    assert "日本語" in words
    assert "a" * 60 + " " in drawn["lds_bars"]  # whole in the description, shortened in the drawing


def test_negative_and_positive_bars_differ(drawn):
    assert drawn["score_histogram"].count("fill: var(--negative") == 2
    assert drawn["score_histogram"].count("fill: var(--positive") == 2


def test_description_tells_the_figures(drawn):
    assert "0.340 (0.300 to 0.380)" in drawn["lds_bars"]
    assert "50% found after inspecting 10%, ROC AUC 0.800" in drawn["mislabel_curve"]
    assert "20301 scores" in drawn["score_histogram"]


def test_same_input_same_bytes(drawn):
    assert all_figures() == drawn


def test_style_is_neither_taken_from_nor_left_to_the_caller(drawn):
    with matplotlib.rc_context({"axes.facecolor": "#123456", "svg.fonttype": "path", "font.size": 30.0}):
        before = dict(matplotlib.rcParams)
        assert figures.lds_scatter(SCATTER) == drawn["lds_scatter"]
        assert dict(matplotlib.rcParams) == before


def test_pyplot_is_left_alone():
    code = (
        "import sys; from trak.report import figures, LdsScatter; "
        "figures.lds_scatter(LdsScatter('t', (1., 2.), (1., 2.))); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_degenerate_data_can_be_drawn():
    figures.lds_scatter(LdsScatter("one point", (0.0,), (0.0,)))
    figures.score_histogram((-1.0, 1.0), (0,))
    figures.mislabel_curve(())
    figures.lds_bars((MethodLds("zero", 0.0),))
    figures.lds_bars((MethodLds("nan", float("nan")),))


def test_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setattr(dependencies, "_installed", lambda module: module != "matplotlib")
    with pytest.raises(MissingDependencyError, match="matplotlib, which is not installed"):
        figures.lds_scatter(SCATTER)


def test_bars_are_where_the_numbers_are():
    svg = figures.score_histogram(tuple(np.linspace(-1, 1, 6)), (0, 0, 7, 0, 0))
    assert svg.count("fill: var(--ink-soft") >= 1
