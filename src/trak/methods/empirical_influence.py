"""Influence measured by retraining: with the example, minus without it.

Feldman, Zhang: "What Neural Networks Memorize and Why: Discovering the Long Tail via Influence Estimation", NeurIPS 2020, section 1.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from trak.datasets import RowSource
from trak.errors import InputError
from trak.methods.bank import Bank, BankOptions, read_bank, rows_of_bank
from trak.methods.base import Attributor, FittedAttributor
from trak.results import Attribution
from trak.scores import Scores


@dataclass(frozen=True, eq=False, kw_only=True)
class EmpiricalInfluence(BankOptions, Attributor):
    """τ(z_i, z) = mean of f(z) over models trained with z_i − mean of f(z) over models trained without it.

    An unbiased estimate of what z_i does to models trained on subsets of that size, with the noise of everything else that differs
    between the two groups: its standard error falls as 1/√S. The authors train thousands of models on 70% of the data.
    """

    def fit(self, train_set: Any, checkpoints: Sequence[Any] | None = None) -> FittedEmpiricalInfluence:
        """Checks the bank; checkpoints are not read.

        Raises:
            InputError: a bank with impossible shapes, of another training set, or with rows that all models or none saw.
            NonFiniteError: NaN or infinity in the outputs.
        """
        bank = read_bank(self)
        train = rows_of_bank(train_set, bank.masks.shape[1], "train_set")
        seen_N = bank.masks.sum(0)
        constant_N = (seen_N == 0) | (seen_N == len(bank.masks))
        if bool(constant_N.any()):
            raise InputError(
                f"{int(constant_N.sum())} training rows, first {int(constant_N.nonzero()[0])}, are in all of the {len(bank.masks)} subsets or in "
                "none: what the models do with and without them was not observed. Add subsets, e.g. by trak.evaluation.half_splits"
            )
        return FittedEmpiricalInfluence(bank, train)


@dataclass(frozen=True, eq=False)
class FittedEmpiricalInfluence(FittedAttributor):
    """See `EmpiricalInfluence`."""

    bank: Bank
    train: RowSource

    def attribute(self, targets: Any) -> Attribution:
        """Differences of means [N, T], computed where they are read.

        Raises:
            InputError: other targets than the bank's, by their number.
        """
        bank = self.bank
        target_rows = rows_of_bank(targets, bank.outputs.shape[1], "targets")
        mean_T = bank.outputs.mean(0)
        info = {
            "method": "empirical influence",
            "num_subsets": len(bank.masks),
            "num_models_per_subset": bank.num_models,
        }
        return Attribution(
            # Differences of means do not see a constant, and sums of what is left are exact to more digits.
            scores=DifferenceScores(bank.masks, bank.outputs - mean_T),
            outputs=mean_T,
            info=info,
            train_rows=self.train,
            target_rows=target_rows,
        )


@dataclass(frozen=True, eq=False, repr=False)
class DifferenceScores(Scores):
    """Mean output with the row minus mean output without it.

    Attributes:
        masks: [S, N] bool; each row is in some and not in others.
        outputs: [S, T] float64.
    """

    masks: Tensor
    outputs: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(N, T)."""
        return self.masks.shape[1], self.outputs.shape[1]

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start to stop, [stop − start, T] float64."""
        masks_RS = self.masks[:, start:stop].T.double()
        seen_R1 = masks_RS.sum(1, keepdim=True)
        sum_with_RT = masks_RS @ self.outputs
        sum_without_RT = self.outputs.sum(0) - sum_with_RT
        return sum_with_RT / seen_R1 - sum_without_RT / (len(self.masks) - seen_R1)

    def select_targets(self, targets: Tensor) -> Scores:
        """Some of the targets."""
        return replace(self, outputs=self.outputs[:, targets])
