"""TRAKer: the protocol of the paper's slides and of the released package `traker`, a thin face over the pipeline.

Cursors and "the checkpoint at hand" are state that this protocol prescribes; everything else is in the store and is the same for
`trak.attribute`.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trak import batches
from trak.errors import InputError, MissingRowsError, ProtocolError
from trak.gradients import Gradients
from trak.logs import logger
from trak.methods.runs import (
    DEFAULT_SHARD_ROWS,
    RunOptions,
    load_state,
    make_header,
    register,
    resolve_setting,
)
from trak.methods.trak import stored_attribution
from trak.methods.weights import member_weights, resolve_curvature, resolve_exponent
from trak.pipeline import Projector, Setting, fit, has_moments, prepare, verify
from trak.precondition import Damping, FixedDamping, resolve_damping
from trak.projection import Projection
from trak.results import Attribution
from trak.store import RowSet, Writer, open_store
from trak.tasks import Task

DEFAULT_EXPERIMENT = "default"


@dataclass
class _Session:
    """Between load_checkpoint (or start_scoring_checkpoint) and the last batch: where the batches go."""

    model_id: int
    projector: Projector
    rows: RowSet
    writer: Writer
    cursor: int = 0
    experiment: str | None = None


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
        projector: a `trak` projection; None for `proj_dim` columns of the default kind.
        proj_dim: K; None for the default for this model's size.
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
        self._damping = _damping(lambda_reg, setting.shapes, self._header.dim)
        if isinstance(lambda_reg, (int, float)):
            gram = "uniform" if gram is None else gram
            weight_exponent = 1.0 if weight_exponent is None else weight_exponent
        self._weight_exponent = resolve_exponent(weight_exponent, setting.task)
        self._curvature = resolve_curvature(gram, setting.task, self._weight_exponent)
        self._store = open_store(save_dir, self._header, shard_rows=DEFAULT_SHARD_ROWS)
        self._model_ids: list[int] = list(self._store.checkpoints()) if load_from_save_dir else []
        self._session: _Session | None = None
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

    def featurize(self, batch: Any, inds: Any = None, num_samples: int | None = None) -> None:
        """Project the gradients of a batch of training examples and store them.

        Args:
            batch: as the task expects it.
            inds: the rows of these examples in the training set, [B], in any order. Or:
            num_samples: take the next rows in order. A last batch may be shorter than that.

        Rows that are stored already are not computed again; their outputs are compared, so that other data do not pass for the same.

        Raises:
            ProtocolError: no checkpoint is loaded.
            InputError: neither or both of inds and num_samples, or rows that do not exist.
            StoreError: rows that are stored already, from other data.
        """
        session = self._session
        if session is None or session.experiment is not None:
            raise ProtocolError(
                "featurize() needs a checkpoint: call load_checkpoint(checkpoint, model_id=…) first"
            )
        self._add(session, batch, inds, num_samples, what="training row")

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
        chosen = self._chosen(model_ids, step="finalize_features")
        for model_id in chosen:
            self._preconditioner(model_id, len(chosen))

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
        self._require_finalized(model_id)
        self._store.add_experiment(exp_name, num_targets)
        self._begin(model_id, state, experiment=exp_name)

    def score(self, batch: Any, inds: Any = None, num_samples: int | None = None) -> None:
        """Project the gradients of a batch of targets and store them; arguments and errors as for `featurize`."""
        session = self._session
        if session is None or session.experiment is None:
            raise ProtocolError(
                "score() needs a checkpoint and targets: call start_scoring_checkpoint(exp_name, checkpoint, model_id, num_targets) first"
            )
        self._add(session, batch, inds, num_samples, what="target")

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
        if exp_name not in self._store.experiments():
            raise ProtocolError(
                f"no experiment {exp_name!r} (known: {self._store.experiments() or 'none'}): call start_scoring_checkpoint and score first"
            )
        chosen = self._scored(exp_name, self._chosen(model_ids, step="finalize_scores"), allow_skip)
        for model_id in chosen:
            self._require_finalized(model_id)
        preconditioners = [self._preconditioner(model_id, len(chosen)) for model_id in chosen]
        info = {
            "method": "TRAK",
            "experiment": exp_name,
            "num_checkpoints": len(chosen),
            "projection": dict(self._header.projection),
            "damping_rule": self._damping.fingerprint(),
            "curvature_exponent": self._curvature,
            "weight_exponent": self._weight_exponent,
        }
        return stored_attribution(
            self._store,
            chosen,
            exp_name,
            preconditioners,
            member_weights(self._store, chosen, self._weight_exponent),
            device=self._setting.device,
            progress=None,
            info=info,
        )

    def _begin(self, model_id: int, state: Any, *, experiment: str | None) -> None:
        self._end()
        rows = self._store.rows(model_id, experiment)
        writer = rows.writer()
        projector = Projector(self._session_setting(experiment), state, model_id)
        self._session = _Session(model_id, projector, rows, writer, experiment=experiment)
        # Also at the interpreter's exit: rows that wait for their shard to fill must not be lost.
        self._flush = weakref.finalize(self, writer.close)

    def _session_setting(self, experiment: str | None) -> Setting:
        """That of training rows, or that of targets."""
        return self._setting.for_training if experiment is None else self._setting

    def _end(self) -> None:
        """Write what is still in memory."""
        session, self._session = self._session, None
        if session is not None:
            self._flush.detach()
            session.writer.close()

    def _register(self, state: Any, model_id: int | None) -> int:
        if model_id is None:
            model_id = register(self._store, state)
        else:
            from trak.checkpoints import checkpoint_hash

            self._store.add_checkpoint(model_id, checkpoint_hash(state))
        if model_id not in self._model_ids:
            self._model_ids.append(model_id)
        return model_id

    def _add(self, session: _Session, batch: Any, inds: Any, num_samples: int | None, *, what: str) -> None:
        size = batches.batch_size(batch)
        rows_B = _row_numbers(session, size, inds, num_samples, what)
        setting = session.projector.setting
        separate = session.experiment is not None and self._setting.for_training is not self._setting
        # A batch of one example cannot show whether examples are mixed.
        if self._verified_size[separate] < min(size, 2):
            setting = verify(setting, session.projector.state, batch)
            self._setting = replace(self._setting, gradients=setting.gradients)
            self._verified_size[separate] = size
            session.projector = Projector(setting, session.projector.state, session.model_id)
        batch = prepare(self._setting, batch)
        stored_B = session.writer.has(rows_B)
        on_disk_B = session.rows.has(rows_B) if stored_B.any() else stored_B
        if on_disk_B.any():
            self._compare_stored(session, batch, rows_B, on_disk_B, what)
        if not stored_B.all():
            label = f"{what}s {int(rows_B.min())} to {int(rows_B.max())}"
            todo = (~stored_B).nonzero().squeeze(1)
            features_BK, outputs = session.projector(batches.take(batch, todo), label=label)
            session.writer.add(rows_B[todo], features_BK, outputs.f, outputs.q)
        if inds is None:
            session.cursor += size

    def _compare_stored(
        self, session: _Session, batch: Any, rows_B: Tensor, stored_B: Tensor, what: str
    ) -> None:
        """Stored rows must come from the same examples: their outputs, one forward pass, tell."""
        again_B = session.projector.outputs(batches.take(batch, stored_B.nonzero().squeeze(1)))
        before_B = session.rows.outputs_of(rows_B[stored_B])
        if not torch.allclose(again_B.double(), before_B.double(), rtol=1e-2, atol=1e-2):
            where = (
                f"experiment {session.experiment!r}"
                if session.experiment
                else f"checkpoint {session.model_id}"
            )
            raise InputError(
                f"{where} holds {what}s {int(rows_B.min())} to {int(rows_B.max())} from other data: the model outputs stored there differ from this "
                f"batch's by up to {float((again_B - before_B).abs().max()):.3g}. Use another "
                f"{'exp_name' if session.experiment else 'save_dir'} for other data; check that the loader does not shuffle"
            )

    def _scored(self, exp_name: str, model_ids: Sequence[int], allow_skip: bool) -> list[int]:
        complete = []
        for model_id in model_ids:
            missing = self._store.rows(model_id, exp_name).missing()
            if not missing:
                complete.append(model_id)
                continue
            message = f"experiment {exp_name!r}: checkpoint {model_id} has no features for targets {_range_text(missing)}"
            if not allow_skip:
                raise MissingRowsError(
                    f"{message}: call start_scoring_checkpoint and score for it, or pass model_ids, or allow_skip=True"
                )
            logger.warning("%s: left out", message)
        if not complete:
            raise ProtocolError(
                f"experiment {exp_name!r}: no checkpoint has all its targets: call start_scoring_checkpoint and score first"
            )
        return complete

    def _chosen(self, model_ids: Iterable[int] | None, *, step: str) -> list[int]:
        chosen = list(self._model_ids if model_ids is None else model_ids)
        if not chosen:
            raise ProtocolError(
                f"{step}() found no checkpoint: call load_checkpoint and featurize first, or pass model_ids of those in save_dir"
            )
        known = self._store.checkpoints()
        unknown = [model_id for model_id in chosen if model_id not in known]
        if unknown:
            raise ProtocolError(
                f"{step}(): checkpoints {unknown} were never featurized (known: {list(known)}): call load_checkpoint and featurize first"
            )
        return chosen

    def _require_finalized(self, model_id: int) -> None:
        rows = self._store.rows(model_id)
        if not rows.is_complete:
            raise ProtocolError(
                f"checkpoint {model_id} is not completely featurized: training rows {_range_text(rows.missing())} are missing. Call featurize for "
                "them, then finalize_features()"
            )
        if not has_moments(rows, [(0, self._header.dim)], self._curvature):
            raise ProtocolError(
                f"checkpoint {model_id} is featurized but not finalised: call finalize_features() before scoring"
            )

    def _preconditioner(self, model_id: int, num_checkpoints: int) -> Any:
        rows = self._store.rows(model_id)
        groups = [(0, self._header.dim)]
        return fit(
            rows,
            self._damping,
            groups,
            num_checkpoints=num_checkpoints,
            device=self._setting.device,
            where=f"checkpoint {model_id}",
            curvature_exponent=self._curvature,
        )


def _row_numbers(session: _Session, size: int, inds: Any, num_samples: int | None, what: str) -> Tensor:
    """The rows of a batch's examples, [B] int64."""
    total = session.rows.num_rows
    if (inds is None) == (num_samples is None):
        raise InputError(
            f"give exactly one of inds (the {what}s of this batch) and num_samples (the next ones in order)"
        )
    if inds is not None:
        given = torch.as_tensor(np.asarray(inds)).reshape(-1)
        if given.is_floating_point() or given.dtype == torch.bool:
            raise InputError(f"inds must be whole numbers, the {what}s of this batch; got {given.dtype}")
        rows = given.long()
        if len(rows) != size:
            raise InputError(f"inds has {len(rows)} entries and the batch {size} examples")
    else:
        rows = torch.arange(session.cursor, session.cursor + size)
        is_last = session.cursor + size == total
        if num_samples != size and not (is_last and num_samples is not None and size < num_samples):
            raise InputError(
                f"num_samples is {num_samples} and the batch has {size} examples; only the last batch may be shorter"
            )
    if int(rows.min()) < 0 or int(rows.max()) >= total:
        raise InputError(
            f"{what}s {int(rows.min())} to {int(rows.max())} do not exist: there are {total}. "
            "Was the loader run twice for one checkpoint, or is the size that was given too small?"
        )
    return rows


def _projection(shapes: Any, proj_dim: int | None, seed: int) -> Projection:
    from trak.projection import default_projection

    return default_projection(shapes, dim=proj_dim, seed=seed)


def _damping(lambda_reg: float | Damping | None, shapes: Any, dim: int) -> Damping:
    """The released package multiplies gradients by an unscaled ±1 matrix and divides by sqrt(P): its Gram is ours times K / P."""
    if lambda_reg is None or isinstance(lambda_reg, (Damping, str)):
        return resolve_damping("auto" if lambda_reg is None else lambda_reg)
    fixed = resolve_damping(lambda_reg)
    assert isinstance(fixed, FixedDamping)
    num_parameters = sum(int(torch.Size(shape).numel()) for shape in shapes.values())
    return FixedDamping(fixed.damping * num_parameters / dim)


def _range_text(missing: Sequence[tuple[int, int]]) -> str:
    shown = ", ".join(f"{start} to {stop - 1}" for start, stop in missing[:4])
    return shown + (f" and {len(missing) - 4} more ranges" if len(missing) > 4 else "")
