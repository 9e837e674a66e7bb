"""Any engine in a child process, behind the same two interfaces: `Opener` and `Session`."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from diffship.core import child
from diffship.core.errors import PeerError, RunnerError
from diffship.runtimes.engines.engine import Session, make_engine
from diffship.runtimes.engines.isolated.frames import receive, send

CALL_SECONDS = 600.0  # also for opening a file: the longest deadline that a request may have
_END_SECONDS = 5.0
_LOOK_SECONDS = 1.0
_ENDED = "the engine's process was ended"


class IsolatedEngine:
    """An engine whose sessions live in one child process, which starts when the first of them is opened.

    When that process dies, or a call takes longer than `call_seconds` and it is killed for that, the call raises
    PeerError, and so does every later one until `restart`. Calls of several threads take turns.
    """

    def __init__(
        self, name: str, options: Mapping[str, object] | None = None, call_seconds: float = CALL_SECONDS
    ) -> None:
        """Raises ConfigError: an unknown engine or option."""
        make_engine(name, options)  # wrong options are told here and not by a child
        self._command = child.command(f"{__package__}.child", name, json.dumps(dict(options or {})))
        self._call_seconds = call_seconds
        self._lock = threading.RLock()
        self._process: _Process | None = None
        self._killed = False
        self._sessions: dict[int, _Session] = {}
        self._count = 0

    def open(self, files: Sequence[Path]) -> Session:
        """As `Opener.open`; further raises PeerError if the process dies of it."""
        with self._lock:
            process = self._process or self._start()
            self._count += 1
            session = _Session(self, self._count, [str(Path(file).absolute()) for file in files])
            session.open(process)
            self._sessions[self._count] = session
            return session

    def alive(self) -> bool:
        """False once the process has died; true before it was needed."""
        process = self._process
        return process is None or process.alive()

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def restart(self) -> None:
        """Another process with the same files open.

        Raises:
            PeerError: that one died too.
            RunnerError: the engine refuses a file now.
        """
        with self._lock:
            if self._process is not None:
                self._process.end()
            process = self._start()
            try:
                for session in self._sessions.values():
                    session.open(process)
            except BaseException:
                process.end()  # half opened it would count as alive, and as ready
                raise

    def kill(self) -> None:
        """End the process at once and for good: a call that is under way in another thread raises PeerError."""
        self._killed = True  # before the look at the process: one that starts meanwhile sees it
        process = self._process
        if process is not None:
            process.kill()

    def close(self, session: _Session) -> None:
        """Forget a session; the process ends with the last one, and by force if it is long in a call."""
        busy = self._process
        if busy is not None:
            busy.settle()  # whoever is in a call may hold our lock too
        with self._lock:
            process = self._process
            if self._sessions.pop(session.number, None) is None or process is None:
                return
            if not self._sessions:
                process.end()
                self._process = None
                return
        with suppress(PeerError):
            process.ask({"do": "close", "session": session.number}, seconds=_END_SECONDS)

    def ask(self, header: Mapping[str, Any], arrays: Sequence[np.ndarray] = ()) -> list[np.ndarray]:
        """The arrays of an answer. Raises PeerError, and what the engine raises."""
        process = self._process
        if process is None:
            raise RunnerError("the model is closed; open it again")
        return process.ask(header, arrays)[1]

    def _start(self) -> _Process:
        """A process in place of the one there was. Raises PeerError: it was ended for good."""
        if self._killed:
            raise PeerError(_ENDED)
        process = self._process = _Process(self._command, self._call_seconds)
        if self._killed:  # since we looked
            process.kill()
        return process


class _Session:
    """A Session whose file is open elsewhere; constants stay here and travel with every call."""

    def __init__(self, engine: IsolatedEngine, number: int, files: Sequence[str]) -> None:
        self.number = number
        self.inputs: Mapping[str, str] = {}
        self.outputs: Mapping[str, str] = {}
        self._engine = engine
        self._files = files

    def open(self, process: _Process) -> None:
        found, _ = process.ask({"do": "open", "session": self.number, "files": self._files})
        self.inputs, self.outputs = found["inputs"], found["outputs"]

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> list[np.ndarray]:
        header = {"do": "run", "session": self.number, "feeds": list(feeds), "outputs": list(outputs)}
        return self._engine.ask(header, list(feeds.values()))

    def keep(self, array: np.ndarray) -> np.ndarray:
        return array

    def close(self) -> None:
        self._engine.close(self)


class _Process:
    """One child: it is asked, it answers, and once it has failed to it is gone for good."""

    def __init__(self, command: Sequence[str], seconds: float) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=child.environment()
        )
        self._seconds = seconds
        self._call: tuple[float, float] | None = None  # the one under way: when it began, what it may take
        self._lock = threading.Lock()
        self._reason = ""
        # one thread for all calls: to start one for each takes longer than a small call does
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        return not self._reason and self._process.poll() is None

    def ask(
        self, header: Mapping[str, Any], arrays: Sequence[np.ndarray] = (), seconds: float | None = None
    ) -> tuple[dict[str, Any], list[np.ndarray]]:
        """The answer; it is waited for `seconds` at most, by default what every call may take."""
        with self._lock:
            if self._reason:
                raise PeerError(self._reason)
            self._call = time.monotonic(), self._seconds if seconds is None else seconds
            try:
                send(self._stream("stdin"), header, arrays)
                # no timeout: `_watch` ends the process of a call that takes too long, and with it the pipe
                answer, made = receive(self._stream("stdout"))
            except (OSError, EOFError, ValueError) as fault:
                raise PeerError(self._gone(fault)) from None
            except BaseException as fault:  # out of memory, Ctrl-C: half a message lies in a pipe
                self._gone(fault)  # else the next call would get the rest of this one's answer
                raise
            finally:
                self._call = None
        if "error" in answer:
            raise child.restored(answer["error"], str(answer["message"]), RunnerError)
        return answer, made

    def settle(self) -> None:
        """Let the call that is under way end, if any, and end the process if that takes long."""
        if self._lock.acquire(timeout=_END_SECONDS):
            self._lock.release()
        else:
            self.kill()

    def kill(self) -> None:
        """End it at once; a call that is under way raises PeerError."""
        self._reason = self._reason or _ENDED
        self._process.kill()

    def end(self) -> None:
        """Close it, by force if it does not end by itself."""
        self._reason = self._reason or _ENDED  # no call begins any more
        self.settle()  # a stream that is read cannot be closed
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(_END_SECONDS)

    def _watch(self) -> None:
        """End the process when a call takes too long."""
        while self.alive():
            time.sleep(min(_LOOK_SECONDS, self._seconds / 4))
            call = self._call
            if call is not None and time.monotonic() - call[0] > call[1]:
                self._reason = f"the engine's process was ended: a call took more than {call[1]:g} s"
                self._process.kill()

    def _gone(self, fault: BaseException) -> str:
        """Why there will be no more answers; the process is ended if it is not."""
        if not self._reason:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)
            code = self._process.poll()
            how = f"ended with code {code}" if code is not None else f"answered with {fault or type(fault).__name__}"
            self._reason = f"the engine's process {how}"
        self._process.kill()
        self._process.wait(_END_SECONDS)
        return self._reason

    def _stream(self, name: str) -> Any:
        return getattr(self._process, name)
