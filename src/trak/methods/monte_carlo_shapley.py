"""Shapley values of training examples by sampled permutations, retraining on growing prefixes.

Ghorbani, Zou: "Data Shapley: Equitable Valuation of Data for Machine Learning", ICML 2019, algorithm 1 (TMC-Shapley).

Shape legend: N training rows, T targets, S permutations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trak.datasets import RowSource, as_rows
from trak.errors import InputError, MissingDependencyError, NonFiniteError
from trak.methods.base import Attributor, FittedAttributor
from trak.progress import bar
from trak.results import Attribution
from trak.scores import ArrayScores

Utility = Callable[[Tensor], Tensor]
"""Training rows [n] int64 -> utility of each target, [T], after training on them."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TruncatedMonteCarloShapley(Attributor):
    """Shapley values in the game whose value v_z(S) is what a model trained on the examples S achieves on the target z.

        τ(z_i, z) = mean over permutations π of  v_z(P ∪ {i}) − v_z(P),    P = the examples before i in π

    Each permutation is a chain of up to N trainings: for models that train in milliseconds. A chain is cut off where the rest can change
    little, mean_z |v_z(all) − v_z(P)| < tolerance, and those that follow get 0: with tolerance 0 the mean is unbiased, with standard
    errors that fall as 1/√S. The examples' values add up to v_z(all) − v_z(∅), but for what the cuts leave out. The authors take the
    accuracy on a test set as v, a tolerance of the size of its sampling error, and a few times N permutations; here every target has a
    value of its own, and the mean of a row's scores is its value for the whole set.

    One of `estimator` and `train` says what training is.

    Attributes:
        estimator: a scikit-learn classifier or regressor, of which clones are fitted to (inputs, labels). v is the probability of the
            target's label, or 0 and 1 where it has no `predict_proba`; for regressors minus the squared error. With no examples, 1/C for
            each of the C labels of the training set, or a prediction of 0; with one label only, that label for certain.
        train: (rows [n] int64, ascending; targets as given) -> utilities [T]; n = 0 gives the untrained model's.
        permutations: S.
        tolerance: in the units of v.
        seed: of the permutations.
        progress: True or False to force a progress bar over permutations.
    """

    estimator: Any = None
    train: Callable[[Tensor, Any], Any] | None = None
    permutations: int = 100
    tolerance: float = 0.0
    seed: int = 0
    progress: bool | None = None

    def fit(
        self, train_set: Any, checkpoints: Sequence[Any] | None = None
    ) -> FittedTruncatedMonteCarloShapley:
        """Checks the arguments; checkpoints are not read, and models are trained for the targets.

        Raises:
            InputError: impossible settings, or data that an estimator cannot take.
            MissingDependencyError: an estimator without scikit-learn.
        """
        if (self.estimator is None) == (self.train is None):
            raise InputError(
                "pass either estimator=, a scikit-learn model, or train=, a function (rows, targets) -> utilities"
            )
        if (
            not isinstance(self.permutations, int)
            or isinstance(self.permutations, bool)
            or self.permutations < 1
        ):
            raise InputError(f"permutations must be a whole number ≥ 1; got {self.permutations!r}")
        if not (self.tolerance >= 0 and math.isfinite(self.tolerance)):
            raise InputError(f"tolerance must be a number ≥ 0; got {self.tolerance!r}")
        if self.estimator is not None:
            _arrays(train_set, "train_set")
            _clone(self.estimator)
        return FittedTruncatedMonteCarloShapley(self, train_set, as_rows(train_set, what="train_set"))


@dataclass(frozen=True, eq=False)
class FittedTruncatedMonteCarloShapley(FittedAttributor):
    """See `TruncatedMonteCarloShapley`."""

    method: TruncatedMonteCarloShapley
    train_set: Any
    train: RowSource

    def attribute(self, targets: Any) -> Attribution:
        """Trains along every permutation; values [N, T] float64. `info` has the mean standard error, and the number of trainings.

        Raises:
            InputError: utilities of another shape.
            NonFiniteError: NaN or infinity among them.
        """
        method = self.method
        target_rows = as_rows(targets, what="targets")
        utility = _Counted(self._utility(targets), target_rows.num_rows)
        generator = torch.Generator().manual_seed(method.seed)
        count = self.train.num_rows

        def orders() -> Iterator[Tensor]:
            with bar(
                method.permutations, "Permutations", unit="permutations", enabled=method.progress
            ) as shown:
                for _ in range(method.permutations):
                    yield torch.randperm(count, generator=generator)
                    shown.update(1)

        values_NT, errors_NT = permutation_values(utility, orders(), count, tolerance=method.tolerance)
        info = {
            "method": "truncated Monte Carlo Shapley",
            "permutations": method.permutations,
            "tolerance": method.tolerance,
            "seed": method.seed,
            "num_trainings": utility.calls,
            "standard_error": float(errors_NT.mean()) if method.permutations > 1 else None,
        }
        return Attribution(
            scores=ArrayScores(values_NT), info=info, train_rows=self.train, target_rows=target_rows
        )

    def _utility(self, targets: Any) -> Callable[[Tensor], Any]:
        train = self.method.train
        if train is not None:
            return lambda rows: train(rows, targets)
        return estimator_utility(
            self.method.estimator, _arrays(self.train_set, "train_set"), _arrays(targets, "targets")
        )


