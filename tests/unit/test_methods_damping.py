"""Automatic damping by the kind of features."""

import pytest
import torch
from torch import nn

import trak
from trak.errors import InputError
from trak.methods.damping import WHITENED_DIRECTIONS, damping_for
from trak.precondition import FixedDamping
from trak.tasks import resolve_task

TASK = resolve_task("image_classification")


def test_only_automatic_damping_of_leading_entries_is_another():
    eigenbasis = trak.Eigenbasis(4)
    assert damping_for("auto", eigenbasis, TASK) == trak.MarquardtDamping()
    # A row of another loss may hold many observations: no bound by the number of rows.
    language = trak.CausalLM()
    assert damping_for("auto", eigenbasis, language) == trak.MarquardtDamping(directions=None)
    assert damping_for("auto", trak.Sparse(4), language) == trak.AutomaticDamping()
    whitened = trak.Eigenbasis(4, whitening=1.0)
    assert damping_for("auto", whitened, TASK) == trak.AutomaticDamping(directions=WHITENED_DIRECTIONS)
    for projection in (trak.Sparse(4), trak.Whitened(trak.Sparse(4)), trak.Identity()):
        assert damping_for("auto", projection, TASK) == trak.AutomaticDamping()
    for given in (trak.AutomaticDamping(), trak.RelativeDamping(0.1)):
        assert damping_for(given, eigenbasis, TASK) is given
    assert damping_for(3.0, eigenbasis, TASK) == FixedDamping(3.0)
    with pytest.raises(InputError, match="damping must be a number"):
        damping_for("much", eigenbasis, TASK)


def test_the_one_call_and_the_protocol_use_it():
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    train = torch.randn(20, 5, dtype=torch.float64), torch.arange(20) % 3
    targets = torch.randn(4, 5, dtype=torch.float64), torch.arange(4) % 3
    found = trak.attribute(model, train, targets, task="image_classification", projection=trak.Eigenbasis(9))
    assert found.info["damping_rule"] == trak.MarquardtDamping().fingerprint()
    given = trak.attribute(
        model,
        train,
        targets,
        task="image_classification",
        projection=trak.Eigenbasis(9),
        damping=trak.MarquardtDamping(),
    )
    torch.testing.assert_close(found.scores.tensor(), given.scores.tensor(), rtol=0, atol=0)

    traker = trak.TRAKer(model, "image_classification", 20, None, projector=trak.Eigenbasis(9))
    traker.load_checkpoint(model.state_dict(), model_id=0)
    traker.fit_factors(train)
    traker.featurize(batch=train, num_samples=20)
    traker.finalize_features()
    traker.start_scoring_checkpoint("targets", model.state_dict(), model_id=0, num_targets=4)
    traker.score(batch=targets, num_samples=4)
    scores = torch.as_tensor(traker.finalize_scores("targets"))
    torch.testing.assert_close(scores, found.scores.tensor().to(scores), rtol=1e-6, atol=1e-9)
