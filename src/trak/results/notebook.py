"""An attribution as a table in a notebook."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from trak.results.attribution import Attribution


def html_table(attribution: Attribution, *, k: int, max_targets: int) -> str:
    """Strongest proponents and opponents of the first targets."""
    shown = torch.arange(min(max_targets, attribution.num_targets))
    chosen = attribution.scores.select_targets(shown)
    width = min(k, attribution.num_train)
    sides = []
    for ranking in chosen.extremes(width):
        several = len(attribution.members) > 1
        errors = attribution.standard_error.select_targets(shown).at(ranking.rows) if several else None
        sides.append((ranking, errors))
    rows = []
    for target in range(chosen.num_targets):
        cells = [
            _cells(ranking.rows[target], ranking.scores[target], None if errors is None else errors[target])
            for ranking, errors in sides
        ]
        rows.append(f"<tr><th>{target}</th><td>{cells[0]}</td><td>{cells[1]}</td></tr>")
    more = (
        f"<p>… and {attribution.num_targets - chosen.num_targets} more targets</p>"
        if chosen.num_targets < attribution.num_targets
        else ""
    )
    head = html.escape(repr(attribution))
    return (
        f"<div><p><b>{head}</b></p><table><thead><tr><th>target</th><th>proponents: row (score)</th><th>opponents: row (score)</th></tr>"
        f"</thead><tbody>{''.join(rows)}</tbody></table>{more}</div>"
    )


def _cells(rows: Tensor, scores: Tensor, errors: Tensor | None) -> str:
    spread = [""] * len(rows) if errors is None else [f"&nbsp;±&nbsp;{float(error):.1g}" for error in errors]
    parts = zip(rows, scores, spread)
    return ", ".join(f"{int(row)}&nbsp;({float(score):+.3g}{error})" for row, score, error in parts)
