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
    """The environment variables of this process, completed so that a child can import what this process can."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path)}


def kinds(fault: DiffshipError) -> list[str]:
    """Names of the classes of `fault`, the most derived first; `restored` reads them."""
    return [kind.__name__ for kind in type(fault).__mro__]


def restored(names: list[str], message: str, default: type[DiffshipError]) -> DiffshipError:
    """The error that a child reported: of the first class in `names` that takes a message alone, or of `default`."""
    for name in names:
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(kind, DiffshipError) and kind.__init__ is DiffshipError.__init__:
            return kind(message)
    return default(message)
