"""The end of TRAKer's protocol: from a store whose features are there to preconditioners and scores, and what is still missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from trak.errors import MissingRowsError, ProtocolError
from trak.logs import logger
from trak.methods.trak import stored_attribution
from trak.methods.weights import member_weights
from trak.pipeline import fit, has_moments
from trak.precondition import Damping, Preconditioner
from trak.results import Attribution
from trak.store import Store, ranges_text


@dataclass(frozen=True, eq=False)
class Finalizer:
    """A store with the settings that scores are made with.

    Attributes:
        store: with features.
        damping: the rule for λ.
        curvature_exponent: γ of R^γ in the Gram matrix.
        weight_exponent: γ of the weights q^γ.
        device: where products are formed.
    """

    store: Store
    damping: Damping
    curvature_exponent: float
    weight_exponent: float
    device: torch.device

    def attribution(self, exp_name: str, model_ids: Iterable[int], *, allow_skip: bool) -> Attribution:
        """The scores of an experiment.

        Args:
            exp_name: the targets' name.
            model_ids: the checkpoints.
            allow_skip: leave out checkpoints whose targets are not all there, with a warning in the log, instead of raising.

        Raises:
            ProtocolError: nothing was scored under this name, or features are not finalised.
            MissingRowsError: targets are missing at some checkpoint.
        """
        if exp_name not in self.store.experiments():
            raise ProtocolError(
                f"no experiment {exp_name!r} (known: {self.store.experiments() or 'none'}): call start_scoring_checkpoint and score first"
            )
        chosen = self._scored(exp_name, self.chosen(model_ids, step="finalize_scores"), allow_skip)
        for model_id in chosen:
            self.require_finalized(model_id)
        preconditioners = [self.preconditioner(model_id, len(chosen)) for model_id in chosen]
        info = {
            "method": "TRAK",
            "experiment": exp_name,
            "num_checkpoints": len(chosen),
            "projection": dict(self.store.header.projection),
            "damping_rule": self.damping.fingerprint(),
            "curvature_exponent": self.curvature_exponent,
            "weight_exponent": self.weight_exponent,
        }
        return stored_attribution(
            self.store,
            chosen,
            exp_name,
            preconditioners,
            member_weights(self.store, chosen, self.weight_exponent),
            device=self.device,
            progress=None,
            info=info,
        )

    def chosen(self, model_ids: Iterable[int], *, step: str) -> list[int]:
        """The checkpoints as a list.

        Raises:
            ProtocolError: there are none, or one was never featurized.
        """
        chosen = list(model_ids)
        if not chosen:
            raise ProtocolError(
                f"{step}() found no checkpoint: call load_checkpoint and featurize first, or pass model_ids of those in save_dir"
            )
        known = self.store.checkpoints()
        unknown = [model_id for model_id in chosen if model_id not in known]
        if unknown:
            raise ProtocolError(
                f"{step}(): checkpoints {unknown} were never featurized (known: {list(known)}): call load_checkpoint and featurize first"
            )
        return chosen

    def require_finalized(self, model_id: int) -> None:
        """Raise ProtocolError unless a checkpoint's training rows and their Gram matrix are there."""
        rows = self.store.rows(model_id)
        if not rows.is_complete:
            raise ProtocolError(
                f"checkpoint {model_id} is not completely featurized: training {ranges_text(rows.missing())} are missing. Call featurize for "
                "them, then finalize_features()"
            )
        if not has_moments(rows, [(0, self.store.header.dim)], self.curvature_exponent):
            raise ProtocolError(
                f"checkpoint {model_id} is featurized but not finalised: call finalize_features() before scoring"
            )

    def preconditioner(self, model_id: int, num_checkpoints: int) -> Preconditioner:
        """That of one of so many checkpoints; its Gram matrix is kept in the store."""
        return fit(
            self.store.rows(model_id),
            self.damping,
            [(0, self.store.header.dim)],
            num_checkpoints=num_checkpoints,
            device=self.device,
            where=f"checkpoint {model_id}",
            curvature_exponent=self.curvature_exponent,
        )

    def _scored(self, exp_name: str, model_ids: Sequence[int], allow_skip: bool) -> list[int]:
        complete = []
        for model_id in model_ids:
            missing = self.store.rows(model_id, exp_name).missing()
            if not missing:
                complete.append(model_id)
                continue
            message = f"experiment {exp_name!r}: checkpoint {model_id} has no features for target {ranges_text(missing)}"
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
