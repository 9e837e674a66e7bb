"""Every error that diffship raises on purpose, and the exit code the command line gives it.

DiffshipError
├── ConfigError        2  a flag, recipe or argument is wrong
├── SourceError        2  a model source cannot be read as asked
├── UnsupportedError   3  right request, but not on this machine or not in this install
├── BundleError        1  a bundle is damaged, hostile or from another schema
├── ParityError        1  a compiled part does not compute the same thing
├── RunnerError        1  an engine refused a model or produced nonsense
├── HandoffError       1  trajectory bytes are damaged or do not fit the model
├── PeerError          4  another device went away
├── BusyError          4  no capacity right now
├── DeadlineError      4  out of time
└── Cancelled        130  the user or the caller stopped it
"""

from __future__ import annotations


class DiffshipError(Exception):
    """Base of the tree. The message says what was wrong, the value, what is legal, and the next command."""

    exit_code = 1


class ConfigError(DiffshipError):
    """A flag, recipe entry or argument is not legal."""

    exit_code = 2


class SourceError(DiffshipError):
    """A model source is missing, incomplete or in a form that is never read (pickle, remote code)."""

    exit_code = 2


class UnsupportedError(DiffshipError):
    """The request is legal, but this machine or this install cannot do it."""

    exit_code = 3


class BundleError(DiffshipError):
    """A bundle is damaged, hostile, or written by another schema."""


class ParityError(DiffshipError):
    """A compiled part misses its tolerance."""


class RunnerError(DiffshipError):
    """An engine refused a model, or its output is not finite."""


class HandoffError(DiffshipError):
    """Trajectory bytes are damaged, too large, or made for another model."""


class PeerError(DiffshipError):
    """Another device of the same generation went away."""

    exit_code = 4


class BusyError(DiffshipError):
    """No capacity right now; trying again later is right."""

    exit_code = 4


class DeadlineError(DiffshipError):
    """The time that was given is over."""

    exit_code = 4


class Cancelled(DiffshipError):
    """The user or the caller stopped the work between two steps."""

    exit_code = 130


class MissingExtra(UnsupportedError):
    """An optional dependency is not installed; the message holds the exact command."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed. Run: pip install 'diffship[{extra}]'")
        self.package = package
        self.extra = extra
