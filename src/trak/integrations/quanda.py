"""quanda's metrics on our attributions (Bareeva et al. 2024, "Quanda: An Interpretability Toolkit for Training Data Attribution
Evaluation and Beyond", arXiv 2410.07158).

    metric = quanda.metrics.downstream_eval.ClassDetectionMetric(model=model, train_dataset=train_set)
    for rows, part in batches(attribution, 32):
        metric.update(explanations=part, test_targets=labels[rows])
    metric.compute()

    explainer = explainer_class()(model=model, train_dataset=train_set, method=trak.TRAK(model=model, task="image_classification"))
    explainer.explain(test_data, targets)

quanda's explanations are [T, N], a row for each target; ours are [N, T]. Positive means the same in both: the training row speaks for
the target's output.

Legend: N training rows, T targets, B targets of one batch.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from trak.checkpoints import checkpoint_hash, load_checkpoint
from trak.errors import InputError, MissingDependencyError
from trak.logs import logger
from trak.methods.base import Attributor, FittedAttributor
from trak.results import Attribution
from trak.scores import Scores

Method = Attributor | Callable[[nn.Module], Attributor]

ACCEPTED_TASKS = ["image_classification", "text_classification"]
"""quanda's names of the tasks that both know."""

_RELEASED_PACKAGE = {
    "trak.projectors": ("BasicProjector", "CudaProjector", "NoOpProjector", "ProjectionType"),
    "trak.utils": ("get_matrix_mult",),
}
"""What quanda's wrapper of the released package imports: that package has the import name of this one."""


def explanations(scores: Attribution | Scores) -> Tensor:
    """All scores in quanda's orientation, [T, N] float32.

    Args:
        scores: an attribution, or its scores.

    Raises:
        InputError: they would not fit into memory; `batches` gives them in parts.
    """
    return _scores(scores).tensor().float().T.contiguous()


