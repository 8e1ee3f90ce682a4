"""The stages of `trak demo`: train, attribute, evaluate, report."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from trak import Attribution, Eigenbasis, GradientSimilarity, RandomScores, Sparse, attribute
from trak.demo.bank import Bank, train_bank
from trak.demo.content import build_report
from trak.demo.data import DemoData, load_data
from trak.demo.recipe import build_model, logits_of
from trak.demo.result import DemoResult
from trak.demo.settings import Settings, full_settings, quick_settings
from trak.evaluation import LdsResult, MislabelResult, lds, mislabel_curve
from trak.progress import bar
from trak.report import write_report
from trak.report.dependencies import require


@dataclass
class Stopwatch:
    """Seconds spent in each stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block."""
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def run(
    *,
    quick: bool = False,
    out: str | os.PathLike[str] = "demo-report",
    seed: int = 0,
    progress: bool | None = None,
    settings: Settings | None = None,
) -> DemoResult:
    """TRAK on Fashion-MNIST from the first training step to the report, on a CPU, without a download.

    Trained models and features are kept in `out`: an interrupted run goes on where it stopped, and the same
    settings give the same numbers for the same version of torch and number of threads.

    Args:
        quick: fewer models, for a first look in under a minute; the full run takes a few.
        out: folder for the report, the models and the features; made if it is not there.
        seed: of everything random.
        progress: True or False to force progress bars; None shows them on terminals and in notebooks.
        settings: your own sizes; `quick` and `seed` are then not looked at.

    Returns:
        The figures and the report's path; usable as a path itself.

    Raises:
        MissingDependencyError: a package that reports need is not installed.
    """
    require("jinja2", "matplotlib", "PIL")  # before minutes of training, not after
    settings = settings or (quick_settings(seed) if quick else full_settings(seed))
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    watch = Stopwatch()
    data = load_data(corrupted_share=settings.corrupted_share, seed=settings.derived_seed("corruption"))
    with watch.stage("training"):
        bank = train_bank(data, settings, folder, progress=progress)
    with watch.stage("attribution"):
        methods = attribute_all(data, bank, settings, progress=progress)
        suspicion = suspicions(data, bank, settings, methods["TRAK"])
    with watch.stage("evaluation"):
        lds_of = evaluate_lds(methods, bank, settings, progress=progress)
        mislabels_of = evaluate_mislabels(suspicion, data, settings)
    with watch.stage("report"):
        logits = mean_probabilities(bank, data, settings)
        report = build_report(
            data=data,
            bank=bank,
            settings=settings,
            attribution=methods["TRAK"],
            predictions=logits.argmax(dim=1),
            suspicion=suspicion["TRAK self-influence"],
            lds_of=lds_of,
            mislabels_of=mislabels_of,
            command=_command(settings),
        )
        path = write_report(report, folder / "report.html")
    return DemoResult(
        report=path,
        lds=lds_of,
        mislabels=mislabels_of,
        accuracy=float((logits.argmax(dim=1) == data.test_labels).float().mean()),
        seconds=watch.seconds,
    ).save(folder / "results.json")


def attribute_all(
    data: DemoData, bank: Bank, settings: Settings, *, progress: bool | None = None
) -> dict[str, Attribution]:
    """Scores of the training images for all test images, by TRAK and by what it must beat."""
    model = build_model(settings.recipe)
    train_set, targets = (data.images, data.labels), (data.test_images, data.test_labels)
    features = bank.folder / f"features-{settings.projection_dim}"
    trak = attribute(
        model,
        train_set,
        targets,
        task="image_classification",
        checkpoints=bank.checkpoint_files,
        projection=Eigenbasis(dim=settings.projection_dim),
        save_dir=features,
        device="cpu",
        batch_size=100,
        progress=progress,
    )
    cosine = GradientSimilarity(
        model=model,
        task="image_classification",
        # Cosines of gradients: random columns keep them.
        projection=Sparse(dim=settings.projection_dim, seed=settings.seed),
        save_dir=features.with_name(f"{features.name}-random"),
        device="cpu",
        batch_size=100,
        progress=progress,
    )
    chance = RandomScores(seed=settings.seed)
    return {
        "TRAK": trak,
        "gradient cosine": cosine.fit(train_set, bank.checkpoint_files).attribute(targets),
        "random": chance.fit(train_set).attribute(targets),
    }


def suspicions(data: DemoData, bank: Bank, settings: Settings, attribution: Attribution) -> dict[str, Tensor]:
    """How suspicious each training label is, by each ranking: [N] each, higher is more so."""
    losses = [
        F.cross_entropy(logits_of(state, data.images, recipe=settings.recipe), data.labels, reduction="none")
        for state in bank.checkpoints
    ]
    return {
        "TRAK self-influence": attribution.self_influence(),
        "training loss": torch.stack(losses).mean(dim=0),
        "random order": torch.zeros(len(data.labels)),  # all tied: the expectation over all orders
    }


def evaluate_lds(
    methods: dict[str, Attribution], bank: Bank, settings: Settings, *, progress: bool | None = None
) -> dict[str, LdsResult]:
    """LDS of each method over all test images and evaluation subsets."""
    seed = settings.derived_seed("bootstrap")
    results = {}
    with bar(len(methods), "Evaluating", unit="methods", enabled=progress) as shown:
        for name, attribution in methods.items():
            results[name] = lds(attribution.scores, bank.subset_masks, bank.subset_outputs, seed=seed)
            shown.update(1)
    return results


def evaluate_mislabels(
    suspicion: dict[str, Tensor], data: DemoData, settings: Settings
) -> dict[str, MislabelResult]:
    """How early each ranking finds the corrupted labels."""
    seed = settings.derived_seed("bootstrap")
    return {name: mislabel_curve(values, data.corrupted, seed=seed) for name, values in suspicion.items()}


def mean_probabilities(bank: Bank, data: DemoData, settings: Settings) -> Tensor:
    """Class probabilities [T, C] of the test images, averaged over checkpoints."""
    logits = [logits_of(state, data.test_images, recipe=settings.recipe) for state in bank.checkpoints]
    return torch.stack(logits).softmax(dim=-1).mean(dim=0)


def _command(settings: Settings) -> str | None:
    """The line that makes the report again, where the settings are the command's own."""
    for option, known in (("", full_settings(settings.seed)), (" --quick", quick_settings(settings.seed))):
        if settings == known:
            return f"trak demo{option} --seed {settings.seed}"
    return None
