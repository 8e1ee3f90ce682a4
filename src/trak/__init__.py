"""trak: which training data made my model do this?

    attribution = trak.attribute(model, train_set, targets, task="image_classification", checkpoints=[...])
    attribution.top(10)

See `trak.attribute`, `trak.TRAKer` and https://arxiv.org/abs/2303.14186.
"""

from trak import evaluation
from trak._version import __version__
from trak.attribution import attribute
from trak.checkpoints import checkpoint_hash, list_checkpoints, load_checkpoint
from trak.errors import (
    CheckpointError,
    CorruptShardError,
    FingerprintError,
    GradientError,
    InputError,
    MissingDependencyError,
    MissingRowsError,
    MixedExamplesError,
    NonFiniteError,
    ParameterError,
    ProjectionError,
    ProtocolError,
    SingularGramError,
    StoreError,
    TrakError,
    UnsupportedLayerError,
)
from trak.gradients import Auto, Functional, Gradients, Hooked, Reference
from trak.methods.arnoldi import ArnoldiInfluence
from trak.methods.base import Attributor, FittedAttributor
from trak.methods.bm25 import BM25
from trak.methods.datamodel import Datamodel
from trak.methods.ekfac import EKFACInfluence
from trak.methods.empirical_influence import EmpiricalInfluence
from trak.methods.gradient_similarity import GradientSimilarity
from trak.methods.influence_function import InfluenceFunction
from trak.methods.knn_shapley import KNNShapley
from trak.methods.lissa import LiSSAInfluence
from trak.methods.monte_carlo_shapley import TruncatedMonteCarloShapley
from trak.methods.random import RandomScores
from trak.methods.representation_similarity import RepresentationSimilarity
from trak.methods.tracin import TracIn
from trak.methods.trak import TRAK
from trak.precondition import (
    AutomaticDamping,
    CrossValidationDamping,
    Damping,
    EffectiveDimensionDamping,
    EvidenceDamping,
    FixedDamping,
    MarquardtDamping,
    RelativeDamping,
)
from trak.projection import (
    Eigenbasis,
    Gaussian,
    Identity,
    Kronecker,
    Projection,
    Rademacher,
    Sparse,
    Whitened,
)
from trak.results import Attribution, Groups
from trak.scores import ArrayScores, Ranking, Scores
from trak.tasks import (
    CausalLM,
    ContrastivePairs,
    CustomTask,
    DenseClassification,
    Diffusion,
    DualEncoder,
    ImageClassification,
    MaskedLM,
    Regression,
    Seq2SeqLM,
    Task,
    TextClassification,
)
from trak.traker import TRAKer

__all__ = [
    "BM25",
    "TRAK",
    "ArnoldiInfluence",
    "ArrayScores",
    "Attribution",
    "Attributor",
    "Auto",
    "AutomaticDamping",
    "CausalLM",
    "CheckpointError",
    "ContrastivePairs",
    "CorruptShardError",
    "CrossValidationDamping",
    "CustomTask",
    "Damping",
    "Datamodel",
    "DenseClassification",
    "Diffusion",
    "DualEncoder",
    "EKFACInfluence",
    "EffectiveDimensionDamping",
    "Eigenbasis",
    "EmpiricalInfluence",
    "EvidenceDamping",
    "FingerprintError",
    "FittedAttributor",
    "FixedDamping",
    "Functional",
    "Gaussian",
    "GradientError",
    "GradientSimilarity",
    "Gradients",
    "Groups",
    "Hooked",
    "Identity",
    "ImageClassification",
    "InfluenceFunction",
    "InputError",
    "KNNShapley",
    "Kronecker",
    "LiSSAInfluence",
    "MarquardtDamping",
    "MaskedLM",
    "MissingDependencyError",
    "MissingRowsError",
    "MixedExamplesError",
    "NonFiniteError",
    "ParameterError",
    "Projection",
    "ProjectionError",
    "ProtocolError",
    "Rademacher",
    "RandomScores",
    "Ranking",
    "Reference",
    "Regression",
    "RelativeDamping",
    "RepresentationSimilarity",
    "Scores",
    "Seq2SeqLM",
    "SingularGramError",
    "Sparse",
    "StoreError",
    "TRAKer",
    "Task",
    "TextClassification",
    "TracIn",
    "TrakError",
    "TruncatedMonteCarloShapley",
    "UnsupportedLayerError",
    "Whitened",
    "__version__",
    "attribute",
    "checkpoint_hash",
    "evaluation",
    "list_checkpoints",
    "load_checkpoint",
]
