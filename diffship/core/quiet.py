"""Timing and training do not overlap on one machine: a lock that measurements hold alone and trainings share.

On Linux and macOS; on other systems nothing is locked. The lock ends with its process, however that ends.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from diffship.core.errors import BusyError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PLACE = "DIFFSHIP_LOCK"  # another file than the one in the temporary folder
HELD = "DIFFSHIP_TIMED"  # set while something is timed here: its children belong to it
TRAINING_WAITS = 600.0
_AGAIN_SECONDS = 1.0


@contextmanager
def timing(what: str) -> Iterator[None]:
    """Nothing else is timed on this machine and nothing is trained, for a `with` block.

    Blocks may lie in each other, and in child processes.

    Raises:
        BusyError: a training runs, or something else is timed.
    """
    if HELD in os.environ or fcntl is None:
        yield
        return
    with _opened() as file:
        if not _taken(file, fcntl.LOCK_EX):
            raise BusyError(
                f"{what} is not timed now: {_who(file)}, and the two would slow each other. Try again later"
            )
        file.write(f"{what}, process {os.getpid()}")
        file.flush()
        os.environ[HELD] = what
        try:
            yield
        finally:
            del os.environ[HELD]
            file.truncate(0)


@contextmanager
def training(say: Callable[[str], object], wait: float = TRAINING_WAITS) -> Iterator[None]:
    """Nothing is timed on this machine, for a `with` block; any number of trainings may run.

    If something is timed, this waits for it, up to `wait` seconds, and says so.

    Raises:
        BusyError: it is still timed then.
    """
    if HELD in os.environ or fcntl is None:
        yield
        return
    end, told = time.monotonic() + wait, False
    with _opened() as file:
        while not _taken(file, fcntl.LOCK_SH):
            if time.monotonic() > end:
                raise BusyError(f"no training starts while {_who(file)}; waited {wait:.0f} s. Start it again later")
            if not told:
                say(f"{_who(file)}: the training waits for its end, at most {wait:.0f} s")
                told = True
            time.sleep(min(_AGAIN_SECONDS, wait))
        yield


def _opened() -> TextIO:
    place = os.environ.get(PLACE) or Path(tempfile.gettempdir()) / f"diffship-{os.getuid()}.lock"
    return open(place, "a+", encoding="utf-8")


def _taken(file: TextIO, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _who(file: TextIO) -> str:
    """Who holds it, in words."""
    file.seek(0)
    text = file.read(200)
    return f"something is timed ({text})" if text else "a training runs"
