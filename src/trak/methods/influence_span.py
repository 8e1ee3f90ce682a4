"""`InfluenceFunction` in the span of the training gradients: the same solves, in N + 1 numbers for each target rather than P.

Shape legend: N training rows, T targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trak.datasets import as_rows
from trak.methods.base import FittedAttributor
from trak.methods.conjugate_gradients import conjugate_gradients
from trak.methods.curvature import loss_curvature
from trak.methods.gradient_passes import Passes, about
from trak.methods.gram import Span, training_span
from trak.results import Attribution
from trak.scores import ArrayScores


@dataclass(frozen=True, eq=False)
class FittedSpanInfluence(FittedAttributor):
    """Training gradients as the rows of an N × N root; see `trak.methods.gram`.

    The steps of conjugate gradients, their residuals and where they stop are those in the parameters, for all of these are made of inner
    products.

    Attributes:
        passes: training set and checkpoints.
        spans: of each checkpoint.
        solver: damping, tolerance and max_iter of `conjugate_gradients`.
        info: the method and its settings.
    """

    passes: Passes
    spans: tuple[Span, ...]
    solver: Mapping[str, Any]
    info: Mapping[str, Any]

    def attribute(self, targets: Any) -> Attribution:
        """Scores [N, T]: a pass over the targets and one over the training set, then the solves.

        Raises:
            SingularGramError: a solve does not converge.
            TrakError: anything wrong with the targets.
        """
        passes, count = self.passes, len(self.spans)
        target_rows = as_rows(targets, batch_size=passes.options.batch_size, what="targets")
        num_train, dtype = passes.train.num_rows, passes.setting.sum_dtype
        scores_NT = torch.zeros(num_train, target_rows.num_rows, dtype=dtype)
        outputs_T = torch.zeros(target_rows.num_rows, dtype=dtype)
        for index, (span, state) in enumerate(zip(self.spans, passes.states())):
            which = f"checkpoint {index + 1} of {count}"
            wanted = passes.products(state, target_rows, label=f"Targets, {which}")
            cross = passes.products(
                state, passes.train, wanted.values.T, label=f"Training gradients, {which}"
            )
            rhs = span.coordinates(cross.values, wanted.values.square().sum(1))
            curvature_N = loss_curvature(passes.setting.task, span.outputs, span.weights)
            solved = conjugate_gradients(
                _GaussNewton(span.root, curvature_N), rhs, where=which, **self.solver
            )
            found_NT = span.root @ solved[:, :num_train].T
            scores_NT += (span.weights.double().unsqueeze(1) * found_NT / (num_train * count)).to(dtype)
            outputs_T += wanted.outputs / count
        return Attribution(
            scores=ArrayScores(scores_NT),
            weights=torch.stack([span.weights for span in self.spans]).mean(0),
            outputs=outputs_T,
            info=about(passes, self.info),
            train_rows=passes.train,
            target_rows=target_rows,
        )


@dataclass(frozen=True, eq=False)
class _GaussNewton:
    """1/N Σ_j L''(f_j) ∇f_j∇f_jᵀ in the span's coordinates; the last one, outside of the span, it maps to 0."""

    root: Tensor
    curvature: Tensor

    def __call__(self, vectors: Tensor) -> Tensor:
        """Vectors [t, N + 1] -> H times each."""
        count = len(self.root)
        along_tN = vectors[:, :count] @ self.root.T * (self.curvature / count)
        out = torch.zeros_like(vectors)
        torch.mm(along_tN, self.root, out=out[:, :count])
        return out


def fit_in_span(passes: Passes, *, solver: Mapping[str, Any], info: Mapping[str, Any]) -> FittedSpanInfluence:
    """The spans of all checkpoints.

    Raises:
        InputError: a task whose q is not a function of f.
        TrakError: see `training_span`.
    """
    spans = []
    for index, state in enumerate(passes.states()):
        span = training_span(passes, state, where=f"checkpoint {index + 1} of {len(passes.sources)}")
        loss_curvature(passes.setting.task, span.outputs, span.weights)  # or refuse now
        spans.append(span)
    return FittedSpanInfluence(passes, tuple(spans), dict(solver), dict(info))
