"""TRAKer: the protocol of the paper's slides and of the released package `traker`, a thin face over the pipeline.

Cursors and "the checkpoint at hand" are state that this protocol prescribes; everything else is in the store and is the same for
`trak.attribute`.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trak import batches
from trak.allocator import give_freed_memory_back, keep_freed_memory
from trak.datasets import as_rows
from trak.errors import InputError, ProtocolError
from trak.gradients import Gradients
from trak.methods.damping import damping_for
from trak.methods.factors import kept_factors, stored_factors
from trak.methods.finalizer import Finalizer
from trak.methods.runs import (
    DEFAULT_SHARD_ROWS,
    RunOptions,
    first_batch,
    load_state,
    make_header,
    register,
    resolve_setting,
)
from trak.methods.sessions import Session
from trak.methods.weights import resolve_curvature, resolve_exponent
from trak.precondition import Damping, FixedDamping, resolve_damping
from trak.projection import FittedProjection, Projection
from trak.projector import Projector
from trak.results import Attribution
from trak.setting import Setting, prepare, verify
from trak.store import open_store
from trak.tasks import Task

DEFAULT_EXPERIMENT = "default"


class TRAKer:
    """TRAK step by step.

        traker = TRAKer(model=model, task="image_classification", train_set_size=len(train_set))
        for model_id, checkpoint in enumerate(checkpoints):
            traker.load_checkpoint(checkpoint, model_id=model_id)
            for batch in train_loader:                      # not shuffled
                traker.featurize(batch=batch, num_samples=len(batch[0]))
        traker.finalize_features()
        for model_id, checkpoint in enumerate(checkpoints):
            traker.start_scoring_checkpoint("val", checkpoint, model_id=model_id, num_targets=len(val_set))
            for batch in val_loader:
                traker.score(batch=batch, num_samples=len(batch[0]))
        scores = traker.finalize_scores("val")               # [train, targets]

    Everything is kept in `save_dir`: a script that was interrupted can be run again and computes only what is missing, and a new
    process can score what another featurized. The model is never changed.

    Args:
        model: the architecture.
        task: as for `trak.attribute`.
        train_set_size: N.
        save_dir: where features and scores are kept; None for memory only.
        load_from_save_dir: whether checkpoints that are in `save_dir` from earlier runs take part in `finalize_features()` and
            `finalize_scores()` when no `model_ids` are given. Nothing there is ever deleted or overwritten.
        device: None for what the machine has.
        gradient_computer: a `trak` gradient source or its name.
        projector: a `trak` projection; None for `proj_dim` random columns: `trak.Sparse`, or `trak.Kronecker` beyond 50 million parameters.
            With `trak.Eigenbasis`, the default of `trak.attribute`, which is fitted to training gradients and predicts retraining
            better, call `fit_factors(train_set)` after each `load_checkpoint`.
        proj_dim: K; None for 4,096, or 8,192 beyond 50 million parameters.
        projector_seed: the projection's seed.
        use_half_precision: store features in float16 with a scale for each row; sums are in float32 either way.
        grad_wrt: names or patterns of the parameters to attribute through.
        lambda_reg: damping in the released package's units (its features are those of this library times sqrt(K / P)), 0 for none;
            None chooses it automatically, as `trak.attribute` does. Or an object such as `trak.RelativeDamping(0.1)`.
        gram, weight_exponent: as for `trak.attribute`. With a number for lambda_reg, None means the released package's formula: "uniform"
            and 1.
        proj_max_batch_size: accepted for compatibility: every batch size works, and gives the same features.
        logging_level: if given, the level of the logger "trak".
        saver, score_computer: not supported; must be None.

    Raises:
        InputError: a bad argument.
        FingerprintError: `save_dir` holds features made with other settings.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task | str | Callable[..., Tensor],
        train_set_size: int,
        save_dir: str | Path | None = "./trak_results",
        load_from_save_dir: bool = True,
        device: str | torch.device | None = None,
        *,
        gradient_computer: Gradients | str = "auto",
        projector: Projection | None = None,
        proj_dim: int | None = None,
        projector_seed: int = 0,
        use_half_precision: bool = False,
        grad_wrt: Iterable[str] | None = None,
        lambda_reg: float | Damping | None = None,
        gram: str | None = None,
        weight_exponent: float | None = None,
        proj_max_batch_size: int | None = None,
        logging_level: int | None = None,
        saver: None = None,
        score_computer: None = None,
    ) -> None:
        if saver is not None or score_computer is not None:
            raise InputError(
                "saver and score_computer of the released package cannot be used here: leave them out; features go to save_dir"
            )
        if isinstance(train_set_size, bool) or not isinstance(train_set_size, int) or train_set_size < 1:
            raise InputError(f"train_set_size must be a whole number ≥ 1; got {train_set_size!r}")
        if logging_level is not None:
            logging.getLogger("trak").setLevel(logging_level)
        self._options = RunOptions(
            model=model,
            task=task,
            projection=projector,
            parameters=None if grad_wrt is None else list(grad_wrt),
            gradients=gradient_computer,
            save_dir=save_dir,
            feature_dtype="float16" if use_half_precision else None,
            device=device,
        )
        setting = resolve_setting(self._options)
        if projector is None:
            setting = replace(setting, projection=_projection(setting.shapes, proj_dim, projector_seed))
        elif proj_dim is not None:
            raise InputError("give either projector or proj_dim: a projector has its own dimension")
        self._setting = setting
        self._header = make_header(setting, train_set_size, self._options.feature_dtype)
        damping = _damping(lambda_reg, setting, self._header.dim)
        if isinstance(lambda_reg, (int, float)):
            gram = "uniform" if gram is None else gram
            weight_exponent = 1.0 if weight_exponent is None else weight_exponent
        exponent = resolve_exponent(weight_exponent, setting.task)
        curvature = resolve_curvature(gram, setting.task, exponent)
        self._store = open_store(save_dir, self._header, shard_rows=DEFAULT_SHARD_ROWS)
        self._finalizer = Finalizer(self._store, damping, curvature, exponent, setting.device)
        self._model_ids: list[int] = list(self._store.checkpoints()) if load_from_save_dir else []
        self._session: Session | None = None
        # By whether targets are looked at: their output may be another than that of training rows.
        self._verified_size = {False: 0, True: 0}

    @property
    def model_ids(self) -> tuple[int, ...]:
        """The checkpoints that take part by default."""
        return tuple(self._model_ids)

    @property
    def proj_dim(self) -> int:
        """K."""
        return self._header.dim

    def load_checkpoint(self, checkpoint: Any, model_id: int | None = None) -> None:
        """Choose the checkpoint to featurize.

        Args:
            checkpoint: a state dict, a path, a module, or a function that returns one.
            model_id: its number, a part of the projection's key; None gives the number it had before, or the next free one.

        Raises:
            CheckpointError: it cannot be read or does not fit the model.
            FingerprintError: another checkpoint has this number.
        """
        state = load_state(self._options, self._setting, checkpoint)
        self._begin(self._register(state, model_id), state, experiment=None)

    def fit_factors(self, train_set: Any) -> None:
        """Fit the factors of a projection that is fitted to training gradients, such as `trak.Eigenbasis`, at this checkpoint.

        To be called after `load_checkpoint` and before `featurize`; other projections have none. Two passes over a sample of the training
        set; factors that are in `save_dir` already are used, and nothing is computed.

        Args:
            train_set: a DataLoader, a dataset, tensors or a re-iterable of batches, as for `trak.attribute`.

        Raises:
            ProtocolError: no checkpoint is loaded, or the projection is not fitted.
            InputError: a training set of another size.
            TrakError: gradients that cannot be had, or are not finite.
        """
        session = self._session
        if session is None or session.experiment is not None:
            raise ProtocolError(
                "fit_factors() needs a checkpoint: call load_checkpoint(checkpoint, model_id=…) first"
            )
        if not isinstance(self._setting.projection, FittedProjection):
            raise ProtocolError(
                f"{self._setting.projection!r} has no factors to fit: leave out fit_factors(), or pass projector=trak.Eigenbasis(4096)"
            )
        source = as_rows(train_set, what="train_set")
        if source.num_rows != self._header.num_rows:
            raise InputError(
                f"train_set has {source.num_rows} rows, and train_set_size is {self._header.num_rows}"
            )
        if session.projector.factors is None:
            batch = first_batch(source)
            self._verify(session, batch, batches.batch_size(batch))
        projector, label = session.projector, f"Checkpoint {session.model_id}"
        factors = kept_factors(
            projector.setting, projector.state, self._store, session.model_id, source, label=label
        )
        session.projector = Projector(projector.setting, projector.state, session.model_id, factors)

    def featurize(self, batch: Any, inds: Any = None, num_samples: int | None = None) -> None:
        """Project the gradients of a batch of training examples and store them.

        Args:
            batch: as the task expects it.
            inds: the rows of these examples in the training set, [B], in any order. Or:
            num_samples: take the next rows in order. A last batch may be shorter than that.

        Rows that are stored already are not computed again; their outputs are compared, so that other data do not pass for the same.

        Raises:
            ProtocolError: no checkpoint is loaded, or factors are to be fitted first.
            InputError: neither or both of inds and num_samples, or rows that do not exist.
            StoreError: rows that are stored already, from other data.
        """
        session = self._session
        if session is None or session.experiment is not None:
            raise ProtocolError(
                "featurize() needs a checkpoint: call load_checkpoint(checkpoint, model_id=…) first"
            )
        if isinstance(self._setting.projection, FittedProjection) and session.projector.factors is None:
            raise ProtocolError(
                f"{self._setting.projection!r} is fitted to training gradients: call fit_factors(train_set) after load_checkpoint() and before "
                "featurize()"
            )
        self._add(session, batch, inds, num_samples)

    def finalize_features(self, model_ids: Iterable[int] | None = None, del_grads: bool = False) -> None:
        """Compute the Gram matrix of each checkpoint's features, and see that it can be inverted.

        Args:
            model_ids: which checkpoints; None for all.
            del_grads: accepted for compatibility. The released package keeps a second, preconditioned copy of the features and can
                delete the first; here there is one copy, which scoring needs.

        Raises:
            ProtocolError: nothing was featurized.
            MissingRowsError: a checkpoint is not completely featurized; names the rows.
            SingularGramError: it cannot be inverted with this damping.
        """
        self._end()
        model_ids = self._model_ids if model_ids is None else model_ids
        chosen = self._finalizer.chosen(model_ids, step="finalize_features")
        for model_id in chosen:
            self._finalizer.preconditioner(model_id, len(chosen))

    def start_scoring_checkpoint(
        self,
        exp_name: Any = None,
        checkpoint: Any = None,
        model_id: int | None = None,
        num_targets: int | None = None,
    ) -> None:
        """Choose the checkpoint at which targets are featurized.

        Both `start_scoring_checkpoint(checkpoint, num_targets=…)` (the paper's slides) and
        `start_scoring_checkpoint(exp_name, checkpoint, model_id, num_targets)` (the released package) work.

        Args:
            exp_name: a name for this set of targets; "default" if left out.
            checkpoint: the same as for `load_checkpoint`.
            model_id: its number there; None to find it by its content.
            num_targets: T.

        Raises:
            ProtocolError: the checkpoint was not featurized, or `finalize_features` was not called.
            FingerprintError: the experiment exists with another number of targets.
        """
        if checkpoint is None:
            exp_name, checkpoint = DEFAULT_EXPERIMENT, exp_name
        if checkpoint is None or num_targets is None:
            raise InputError(
                "start_scoring_checkpoint needs a checkpoint and num_targets: start_scoring_checkpoint(exp_name, checkpoint, model_id, num_targets)"
            )
        exp_name = DEFAULT_EXPERIMENT if exp_name is None else exp_name
        state = load_state(self._options, self._setting, checkpoint)
        known = list(self._store.checkpoints())
        if model_id is not None and model_id not in known:
            raise ProtocolError(
                f"checkpoint {model_id} was never featurized (known: {known or 'none'}): call load_checkpoint and featurize first"
            )
        model_id = self._register(state, model_id)
        self._finalizer.require_finalized(model_id)
        self._store.add_experiment(exp_name, num_targets)
        self._begin(model_id, state, experiment=exp_name)

    def score(self, batch: Any, inds: Any = None, num_samples: int | None = None) -> None:
        """Project the gradients of a batch of targets and store them; arguments and errors as for `featurize`."""
        session = self._session
        if session is None or session.experiment is None:
            raise ProtocolError(
                "score() needs a checkpoint and targets: call start_scoring_checkpoint(exp_name, checkpoint, model_id, num_targets) first"
            )
        self._add(session, batch, inds, num_samples)

    def finalize_scores(
        self,
        exp_name: str = DEFAULT_EXPERIMENT,
        model_ids: Iterable[int] | None = None,
        allow_skip: bool = False,
    ) -> np.ndarray:
        """The scores of an experiment.

        Args:
            exp_name: the name given to `start_scoring_checkpoint`.
            model_ids: which checkpoints; None for all.
            allow_skip: leave out checkpoints whose targets are not all there, with a warning in the log, instead of raising.

        Returns:
            [train, targets] float32; with a `save_dir`, a read-only memory map of `scores/<exp_name>.npy` there.

        Raises:
            ProtocolError: nothing was scored under this name, or features are not finalised.
            MissingRowsError: targets are missing at some checkpoint; names the rows.
        """
        scores = self.attribution(exp_name, model_ids, allow_skip=allow_skip).scores
        if self._options.save_dir is None:
            return np.asarray(scores)
        path = scores.save(Path(self._options.save_dir) / "scores" / f"{exp_name}.npy")
        return np.load(path, mmap_mode="r")

    def attribution(
        self,
        exp_name: str = DEFAULT_EXPERIMENT,
        model_ids: Iterable[int] | None = None,
        *,
        allow_skip: bool = False,
    ) -> Attribution:
        """The scores of an experiment as an `Attribution`; arguments and errors as for `finalize_scores`."""
        self._end()
        model_ids = self._model_ids if model_ids is None else model_ids
        return self._finalizer.attribution(exp_name, model_ids, allow_skip=allow_skip)

    def _begin(self, model_id: int, state: Any, *, experiment: str | None) -> None:
        self._end()
        rows = self._store.rows(model_id, experiment)
        writer = rows.writer()
        factors = stored_factors(self._setting, self._store, model_id, is_needed=experiment is not None)
        projector = Projector(self._session_setting(experiment), state, model_id, factors)
        self._session = Session(model_id, projector, rows, writer, experiment=experiment)
        keep_freed_memory()
        # Also at the interpreter's exit: rows that wait for their shard to fill must not be lost.
        self._flush = weakref.finalize(self, writer.close)

    def _session_setting(self, experiment: str | None) -> Setting:
        """That of training rows, or that of targets."""
        return self._setting.for_training if experiment is None else self._setting

    def _end(self) -> None:
        """Write what is still in memory, and free what batches needed."""
        session, self._session = self._session, None
        if session is not None:
            self._flush.detach()
            session.writer.close()
            del session
            give_freed_memory_back()

    def _register(self, state: Any, model_id: int | None) -> int:
        if model_id is None:
            model_id = register(self._store, state)
        else:
            from trak.checkpoints import checkpoint_hash

            self._store.add_checkpoint(model_id, checkpoint_hash(state))
        if model_id not in self._model_ids:
            self._model_ids.append(model_id)
        return model_id

    def _add(self, session: Session, batch: Any, inds: Any, num_samples: int | None) -> None:
        size = batches.batch_size(batch)
        rows_B = session.row_numbers(size, inds, num_samples)
        self._verify(session, batch, size)
        session.add(prepare(self._setting, batch), rows_B)
        if inds is None:
            session.cursor += size

    def _verify(self, session: Session, batch: Any, size: int) -> None:
        """Check the gradients on the first batch; a batch of one example cannot show whether examples are mixed."""
        separate = session.experiment is not None and self._setting.for_training is not self._setting
        if self._verified_size[separate] >= min(size, 2):
            return
        projector = session.projector
        setting = verify(projector.setting, projector.state, batch)
        self._setting = replace(self._setting, gradients=setting.gradients)
        self._verified_size[separate] = size
        session.projector = Projector(setting, projector.state, session.model_id, projector.factors)


def _projection(shapes: Any, proj_dim: int | None, seed: int) -> Projection:
    from trak.projection import default_projection

    return default_projection(shapes, dim=proj_dim, seed=seed)


def _damping(lambda_reg: float | Damping | None, setting: Setting, dim: int) -> Damping:
    """The released package multiplies gradients by an unscaled ±1 matrix and divides by sqrt(P): its Gram is ours times K / P."""
    if lambda_reg is None or isinstance(lambda_reg, (Damping, str)):
        return damping_for("auto" if lambda_reg is None else lambda_reg, setting.projection, setting.task)
    fixed = resolve_damping(lambda_reg)
    assert isinstance(fixed, FixedDamping)
    num_parameters = sum(int(torch.Size(shape).numel()) for shape in setting.shapes.values())
    return FixedDamping(fixed.damping * num_parameters / dim)
