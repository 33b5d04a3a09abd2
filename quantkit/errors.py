"""What a user can cause, as exceptions: each message is one line that says which file, what is wrong and what to do.

The command line prints the message and exits with `exit_code`; a traceback appears only with `--debug`.
Our own mistakes are `assert`s, never a `QuantkitError`.
"""


class QuantkitError(Exception):
    """Base of everything a user can cause."""

    exit_code = 2


class CheckpointError(QuantkitError):
    """The source model is missing, damaged, unsupported or disagrees with its own config."""


class RecipeError(QuantkitError):
    """The recipe or an option of the command line asks for something that cannot be done."""


class FormatError(QuantkitError):
    """A quantized tensor cannot be stored in, or read from, the named on-disk format."""


class CorpusError(QuantkitError):
    """A text source is missing, empty, too short or not UTF-8."""


class ArtifactError(QuantkitError):
    """The output folder is in the way, in use, or belongs to a different run."""


class NumericsError(QuantkitError):
    """A weight or an activation is NaN or Inf."""


class ResourceError(QuantkitError):
    """Memory or disk ran out."""


class PeerError(ResourceError):
    """Another process of the same run is gone."""


class RequestError(QuantkitError):
    """A request to generate text asks for what this model, its cache or its sampler cannot do."""