def batches(scores: Attribution | Scores, batch_size: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    """Scores for metrics that are updated batch by batch: each pass reads the features once, and holds B × N scores.

    Args:
        scores: an attribution, or its scores.
        batch_size: B; the last batch may be smaller.

    Yields:
        (positions of the targets [B] int64, explanations [B, N] float32).

    Raises:
        InputError: a batch size below 1.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size must be a whole number ≥ 1; got {batch_size!r}")
    values = _scores(scores)
    for start in range(0, values.num_targets, batch_size):
        positions = torch.arange(start, min(start + batch_size, values.num_targets))
        yield positions, explanations(values.select_targets(positions))


def import_quanda() -> ModuleType:
    """The package quanda, imported so that it can be.

    On import quanda loads its wrapper of the released package `traker`, which is imported as `trak` as well. Where its modules are
    not there, this puts names in their place for as long as the import takes; that wrapper (`quanda.explainers.wrappers.TRAK`) then
    cannot be used, and everything else of quanda can. Call it before any `import quanda` of your own.

    Raises:
        MissingDependencyError: quanda, or something it needs, is not installed.
    """
    try:
        with _names_of_the_released_package():
            return importlib.import_module("quanda")
    except ImportError as error:
        raise MissingDependencyError(
            f"trak.integrations.quanda needs quanda: pip install quanda ({type(error).__name__}: {error}). It asks for the package "
            "traker, which overwrites this one where both are installed: install with pip's --no-deps, or this package after it"
        ) from error


@functools.cache
def explainer_class() -> type:
    """A subclass of quanda's `Explainer` around any of our methods.

    Its arguments, all by keyword as quanda's metrics and benchmarks give them:

        model: the model to explain.
        train_dataset: the training set; rows are positions in it.
        method: an `Attributor`, or a function (model) -> `Attributor`. Where an attributor has a field `model`, it gets the model that
            quanda gives, which may be another one (a randomised one, say).
        task: "image_classification" or "text_classification", for quanda.
        checkpoints: paths, all of which are the ensemble; None for the model's own state.
        checkpoints_load_func: (model, path) -> loads the checkpoint into the model; None for quanda's.

    `explain(test_data, targets)` gives [T, N] for a tensor or mapping of tensors and its labels, and `self_influence()` [N]: the
    method's own where it has one, else quanda's, which explains each training row.

    Raises:
        MissingDependencyError: quanda is not installed.
    """
    import_quanda()
    base: Any = importlib.import_module("quanda.explainers").Explainer

    class AttributorExplainer(base):
        """Any of trak's methods as an explainer of quanda."""

        accepted_tasks = ACCEPTED_TASKS

        def __init__(
            self,
            model: nn.Module,
            train_dataset: Any,
            method: Method,
            task: str = "image_classification",
            checkpoints: str | list[str] | None = None,
            checkpoints_load_func: Callable[[nn.Module, str], Any] | None = None,
        ) -> None:
            super().__init__(
                model=model,
                train_dataset=train_dataset,
                task=task,
                checkpoints=checkpoints,
                checkpoints_load_func=checkpoints_load_func,
            )
            self._rows = train_dataset
            sources = _sources(model, self.checkpoints, self.checkpoints_load_func)
            self.fitted: FittedAttributor = _method(method, model).fit(train_dataset, sources)

        def explain(self, test_data: Any, targets: Any) -> Tensor:
            """Scores [T, N] of the training rows for test_data with labels `targets`, on the model's device."""
            return explanations(self.fitted.attribute(_batch(test_data, targets))).to(self.device)

        def self_influence(self, batch_size: int = 32) -> Tensor:
            """Self-influence [N] of the training rows."""
            one = self.fitted.attribute(Subset(self._rows, [0]))
            if not one.has_self_influence:
                return super().self_influence(batch_size=batch_size)
            return one.self_influence().float().to(self.device)

    return AttributorExplainer


def _scores(scores: Attribution | Scores) -> Scores:
    if isinstance(scores, Attribution):
        return scores.scores
    if not isinstance(scores, Scores):
        raise InputError(
            f"explanations are made of an Attribution or its scores, got {type(scores).__name__}. Of a matrix [N, T] make "
            "trak.ArrayScores(matrix)"
        )
    return scores


def _method(method: Any, model: nn.Module) -> Attributor:
    """The method for this model.

    Raises:
        InputError: no attributor, nor a function that gives one.
    """
    if not isinstance(method, Attributor) and callable(method):
        method = method(model)
    if not isinstance(method, Attributor):
        raise InputError(
            f"method must be a trak.Attributor, such as trak.TRAK(model=…, task=…), or a function (model) -> Attributor; "
            f"got {type(method).__name__}"
        )
    if dataclasses.is_dataclass(method) and any(
        field.name == "model" for field in dataclasses.fields(method)
    ):
        return dataclasses.replace(method, model=model)
    return method


def _sources(
    model: nn.Module, checkpoints: Sequence[str], load: Callable[[nn.Module, str], Any]
) -> list[Callable[[], nn.Module]] | None:
    """A function for each different checkpoint that gives a model in its state; None where there are no checkpoints."""

    def loaded(path: str) -> nn.Module:
        fresh = copy.deepcopy(model)
        load(fresh, path)
        return fresh

    sources: list[Callable[[], nn.Module]] = [functools.partial(loaded, path) for path in checkpoints]
    if len(sources) < 2:
        return sources or None
    # quanda's randomised checkpoints are drawn from one seed, and so are often all the same; an ensemble counts each model once.
    different: dict[str, Callable[[], nn.Module]] = {}
    for source in sources:
        different.setdefault(checkpoint_hash(load_checkpoint(source)), source)
    if len(different) < len(sources):
        logger.info("%d of %d checkpoints are different; each counts once", len(different), len(sources))
    return list(different.values())


def _batch(test_data: Any, targets: Any) -> Any:
    """A batch as the tasks take it: (inputs, labels), or a mapping with labels."""
    labels = torch.as_tensor(targets)
    if isinstance(test_data, Mapping):
        return {**test_data, "labels": labels.to(next(iter(test_data.values())).device)}
    return test_data, labels.to(test_data.device)


@contextmanager
def _names_of_the_released_package() -> Iterator[None]:
    """Modules of the released package that quanda imports names from, where they are not there."""
    added = []
    for name, members in _RELEASED_PACKAGE.items():
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            module = ModuleType(name)
            for member in members:
                setattr(module, member, _refusing(f"{name}.{member}"))
            sys.modules[name] = module
            added.append(name)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


def _refusing(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **options: Any) -> Any:
        raise MissingDependencyError(
            f"quanda's wrapper of the released package needs {name}, which this package of the same name does not have: use "
            "trak.integrations.quanda.explainer_class() with trak.TRAK instead"
        )

    return refuse
