"""Processes of one distributed run, as `torchrun` starts them: which one writes, and how each of them ends."""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from typing import NoReturn

_LEFT: list[bool] = []  # not empty once this process has left a distributed run


def first_process() -> bool:
    """Whether this process is the one that writes; `torchrun` numbers them in RANK."""
    return os.environ.get("RANK", "0") == "0"


def note_left() -> None:
    """Say that this process has left a distributed run: `end` then spares it what C++ takes down."""
    _LEFT.append(True)


def end(code: int) -> NoReturn:
    """End the process with `code`, as `sys.exit` does.

    A process that has left a distributed run may abort in what C++ takes down behind the interpreter (5 of 36 runs on
    busy cores did), and `torchrun` then kills the processes that are still writing. Such a process ends before that,
    after everything that Python does at the end.
    """
    if _LEFT:
        atexit.register(_end_now, code)  # what is registered last is called first, and calls the others itself
    sys.exit(code)


def _end_now(code: int) -> None:
    atexit.unregister(_end_now)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)
