"""Reports: one HTML file that says which training data made the model do this.

report = Report(Summary("My model"), (TargetsSection(cards), Provenance({"seed": 0}), HowToRead()))
write_report(report, "report.html")
"""

from trak.report.attribution import attribution_report, build_attribution_report, ranked_errors
from trak.report.build import example_of, ranking_report, target_cards
from trak.report.data import (
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
)
from trak.report.html import render_html, write_report
from trak.report.serialize import to_dict, to_json

__all__ = [
    "Example",
    "HowToRead",
    "Influence",
    "LdsScatter",
    "LdsSection",
    "MethodLds",
    "MislabelCurve",
    "MislabelSection",
    "Provenance",
    "Report",
    "ScoresSection",
    "Summary",
    "Suspect",
    "TargetCard",
    "TargetsSection",
    "Tile",
    "attribution_report",
    "build_attribution_report",
    "example_of",
    "ranked_errors",
    "ranking_report",
    "render_html",
    "target_cards",
    "to_dict",
    "to_json",
    "write_report",
]
