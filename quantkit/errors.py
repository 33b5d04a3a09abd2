"""Exceptions for everything that a user can cause. A message is one line: which file or option, what is wrong, what to do.

The command line prints the message and exits with `exit_code`; a traceback appears only with `--debug`.
Bugs of quantkit are `assert`s, never a `QuantkitError`.
"""

#: Name of the distribution on PyPI. The package and the command are called quantkit.
DISTRIBUTION = "quantkit-llm"


def install_command(extra: str) -> str:
    """The command that installs an optional part ("serve", "bench", "demo", "lm-eval", "interop")."""
    return f'pip install "{DISTRIBUTION}[{extra}]"'


class QuantkitError(Exception):
    """Base class of all errors that a user can cause."""

    exit_code = 2


class CheckpointError(QuantkitError):
    """The source model is missing, damaged, not supported, or contradicts its own config."""


class RecipeError(QuantkitError):
    """The recipe or a command-line option asks for something impossible."""


class FormatError(QuantkitError):
    """A quantized tensor cannot be stored in, or read from, an on-disk format."""


class CorpusError(QuantkitError):
    """A text source is missing, empty, too short or not UTF-8."""


class ArtifactError(QuantkitError):
    """The output folder already exists, is in use, or belongs to a different run."""


class NumericsError(QuantkitError):
    """A weight or an activation is NaN or infinite."""


class ResourceError(QuantkitError):
    """Memory or disk ran out."""


class PeerError(ResourceError):
    """Another process of the same run has died."""


class RequestError(QuantkitError):
    """A request for text asks for something that the model, its cache or the sampler cannot do."""
