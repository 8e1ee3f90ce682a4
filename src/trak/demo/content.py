"""What the demo's report says: from figures to the report's sections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from trak import Attribution
from trak.demo.bank import Bank
from trak.demo.data import CLASS_NAMES, DemoData
from trak.demo.settings import Settings
from trak.evaluation import LdsResult, MislabelResult
from trak.evaluation import predictions as subset_predictions
from trak.report import (
    Example,
    HowToRead,
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
    TargetsSection,
    Tile,
    ranked_errors,
    target_cards,
)

NUM_INFLUENCES = 6
NUM_SCATTERS = 4
NUM_SUSPECTS = 18
CURVE_POINTS = 300
OUTPUT = (
    "f = log(p / (1 − p)), with p the probability that the model gives to the test image's true class: "
    "above zero where the true class has more than half of the probability."
)


def build_report(
    *,
    data: DemoData,
    bank: Bank,
    settings: Settings,
    attribution: Attribution,
    predictions: Tensor,
    suspicion: Tensor,
    lds_of: Mapping[str, LdsResult],
    mislabels_of: Mapping[str, MislabelResult],
    command: str | None,
) -> Report:
    """The whole report.

    Args:
        data: images and labels.
        bank: the trained models.
        settings: what was asked for.
        attribution: TRAK's, for all test images.
        predictions: the ensemble's classes, [T] int64.
        suspicion: TRAK's self-influence, [N].
        lds_of: by method, TRAK first.
        mislabels_of: by ranking, TRAK first.
        command: the line that makes the report again.
    """
    outputs = bank_outputs(attribution)
    shown = choose_targets(outputs, predictions, data.test_labels, settings.num_shown)
    return Report(
        summary(data, bank, settings, predictions, lds_of, mislabels_of),
        (
            targets_section(data, attribution, outputs, predictions, shown),
            lds_section(attribution, bank, settings, lds_of, shown, data),
            mislabel_section(data, suspicion, mislabels_of),
            ScoresSection.from_scores(attribution.scores[:, shown]),
            HowToRead(output=OUTPUT),
            Provenance(provenance(data, settings, attribution), command),
        ),
    )


def bank_outputs(attribution: Attribution) -> Tensor:
    """F of each test image, mean over checkpoints: [T]."""
    assert attribution.outputs is not None  # TRAK always has them
    return attribution.outputs


def choose_targets(outputs: Tensor, predictions: Tensor, labels: Tensor, num_shown: int) -> list[int]:
    """Which test images get a card: half mistakes, half not, each of another class as far as classes go.

    Mistakes: of each class the image with the lowest output f, and of these the lowest. Correct ones: of the
    classes that remain, in order, the correct image of median f.

    Args:
        outputs: f [T].
        predictions: [T] int64.
        labels: true classes, [T] int64.
        num_shown: how many; fewer where there are not enough mistakes or classes.

    Returns:
        Test rows, mistakes first.
    """
    classes = [int(label) for label in labels.unique()]
    worst = {}
    for label in classes:
        rows = ((labels == label) & (predictions != label)).nonzero()[:, 0]
        if len(rows):
            worst[label] = int(rows[outputs[rows].argmin()])
    mistakes = sorted(worst, key=lambda label: float(outputs[worst[label]]))[: num_shown // 2]
    typical = []
    for label in (label for label in classes if label not in mistakes):
        rows = ((labels == label) & (predictions == label)).nonzero()[:, 0]
        if len(rows):
            typical.append(int(rows[outputs[rows].argsort(stable=True)[len(rows) // 2]]))
    return [worst[label] for label in mistakes] + typical[: num_shown - num_shown // 2]


def summary(
    data: DemoData,
    bank: Bank,
    settings: Settings,
    predictions: Tensor,
    lds_of: Mapping[str, LdsResult],
    mislabels_of: Mapping[str, MislabelResult],
) -> Summary:
    """Title, what was done, and four figures."""
    trak_lds, trak_auc = next(iter(lds_of.values())), next(iter(mislabels_of.values()))
    accuracy = float((predictions == data.test_labels).float().mean())
    lead = (
        f"{len(bank.checkpoints)} small ConvNets were trained on random halves of {len(data.labels):,} "
        f"images of Fashion-MNIST, {int(data.corrupted.sum())} of them with a wrong label on purpose. TRAK "
        "then says which training images raised or lowered each prediction. Two checks follow: whether its "
        "scores foretell what happens when models are trained again on other subsets, and whether they "
        "find the wrong labels."
    )
    return Summary(
        "Which training images made the model say this?",
        lead,
        (
            Tile("Test accuracy", f"{accuracy:.1%}", f"ensemble of {settings.num_checkpoints} models"),
            Tile(
                "LDS",
                f"{trak_lds.mean:.2f}",
                f"{trak_lds.low:.2f} to {trak_lds.high:.2f}; random scores give 0",
            ),
            Tile(
                "Wrong labels, AUC",
                f"{trak_auc.auc:.2f}",
                f"{trak_auc.low:.2f} to {trak_auc.high:.2f}; chance is 0.5",
            ),
            Tile(
                "Found in the first tenth",
                f"{trak_auc.found_at(0.1):.0%}",
                f"of {trak_auc.num_corrupted} wrong labels, by self-influence",
            ),
        ),
    )


def targets_section(
    data: DemoData, attribution: Attribution, outputs: Tensor, predictions: Tensor, shown: list[int]
) -> TargetsSection:
    """A card per chosen test image."""
    scores = attribution.scores.select_targets(torch.tensor(shown))
    top, bottom = scores.extremes(NUM_INFLUENCES)
    cards = target_cards(
        (top.rows, top.scores),
        (bottom.rows, bottom.scores),
        train_example=lambda row: train_example(data, row),
        target_example=lambda index: Example("image", data.test_pixels[shown[index]], value_range=(0, 255)),
        outputs=outputs[shown],
        predictions=[CLASS_NAMES[int(predictions[row])] for row in shown],
        truths=[CLASS_NAMES[int(data.test_labels[row])] for row in shown],
        errors=ranked_errors(attribution, shown, top.rows, bottom.rows),
    )
    numbered = tuple(replace(card, index=row) for card, row in zip(cards, shown))
    lead = (
        "Half of these test images are mistakes, half are not. Mistakes: of each class the image with the "
        "lowest output f, and of these the lowest. The others: of the classes that remain, the correctly "
        "classified image of median f."
    )
    return TargetsSection(numbered, lead=lead)


def train_example(data: DemoData, row: int) -> Example:
    """A training image with its label as given, and the true one where that was changed."""
    given, true = int(data.labels[row]), int(data.true_labels[row])
    caption = None if given == true else f"true label: {CLASS_NAMES[true]}"
    return Example("image", data.pixels[row], CLASS_NAMES[given], caption, value_range=(0, 255))


def lds_section(
    attribution: Attribution,
    bank: Bank,
    settings: Settings,
    lds_of: Mapping[str, LdsResult],
    shown: list[int],
    data: DemoData,
) -> LdsSection:
    """LDS of every method, and predicted against actual outputs for some of the cards' targets."""
    rows = shown[:: max(1, len(shown) // NUM_SCATTERS)][:NUM_SCATTERS]
    predicted = subset_predictions(attribution.scores[:, rows], bank.subset_masks)
    actual = bank.subset_outputs.mean(dim=1)[:, rows]
    result = next(iter(lds_of.values()))
    scatters = tuple(
        LdsScatter(
            f"test image {row}, {CLASS_NAMES[int(data.test_labels[row])]}",
            tuple(predicted[:, column].tolist()),
            tuple(actual[:, column].tolist()),
            float(result.per_target[row]),
        )
        for column, row in enumerate(rows)
    )
    lead = (
        f"{result.num_subsets * result.num_models} models were trained on {result.num_subsets} random "
        "subsets, drawn apart from those of the attributed models. For each test image: the rank correlation, "
        "over the subsets, between the sum of the scores of the images in the subset and the output of the "
        f"models trained on it (mean of {result.num_models} per subset). The LDS is the mean over all "
        f"{result.num_targets} test images."
    )
    return LdsSection(
        methods=tuple(MethodLds(name, one.mean, one.low, one.high) for name, one in lds_of.items()),
        scatters=scatters,
        num_subsets=result.num_subsets,
        num_models=result.num_subsets * result.num_models,
        num_targets=result.num_targets,
        subset_fraction=settings.subset_fraction,
        interval="95 % bootstrap interval over subsets and test images",
        lead=lead,
    )


def mislabel_section(
    data: DemoData, suspicion: Tensor, mislabels_of: Mapping[str, MislabelResult]
) -> MislabelSection:
    """Curves of every ranking but chance, and the most suspicious training images."""
    curves = tuple(_curve(name, one) for name, one in mislabels_of.items() if name != "random order")
    order = suspicion.argsort(descending=True, stable=True)[:NUM_SUSPECTS]
    suspects = tuple(
        Suspect(
            row,
            float(suspicion[row]),
            Example("image", data.pixels[row], value_range=(0, 255)),
            CLASS_NAMES[int(data.labels[row])],
            CLASS_NAMES[int(data.true_labels[row])],
        )
        for row in order.tolist()
    )
    lead = (
        f"The labels of {int(data.corrupted.sum())} training images were changed before training. "
        "Self-influence is an image's score for itself: large where the model had to learn it by heart. "
        "Beside it, the mean loss of the attributed models, for which no attribution is needed."
    )
    return MislabelSection(
        curves,
        suspects,
        num_rows=len(data.labels),
        num_corrupted=int(data.corrupted.sum()),
        lead=lead,
    )


def provenance(data: DemoData, settings: Settings, attribution: Attribution) -> dict[str, Any]:
    """Data, settings and attribution, by name."""
    chosen = asdict(settings)
    recipe = chosen.pop("recipe")
    return {
        "data": (
            f"Fashion-MNIST (MIT licence, © 2017 Zalando SE), {len(data.labels):,} training and "
            f"{len(data.test_labels):,} test images"
        ),
        "data file SHA-256": data.source_hash,
        "settings": chosen,
        "recipe": {**recipe, "channels": list(recipe["channels"])},
        "attribution": dict(attribution.info),
    }


def _curve(name: str, result: MislabelResult) -> MislabelCurve:
    """A curve thinned to a few hundred points, the first and last among them."""
    step = max(1, result.num_rows // CURVE_POINTS)
    picked = sorted({*range(0, result.num_rows, step), result.num_rows - 1})
    return MislabelCurve(
        name,
        tuple(result.fraction_inspected[picked].tolist()),
        tuple(result.fraction_found[picked].tolist()),
        result.auc,
    )
