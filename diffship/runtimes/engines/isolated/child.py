"""The process that computes: `python -m diffship.runtimes.engines.isolated.child ENGINE OPTIONS`, asked over stdin.

What engines print goes to stderr. It ends when its stdin does: when it is closed, or when whoever asks is gone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from diffship.core.child import kinds
from diffship.core.errors import DiffshipError, RunnerError
from diffship.runtimes.engines.engine import Engine, Session, first_line, make_engine
from diffship.runtimes.engines.isolated.frames import receive, send

Reply = tuple[dict[str, Any], Sequence[np.ndarray]]
_LOOK_SECONDS = 1.0


class Sessions:
    """Opened files by number."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._opened: dict[int, Session] = {}

    def answer(self, asked: dict[str, Any], arrays: Sequence[np.ndarray]) -> Reply:
        """The reply to `asked` ("open", "run" or "close"); an error of any kind becomes a reply, too.

        If an error ended this process, the other requests of the batch would fail with it, and every open session be
        lost.
        """
        try:
            return getattr(self, f"_{asked['do']}")(asked, arrays)  # type: ignore[no-any-return]
        except DiffshipError as fault:
            return {"error": kinds(fault), "message": str(fault)}, ()
        except MemoryError as fault:
            return {"error": [RunnerError.__name__], "message": f"not enough memory: {first_line(fault)}"}, ()
        except Exception as fault:
            traceback.print_exc()  # on stderr, where the log is
            message = f"the engine failed: {type(fault).__name__}: {first_line(fault)}"
            return {"error": [RunnerError.__name__], "message": message}, ()

    def _open(self, asked: dict[str, Any], arrays: Sequence[np.ndarray]) -> Reply:
        session = self._engine.open([Path(file) for file in asked["files"]])
        self._opened[asked["session"]] = session
        return {"inputs": dict(session.inputs), "outputs": dict(session.outputs)}, ()

    def _run(self, asked: dict[str, Any], arrays: Sequence[np.ndarray]) -> Reply:
        feeds = dict(zip(asked["feeds"], arrays, strict=True))
        made = self._opened[asked["session"]].run(feeds, asked["outputs"])
        return {}, [np.ascontiguousarray(array) for array in made]

    def _close(self, asked: dict[str, Any], arrays: Sequence[np.ndarray]) -> Reply:
        self._opened.pop(asked["session"]).close()
        return {}, ()


def end_with(parent: int) -> None:
    """End this process when its parent has ended: during a call nobody reads stdin, and so nobody sees that it is
    closed."""
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os._exit(1)


def main(words: Sequence[str]) -> None:
    """Answer until nobody asks any more."""
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    # Ctrl-C and a service manager's SIGTERM reach every process of a group; the one that asks decides when to end
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # closing tries once more to send what was left of an answer that nobody takes
    with suppress(BrokenPipeError), os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        sessions = Sessions(make_engine(words[0], json.loads(words[1])))
        while True:
            try:
                # no timeout: it is asked when there is something to ask, and ends with who asks
                send(answers, *sessions.answer(*receive(sys.stdin.buffer)))
            except (EOFError, BrokenPipeError):
                break
    # an engine's own threads must not hold up the end
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
