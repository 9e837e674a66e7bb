"""Child processes of this interpreter: how they are started, and how their errors come back."""

from __future__ import annotations

import os
import sys

from diffship.core import errors
from diffship.core.errors import DiffshipError


def command(module: str, *words: str) -> list[str]:
    """`python -m MODULE WORDS`; the current folder is not a place that it imports from."""
    return [sys.executable, "-P", "-m", module, *words]


def environment() -> dict[str, str]:
    """This process's, in which a child can import what this process can."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path)}


def kinds(fault: DiffshipError) -> list[str]:
    """The names of its classes, the nearest first: what `restored` reads."""
    return [kind.__name__ for kind in type(fault).__mro__]


def restored(names: list[str], message: str, default: type[DiffshipError]) -> DiffshipError:
    """An error of the nearest kind that takes a message alone, or of `default`."""
    for name in names:
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(kind, DiffshipError) and kind.__init__ is DiffshipError.__init__:
            return kind(message)
    return default(message)