def permutation_values(
    utility: Utility, orders: Iterable[Tensor], count: int, *, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Mean marginal contributions over orders, and their standard errors, [N, T] float64 each.

    Args:
        utility: of a set of rows.
        orders: permutations [N] of the rows.
        count: N.
        tolerance: a chain ends where the mean over targets of |v(all) − v(prefix)| falls below it.
    """
    everything_T = utility(torch.arange(count))
    nothing_T = utility(torch.arange(0))
    # Welford's update: sums of squares would cancel.
    mean_NT = torch.zeros(count, len(everything_T), dtype=torch.float64)
    spread_NT = torch.zeros_like(mean_NT)
    number = 0
    for order_N in orders:
        number += 1
        marginal_NT = torch.zeros_like(mean_NT)
        before_T = nothing_T
        for position, row in enumerate(order_N.tolist()):
            if float((everything_T - before_T).abs().mean()) < tolerance:
                break
            is_last = position + 1 == count
            after_T = everything_T if is_last else utility(order_N[: position + 1].sort().values)
            marginal_NT[row] = after_T - before_T
            before_T = after_T
        step_NT = marginal_NT - mean_NT
        mean_NT += step_NT / number
        spread_NT += step_NT * (marginal_NT - mean_NT)
    return mean_NT, (spread_NT / max(number - 1, 1) / max(number, 1)).sqrt()


def estimator_utility(
    estimator: Any, train: tuple[np.ndarray, np.ndarray], targets: tuple[np.ndarray, np.ndarray]
) -> Callable[[Tensor], Tensor]:
    """The utility of a scikit-learn model; see `TruncatedMonteCarloShapley`."""
    from sklearn.base import is_classifier

    (inputs, labels), (target_inputs, target_labels) = train, targets
    if not is_classifier(estimator):

        def regress(rows: Tensor) -> Tensor:
            predicted = np.zeros(len(target_inputs))
            if len(rows):
                fitted = _clone(estimator).fit(inputs[rows.numpy()], labels[rows.numpy()])
                predicted = np.asarray(fitted.predict(target_inputs)).reshape(len(target_inputs))
            return -torch.from_numpy((predicted - target_labels) ** 2)

        return regress
    classes = np.unique(labels)

    def classify(rows: Tensor) -> Tensor:
        seen = np.unique(labels[rows.numpy()])
        if not len(seen):
            return torch.from_numpy(np.isin(target_labels, classes) / len(classes))
        if len(seen) == 1:
            # Many classifiers refuse to be fitted to one class.
            return torch.from_numpy((target_labels == seen[0]).astype(np.float64))
        fitted = _clone(estimator).fit(inputs[rows.numpy()], labels[rows.numpy()])
        if not hasattr(fitted, "predict_proba"):
            return torch.from_numpy((fitted.predict(target_inputs) == target_labels).astype(np.float64))
        matches = target_labels[:, None] == fitted.classes_[None]
        return torch.from_numpy((fitted.predict_proba(target_inputs) * matches).sum(1))

    return classify


@dataclass(eq=False)
class _Counted:
    """A utility whose answers are checked and counted."""

    utility: Callable[[Tensor], Any]
    num_targets: int
    calls: int = 0

    def __call__(self, rows: Tensor) -> Tensor:
        self.calls += len(rows) > 0
        found = self.utility(rows)
        values_T = torch.as_tensor(found).detach().cpu().double()
        if values_T.shape != (self.num_targets,):
            raise InputError(
                f"train must return one utility for each of the {self.num_targets} targets; got shape {list(values_T.shape)} for "
                f"{len(rows)} training rows"
            )
        if not bool(values_T.isfinite().all()):
            raise NonFiniteError(
                f"utilities after training on {len(rows)} rows are NaN or infinite: return a finite number for every set of rows, the empty one too"
            )
        return values_T


def _clone(estimator: Any) -> Any:
    try:
        from sklearn.base import clone
    except ImportError as error:
        raise MissingDependencyError(
            "an estimator needs scikit-learn: pip install 'trak-attribution[baselines]', or pass train="
        ) from error
    try:
        return clone(estimator)
    except TypeError as error:
        raise InputError(
            f"estimator must be a scikit-learn model, an object and not a class; got {type(estimator).__name__}. For anything else pass "
            "train=, a function (rows, targets) -> utilities"
        ) from error


def _arrays(data: Any, what: str) -> tuple[np.ndarray, np.ndarray]:
    """(inputs [n, D], labels [n]) from tensors or a TensorDataset."""
    parts = getattr(data, "tensors", data)
    if (
        not isinstance(parts, (tuple, list))
        or len(parts) != 2
        or not all(isinstance(p, Tensor) for p in parts)
    ):
        raise InputError(
            f"{what} must be tensors (inputs, labels) for an estimator; got {type(data).__name__}. For other data pass train="
        )
    inputs, labels = (part.detach().cpu().numpy() for part in parts)
    if labels.ndim != 1 or len(labels) != len(inputs):
        raise InputError(
            f"{what}: an estimator needs one label for each input; got shapes {list(inputs.shape)} and {list(labels.shape)}"
        )
    return inputs.reshape(len(inputs), -1), labels
