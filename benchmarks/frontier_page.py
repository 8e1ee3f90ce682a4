"""Recorded frontiers on their page: the figures in docs/assets and the tables of docs/frontier.md.

    trak frontier examples/recipes/fashion.py --bank demo-report/bank --out frontier-fashion
    cp frontier-fashion/frontier.json benchmarks/results/frontier-fashion.json
    python benchmarks/frontier_page.py

Every benchmarks/results/frontier-NAME.json is drawn as docs/assets/frontier-NAME.png, and its table stands between the comments
`<!-- begin NAME -->` and `<!-- end NAME -->`.
"""

from __future__ import annotations

import re
from pathlib import Path

from trak.frontier import Frontier, draw_frontier, markdown_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "frontier.md"
TITLES = {
    "fashion": "Fashion-MNIST, 3,000 images, ConvNet with 20,490 parameters",
    "cifar2": "CIFAR-2, 10,000 images, ResNet-9 with 142,992 parameters",
    "sst2": "SST-2, 2,000 sentences, three layers of MiniLM",
    "qnli": "QNLI, 2,000 pairs, the last layer of MiniLM",
}
METHODS = (
    *(
        "trak",
        "trak-sparse",
        "trak-sparse-1024",
        "trak-per-layer",
        "trak-paper",
        "gradient-dot",
        "gradient-cosine",
        "tracin",
        "gas",
    ),
    *("representation-dot", "representation-cosine", "representation-euclidean", "knn-shapley"),
    *("influence-ekfac", "influence-cg", "influence-arnoldi", "influence-lissa"),
    *("empirical-influence", "datamodel", "random"),
)
"""Those of every problem: what a record lacks is said."""


def section(name: str, frontier: Frontier) -> str:
    """Figure, facts and table."""
    bank, machine, training = frontier.bank, frontier.machine, frontier.training
    models = f"{bank['models_per_subset']} model{'s' if bank['models_per_subset'] > 1 else ''} each"
    facts = [
        f"{bank['num_subsets']} subsets with {models}, {bank['num_targets']} targets; *common*: {bank['common_subsets']} subsets, "
        f"{bank['common_targets']} targets.",
        f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''} of {machine['processor']}, torch {machine['torch']}, trak "
        f"{machine['trak']}, {machine['date']}; {frontier.clock} seconds. A model takes {training[frontier.clock]:.3g} s, "
        f"a plain pass over the training set {frontier.seconds_per_pass or 0:.2g} s.",
    ]
    if bank["noise_ceiling"] is not None:
        facts.append(f"The noise ceiling is {bank['noise_ceiling'][0]:.3f}.")
    absent = [name for name in METHODS if name not in {point.method for point in frontier.points}]
    if absent:
        facts.append(f"Not recorded yet: {', '.join(absent)}.")
    picture = f"![LDS against compute: {TITLES[name]}](assets/frontier-{name}.png)"
    return f"{picture}\n\n" + " ".join(facts) + f"\n\n{markdown_table(frontier)}"


def page(text: str) -> str:
    """The page with the sections of all recorded frontiers."""
    for file in sorted(RESULTS.glob("frontier-*.json")):
        name = file.stem.removeprefix("frontier-")
        inside = f"<!-- begin {name} -->\n\n{section(name, Frontier.load(file))}\n<!-- end {name} -->"
        text, count = re.subn(
            rf"<!-- begin {name} -->.*?<!-- end {name} -->", lambda _, new=inside: new, text, flags=re.DOTALL
        )
        if count != 1:
            raise SystemExit(
                f"{PAGE} needs the comments <!-- begin {name} --> and <!-- end {name} --> once each"
            )
    return text


def main() -> None:
    for file in sorted(RESULTS.glob("frontier-*.json")):
        name = file.stem.removeprefix("frontier-")
        (ROOT / "docs" / "assets").mkdir(exist_ok=True)
        draw_frontier(
            Frontier.load(file), ROOT / "docs" / "assets" / f"frontier-{name}.png", title=TITLES[name]
        )
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
