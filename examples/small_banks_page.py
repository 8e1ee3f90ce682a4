"""The tables of `small_banks.py`, for the terminal and for docs/experiments/small-banks.md."""

from __future__ import annotations

from typing import Any

from experiment_page import lds_table, number, table


def section(result: dict[str, Any]) -> str:
    """Facts and tables of a result, for the terminal and the page."""
    recipe, machine = result["recipe"], result["machine"]
    lengths = ", ".join(f"{length}: {losses['unseen']:.2f}" for length, losses in result["losses"].items())
    ceiling = result["noise ceiling"]
    facts = (
        f"{result['words'][0].upper()}{result['words'][1:]}; {result['parameters']:,} parameters. N = {recipe['num_train']:,}, {result['targets']} "
        f"targets, K = {recipe['dim']:,}. Bank: {recipe['subsets']} halves, {recipe['models']} models each (seed {result['seeds']['bank']}); "
        f"{recipe['checkpoints']} checkpoints on all rows (seed {result['seeds']['checkpoints']}). Weight decay {recipe['weight_decay']:g}, "
        f"{result['epochs']} epochs: mean loss of unseen rows by epochs {lengths}; of the targets at the checkpoints "
        f"{result['loss of the targets']:.2f}. "
        + ("" if ceiling is None else f"Noise ceiling {number(ceiling)}. ")
        + f"{sum(result['processor seconds'].values()):.0f} processor seconds, one thread of {machine['processor']}, torch {machine['torch']}, "
        f"{machine['date']}."
    )
    methods = lds_table(result["methods"], "features", "`Sparse`")
    sweeps = result["effective dimensions"]
    columns = list(sweeps[0]["lds"])
    dimensions = table(
        ["LDS by effective dimension", "M", *map(str, columns), "the rule's"],
        [
            [one["features"], str(one["checkpoints"]), *(number(one["lds"][c]) for c in columns), f"{one['of the rule']:.0f}"]
            for one in sweeps
        ],
    )  # fmt: skip
    return f"{facts}\n\n{methods}\n\n{dimensions}"
