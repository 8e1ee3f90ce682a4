"""Who takes part in the peer benchmarks, and what each does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Contender:
    """One method of one package.

    Attributes:
        key: its name in the results.
        env: the environment it runs in; "main" for this project's own.
        runner, call: the script peers/run_RUNNER.py, and its entry there.
        label: for tables and pictures.
        does: what its time pays for.
        group: "floor", "ours", "all" (gradients of all parameters, projected), "layers" (gradients of linear and convolutional layers,
            projected) or "other" (other work).
        dense: whether it draws a dense projection matrix for every batch, and so takes one large batch.
        kinds: of cases it is asked to do; others are left out, not listed as errors.
    """

    key: str
    env: str
    runner: str
    call: str
    label: str
    does: str
    group: str
    dense: bool = False
    kinds: tuple[str, ...] = ("image", "text", "lm")


PLAIN = "plain"
PROJECTED = "gradients of all parameters, projected"
LAYERS = "gradients of the linear and convolutional layers' weights, projected"

CONTENDERS: tuple[Contender, ...] = (
    Contender(
        PLAIN, "torch", "plain", "plain", "plain pass", "forward and backward, as in training", "floor"
    ),
    Contender("ours-kronecker", "main", "ours", "kronecker", "ours, Kronecker", PROJECTED, "ours"),
    Contender(
        *("ours-eigenbasis", "main", "ours", "eigenbasis", "ours, Eigenbasis"),
        *(f"{PROJECTED}; eigenvectors fitted before", "ours"),
    ),
    Contender("ours-sparse", "main", "ours", "sparse", "ours, Sparse", PROJECTED, "ours"),
    Contender(
        *("ours-rademacher", "main", "ours", "rademacher", "ours, Rademacher", PROJECTED, "ours"), dense=True
    ),
    Contender("ours-layers", "main", "ours", "kronecker-layers", "ours, Kronecker, layers", LAYERS, "ours"),
    Contender("traker", "traker", "traker", "featurize", "traker", PROJECTED, "all", dense=True),
    Contender("dattri-trak", "dattri", "dattri", "trak", "dattri, TRAK", PROJECTED, "all", dense=True),
    Contender(
        *("dattri-logra", "dattri", "dattri", "logra", "dattri, LoGra"),
        *("gradients of the linear layers, projected", "layers"),
    ),
    Contender("bergson", "bergson", "bergson", "collect", "bergson", LAYERS, "layers"),
    Contender("logix", "logix", "logix", "gradients", "LogIX", LAYERS, "layers"),
    Contender(
        *("captum-gradients", "captum", "captum", "gradients", "Captum, TracInCP"),
        *("gradients of the layers and their norms; nothing projected or kept", "other"),
    ),
    Contender(
        *("captum-last", "captum", "captum", "last-layer", "Captum, TracInCPFastRandProj"),
        *("the last layer alone", "other"),
    ),
    Contender(
        *("kronfluence", "kronfluence", "kronfluence", "scores", "kronfluence, EK-FAC"),
        *("scores of 4 queries, factors fitted before; nothing kept", "other"),
    ),
    Contender(
        *("hf-plain", "bergson", "bergson", "plain", "plain pass, Hugging Face"),
        *("forward and backward of the model that bergson gets", "other"),
        kinds=("lm",),
    ),
)
