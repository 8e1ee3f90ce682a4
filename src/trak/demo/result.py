"""What the demo found, as values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trak.evaluation import LdsResult, MislabelResult


@dataclass(frozen=True, eq=False)
class DemoResult:
    """The demo's figures. `os.fspath(result)` is the report's path.

    Attributes:
        report: the HTML file.
        lds: by method, "TRAK" first.
        mislabels: by ranking, "TRAK self-influence" first.
        accuracy: share of the test images that the ensemble of checkpoints gets right.
        seconds: by stage.
    """

    report: Path
    lds: Mapping[str, LdsResult]
    mislabels: Mapping[str, MislabelResult]
    accuracy: float
    seconds: Mapping[str, float]

    def __fspath__(self) -> str:
        """The report's path."""
        return str(self.report)

    def to_dict(self) -> dict[str, Any]:
        """Figures as JSON values."""
        return {
            "report": str(self.report),
            "accuracy": self.accuracy,
            "lds": {
                name: {"mean": one.mean, "low": one.low, "high": one.high} for name, one in self.lds.items()
            },
            "mislabels": {
                name: {
                    "auc": one.auc,
                    "low": one.low,
                    "high": one.high,
                    "found_in_first_tenth": one.found_at(0.1),
                }
                for name, one in self.mislabels.items()
            },
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
        }

    def save(self, path: Path) -> DemoResult:
        """Write `to_dict()` as JSON and return itself."""
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        return self

    def __str__(self) -> str:
        """The figures as a few lines of text."""
        lines = [f"Test accuracy of the ensemble: {self.accuracy:.1%}", ""]
        lines.append("Linear datamodeling score (does it predict retraining?)")
        lines += [
            f"  {name:<20} {one.mean:6.3f}  [{one.low:.3f}, {one.high:.3f}]" for name, one in self.lds.items()
        ]
        lines += ["", "Finding corrupted labels (area under the ROC curve; found in the first tenth)"]
        lines += [
            f"  {name:<20} {one.auc:6.3f}  [{one.low:.3f}, {one.high:.3f}]  {one.found_at(0.1):.0%}"
            for name, one in self.mislabels.items()
        ]
        stages = ", ".join(f"{name} {value:.0f} s" for name, value in self.seconds.items())
        return "\n".join([*lines, "", f"Took {sum(self.seconds.values()):.0f} s ({stages})"])
