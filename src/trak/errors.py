"""Everything trak raises on purpose.

    TrakError (ValueError)
    ├── InputError                a bad argument: batch, dataset, labels, sizes
    │   └── ParameterError        `parameters=` selects nothing, or something that is not there
    ├── ProtocolError             a call out of order; the message names the missing step
    ├── GradientError             per-example gradients cannot be had, or failed their check
    │   ├── UnsupportedLayerError no rule covers a parameter
    │   └── MixedExamplesError    an example's output depends on its batch neighbours
    ├── NonFiniteError            NaN or infinity in outputs, gradients or features
    ├── ProjectionError           impossible dimension, unknown parameter, wrong block
    ├── CheckpointError           a checkpoint cannot be read or does not fit the model
    ├── StoreError                anything about features on disk
    │   ├── FingerprintError      the store was made with other settings (field-by-field difference)
    │   ├── MissingRowsError      rows a to b are not there
    │   └── CorruptShardError     a file is not what the manifest says
    ├── RetrainError              a model of a bank could not be trained (in trak.evaluation)
    ├── SingularGramError         the Gram matrix cannot be inverted; the message advises damping
    └── MissingDependencyError    (also ImportError) an optional package is needed

Messages say what was wrong, what was got, what was expected, and what to do next.
"""

from __future__ import annotations


class TrakError(ValueError):
    """Base of all errors that trak raises on purpose."""


class InputError(TrakError):
    """A bad argument."""


class ParameterError(InputError):
    """A selection of parameters that matches nothing, or names that do not exist."""


class ProtocolError(TrakError):
    """A call out of order."""


class GradientError(TrakError):
    """Per-example gradients cannot be computed, or failed their check."""


class UnsupportedLayerError(GradientError):
    """No layer rule covers a parameter."""


class MixedExamplesError(GradientError):
    """An example's output depends on the other examples of its batch."""


class NonFiniteError(TrakError):
    """NaN or infinity where a number must be."""


class ProjectionError(TrakError):
    """A projection that cannot be: its dimension, parameters or blocks."""


class CheckpointError(TrakError):
    """A checkpoint that cannot be read or does not fit the model."""


class StoreError(TrakError):
    """A feature store that cannot be used."""


class FingerprintError(StoreError):
    """A store made with other settings than those asked for."""


class MissingRowsError(StoreError):
    """Rows that are asked for and not stored."""


class CorruptShardError(StoreError):
    """A file that is not what the manifest says it is."""


class SingularGramError(TrakError):
    """A Gram matrix that is singular in working precision."""


class MissingDependencyError(TrakError, ImportError):
    """An optional package is needed for this feature."""
