"""Scores of training examples for targets, and what people ask of them.

Shape legend: N training rows, T targets, S subsets, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trak.datasets import RowSource, as_rows
from trak.errors import InputError, MissingDependencyError
from trak.results.notebook import html_table
from trak.results.saved import check_save_folder, read_folder, write_folder
from trak.scores import Ranking, Scores
from trak.uncertainty import ThresholdedByError, standard_errors

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class Groups:
    """Scores summed over groups of training rows.

    Attributes:
        names: [G] the groups' labels, sorted.
        scores: [G, T] the sum of each group's scores: what removing the whole group would take from each target's output.
        sizes: [G] training rows in each group.
    """

    names: tuple[Any, ...]
    scores: Tensor
    sizes: Tensor


@dataclass(frozen=True, eq=False)
class Attribution:
    """Scores of N training examples for T targets, whichever method computed them.

    Attributes:
        scores: [N, T], computed or read where it is asked for; positive = the example raises the target's model output f.
        weights: q̄ [N], the mean loss weight of each training example (None where the method has none).
        outputs: f of each target, [T], mean over checkpoints (None where the method has none).
        info: how it was computed: method, settings, versions, JSON values only.
        members: each checkpoint's own scores, where the method averages over checkpoints.
        train_rows: the training examples, for showing them.
        target_rows: the targets, for showing them.
    """

    scores: Scores
    weights: Tensor | None = None
    outputs: Tensor | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    members: tuple[Scores, ...] = ()
    train_rows: RowSource | None = None
    target_rows: RowSource | None = None
    _self_influence: Callable[[], Tensor] | Tensor | None = None

    @property
    def num_train(self) -> int:
        """N."""
        return self.scores.num_train

    @property
    def num_targets(self) -> int:
        """T."""
        return self.scores.num_targets

    def top(self, k: int = 10) -> Ranking:
        """Proponents: the k training rows that raise each target's output most."""
        return self.scores.top(k)

    def bottom(self, k: int = 10) -> Ranking:
        """Opponents: the k training rows that lower each target's output most."""
        return self.scores.bottom(k)

    @property
    def standard_error(self) -> Scores:
        """The standard error of every score across checkpoints, [N, T], computed where it is read.

        A jackknife over checkpoints of the whole estimator (`trak.uncertainty`): how much the score would change with other checkpoints
        of the same kind, not how far it is from the truth, nor what another projection would change. With two or three checkpoints
        it is itself rough: of independent normal errors, a relative ±1/√(2(M − 1)). λ stays that of all M checkpoints.
        `attribution.standard_error.at(ranking.rows)` gives those of a ranking's rows.

        Raises:
            InputError: fewer than two checkpoints, or none known (a loaded attribution; a method that is no mean over checkpoints).
        """
        return standard_errors(self.members)

    def soft_threshold(self, z: float = 1.0) -> Attribution:
        """This attribution with every score shrunk towards 0 by z standard errors: sign(τ) · max(|τ| − z·SE, 0).

        Soft-thresholding as in Park et al. 2023, appendix A.2, with a threshold for each entry that follows from how much the
        checkpoints disagree on it. What is left are scores that stand out of that disagreement: for reading, and for sparse scores.
        It is no way to a better LDS, as sums over subsets average the disagreement away by themselves. On CIFAR-2, the LDS with 3
        checkpoints is .177 at z = 0, .174 at 0.5, .158 at 1 and .113 at 2; with 10 it is .232 at 0 and .235 at 0.5, at z = 1 that of
        z = 0, and at 2 lower by .03 (design/defaults.md).

        Args:
            z: standard errors to take off; 0 leaves the scores as they are.

        Returns:
            An attribution without members, weights of the same rows, and without self-influence.

        Raises:
            InputError: z below 0, or fewer than two checkpoints.
        """
        if not (isinstance(z, (int, float)) and math.isfinite(z) and z >= 0):
            raise InputError(f"z must be a finite number ≥ 0 of standard errors; got {z!r}")
        return replace(
            self,
            scores=ThresholdedByError(self.scores, self.standard_error, float(z)),
            members=(),
            info={**self.info, "soft_threshold_standard_errors": float(z)},
            _self_influence=None,
        )

    @property
    def has_self_influence(self) -> bool:
        """Whether the method defines self-influence (and it was saved, if this was loaded)."""
        return self._self_influence is not None

    def self_influence(self) -> Tensor:
        """Each training example's score for itself, [N]: large for atypical and mislabelled examples.

        Raises:
            InputError: the method does not define it, or it was not saved.
        """
        if self._self_influence is None:
            raise InputError(
                "this attribution has no self-influence: its method does not define it, or it was saved without it. Attribute with a method that "
                "does, such as trak.TRAK, or save with self_influence=True"
            )
        if not isinstance(self._self_influence, Tensor):
            object.__setattr__(self, "_self_influence", self._self_influence())
        assert isinstance(self._self_influence, Tensor)
        return self._self_influence

    def group(self, labels: Sequence[Any] | Tensor | np.ndarray) -> Groups:
        """Scores summed over groups: classes, sources, authors, dates.

        Args:
            labels: one per training row; anything sortable and hashable.

        Raises:
            InputError: another number of labels than training rows, or labels that cannot be told apart and put in order.
        """
        values = labels.tolist() if isinstance(labels, (Tensor, np.ndarray)) else list(labels)
        values = [
            value.item() if isinstance(value, Tensor) and value.ndim == 0 else value for value in values
        ]
        if len(values) != self.num_train:
            raise InputError(
                f"group() needs one label for each of the {self.num_train} training rows; got {len(values)}"
            )
        try:
            names = tuple(sorted(set(values)))
        except TypeError as error:
            kinds = ", ".join(sorted({type(value).__name__ for value in values}))
            raise InputError(
                f"labels must be all of one kind that can be put in order, such as strings or numbers; got {kinds} ({error}). Give rows "
                "that have none a label of their own"
            ) from error
        if any(name != name for name in names):
            raise InputError("labels hold NaN, which equals nothing: give these rows a label of their own")
        position = {name: index for index, name in enumerate(names)}
        index_N = torch.tensor([position[value] for value in values], dtype=torch.int64)
        sums_GT = torch.zeros(len(names), self.num_targets, dtype=torch.float64)
        for start, block_RT in self.scores.blocks():
            sums_GT.index_add_(0, index_N[start : start + len(block_RT)], block_RT.double())
        return Groups(names, sums_GT, torch.bincount(index_N, minlength=len(names)))

    def predict(self, masks: Tensor | np.ndarray) -> Tensor:
        """What training on each subset does to each target's output: Σ_{i∈S} τ_i, [S, T] float64.

        Up to a constant per target, the linear datamodel's prediction of f for a model trained on S. The predicted effect of
        removing a set is minus the prediction for that set.

        Args:
            masks: [S, N] (or [N] for one subset) booleans: which training rows are in.

        Raises:
            InputError: not booleans (or zeros and ones), or another number of columns than training rows.
        """
        masks_SN = torch.as_tensor(masks).cpu()
        masks_SN = masks_SN.unsqueeze(0) if masks_SN.ndim == 1 else masks_SN
        if masks_SN.ndim != 2 or masks_SN.shape[1] != self.num_train:
            raise InputError(
                f"masks must be [subsets, {self.num_train} training rows]; got {list(torch.as_tensor(masks).shape)}"
            )
        if masks_SN.dtype != torch.bool and not bool(((masks_SN == 0) | (masks_SN == 1)).all()):
            raise InputError(
                "masks must hold booleans (True where a training row is in the subset), not row numbers or weights"
            )
        total_ST = torch.zeros(masks_SN.shape[0], self.num_targets, dtype=torch.float64)
        for start, block_RT in self.scores.blocks():
            total_ST += masks_SN[:, start : start + len(block_RT)].double() @ block_RT.double()
        return total_ST

    def to_pandas(self, k: int = 10) -> pandas.DataFrame:
        """The k proponents and k opponents of each target as a table: target, kind, rank (from 1), row, score, standard_error.

        The last column is there where there are two or more checkpoints: those rows are read once more for it.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingDependencyError(
                "to_pandas needs pandas: pip install 'trak-attribution[pandas]'"
            ) from error

        parts = []
        top, bottom = self.scores.extremes(k)
        for kind, ranking in (("proponent", top), ("opponent", bottom)):
            targets, width = ranking.rows.shape
            columns = {
                "target": np.repeat(np.arange(targets), width),
                "kind": kind,
                "rank": np.tile(np.arange(1, width + 1), targets),
                "row": ranking.rows.reshape(-1).numpy(),
                "score": ranking.scores.reshape(-1).numpy(),
            }
            if len(self.members) > 1:
                errors_Tk = self.standard_error.at(ranking.rows)
                columns["standard_error"] = errors_Tk.reshape(-1).numpy()
            parts.append(pandas.DataFrame(columns))
        return pandas.concat(parts, ignore_index=True).sort_values(
            ["target", "kind", "rank"], ascending=[True, False, True], ignore_index=True
        )

    def save(self, path: str | Path, *, self_influence: bool = True) -> Path:
        """Write scores, weights, outputs, self-influence and provenance to a folder; see `load`.

        Args:
            path: the folder; made if it is not there. An attribution saved there before is replaced.
            self_influence: compute and save it too, where the method defines it (one pass over the features).

        Raises:
            StoreError: the folder holds something else.
        """
        folder = Path(path)
        check_save_folder(folder)  # before a pass over the features, not after
        own = self.self_influence() if self_influence and self.has_self_influence else None
        vectors = {"weights": self.weights, "outputs": self.outputs, "self_influence": own}
        write_folder(folder, self.scores, vectors, self.info)
        return folder

    @classmethod
    def load(cls, path: str | Path, *, train_set: Any = None, targets: Any = None) -> Attribution:
        """Read what `save` wrote; scores stay on disk and are read where they are asked for.

        Args:
            path: the folder.
            train_set: the training examples, if reports shall show them.
            targets: the targets, if reports shall show them.

        Raises:
            StoreError: no attribution there, a damaged one, or one of a newer format.
            InputError: another number of training examples or targets than it was made with.
        """
        folder = Path(path)
        saved = read_folder(folder)
        train_rows = None if train_set is None else as_rows(train_set, what="train_set")
        target_rows = None if targets is None else as_rows(targets, what="targets")
        for what, rows, expected in (
            ("train_set", train_rows, saved.scores.num_train),
            ("targets", target_rows, saved.scores.num_targets),
        ):
            if rows is not None and rows.num_rows != expected:
                raise InputError(
                    f"{what} has {rows.num_rows} rows, but the attribution in {folder} was made with {expected}; give the same data"
                )
        return cls(
            scores=saved.scores,
            weights=saved.vectors.get("weights"),
            outputs=saved.vectors.get("outputs"),
            info=saved.info,
            train_rows=train_rows,
            target_rows=target_rows,
            _self_influence=saved.vectors.get("self_influence"),
        )

    def report(self, path: str | Path = "trak-report.html", **options: Any) -> Path:
        """Write one self-contained HTML page: each target with its strongest proponents and opponents, and how they were computed.

        Args:
            path: where to write it.
            **options: see `trak.report.attribution_report`: k, targets, class_names, title, show_train, show_target.
        """
        from trak.report.attribution import attribution_report

        return attribution_report(self, path, **options)

    def __repr__(self) -> str:
        return f"Attribution(num_train={self.num_train}, num_targets={self.num_targets}, method={self.info.get('method')!r})"

    def _repr_html_(self, k: int = 5, max_targets: int = 8) -> str:
        """A small table for notebooks: strongest proponents and opponents of the first targets."""
        return html_table(self, k=k, max_targets=max_targets)
