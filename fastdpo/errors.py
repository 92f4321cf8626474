"""Errors that a user can act on: one line, naming the row, column or option and the way out.

The command line prints them without a traceback and exits with status 2.
Anything else that escapes is a bug in fastdpo and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class FastDPOError(Exception):
    """Base of every error that the user, not fastdpo, can mend."""


class ConfigError(FastDPOError, ValueError):
    """An option is unknown, of the wrong type, outside its domain, or not supported."""


class DataError(FastDPOError, ValueError):
    """The dataset, or a row of it, cannot be used as it is."""


class ModelError(FastDPOError, ValueError):
    """The model, adapter or attention backend cannot do what was asked."""


class CheckpointError(FastDPOError, ValueError):
    """A checkpoint or output folder cannot be written, read or resumed."""


class MissingPackageError(FastDPOError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Returns `; did you mean 'beta'?` for the choice nearest to `name`, or an empty string."""
    nearest = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
