"""Datamodels: the linear function of the training subset that predicts the model output best.

Ilyas, Park, Engstrom, Leclerc, Madry: "Datamodels: Predicting Predictions from Training Data", ICML 2022, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trak.datasets import RowSource
from trak.errors import InputError, MissingDependencyError
from trak.methods.bank import Bank, BankOptions, read_bank, rows_of_bank
from trak.methods.base import Attributor, FittedAttributor
from trak.progress import bar
from trak.results import Attribution
from trak.scores import ArrayScores


@dataclass(frozen=True, eq=False, kw_only=True)
class Datamodel(BankOptions, Attributor):
    """Lasso regression of each target's output on the masks; the coefficients are the scores.

        τ(·, z) = argmin_w min_b 1/(2S) Σ_s (f_s(z) − b − wᵀ1_s)² + α‖w‖₁

    with α chosen for each target by cross-validation over subsets. Unlike differences of means, the regression takes out what other
    rows explain, and sets most coefficients to exactly zero: with few subsets (S ≪ N) it may set all of them to zero. Subsets that
    all have the same size leave a constant open for each target, which the penalty settles. The authors use tens of thousands to
    hundreds of thousands of models. Needs scikit-learn.

    Attributes:
        folds: of the cross-validation; subsets are assigned to them at random.
        seed: of that assignment.
        max_iter: of the coordinate descent.
        progress: True or False to force a progress bar over targets.
    """

    folds: int = 5
    seed: int = 0
    max_iter: int = 10_000
    progress: bool | None = None

    def fit(self, train_set: Any, checkpoints: Sequence[Any] | None = None) -> FittedDatamodel:
        """One regression for each of the bank's targets; checkpoints are not read.

        Raises:
            InputError: a bank with impossible shapes or of another training set, or fewer subsets than folds.
            NonFiniteError: NaN or infinity in the outputs.
            MissingDependencyError: scikit-learn is not installed.
        """
        try:
            from sklearn.linear_model import LassoCV
            from sklearn.model_selection import KFold
        except ImportError as error:
            raise MissingDependencyError(
                "Datamodel needs scikit-learn: pip install 'trak-attribution[baselines]'"
            ) from error

        bank = read_bank(self)
        train = rows_of_bank(train_set, bank.masks.shape[1], "train_set")
        if not isinstance(self.folds, int) or not 2 <= self.folds <= len(bank.masks):
            raise InputError(
                f"folds must be a whole number from 2 to the {len(bank.masks)} subsets; got {self.folds!r}"
            )
        masks_SN, outputs_ST = bank.masks.double().numpy(), bank.outputs.numpy()
        coefficients_NT = np.zeros((masks_SN.shape[1], outputs_ST.shape[1]))
        penalties = []
        with bar(outputs_ST.shape[1], "Regressions", unit="targets", enabled=self.progress) as shown:
            for target, outputs_S in enumerate(outputs_ST.T):
                # Ordered subsets (a half, then its complement) must not fall into the same fold.
                folds = KFold(self.folds, shuffle=True, random_state=self.seed)
                regression = LassoCV(cv=folds, max_iter=self.max_iter).fit(masks_SN, outputs_S)
                coefficients_NT[:, target] = regression.coef_
                penalties.append(float(regression.alpha_))
                shown.update(1)
        settings = {"folds": self.folds, "seed": self.seed, "max_iter": self.max_iter}
        return FittedDatamodel(bank, train, coefficients_NT, tuple(penalties), settings)


@dataclass(frozen=True, eq=False)
class FittedDatamodel(FittedAttributor):
    """See `Datamodel`."""

    bank: Bank
    train: RowSource
    coefficients: np.ndarray
    penalties: tuple[float, ...]
    settings: dict[str, Any]

    def attribute(self, targets: Any) -> Attribution:
        """The coefficients [N, T].

        Raises:
            InputError: other targets than the bank's, by their number.
        """
        bank = self.bank
        target_rows = rows_of_bank(targets, bank.outputs.shape[1], "targets")
        info = {
            "method": "datamodel",
            "num_subsets": len(bank.masks),
            "num_models_per_subset": bank.num_models,
            "penalties": list(self.penalties),
            **self.settings,
        }
        return Attribution(
            scores=ArrayScores(torch.from_numpy(self.coefficients)),
            outputs=bank.outputs.mean(0),
            info=info,
            train_rows=self.train,
            target_rows=target_rows,
        )
