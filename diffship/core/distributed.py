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
    """Note that this process has left a distributed run, so that `end` skips the clean-up of C++ libraries."""
    _LEFT.append(True)


def end(code: int) -> NoReturn:
    """End the process with `code`, as `sys.exit` does.

    After a distributed run the clean-up of C++ libraries, which follows that of Python, may abort the process (it did
    in 5 of 36 runs on busy cores); `torchrun` then kills the processes that are still writing. So a process that has
    left such a run ends after Python's clean-up and before that of C++.
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
