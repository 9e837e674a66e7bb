"""Run one measured subject in its own process, so that memory is its own, and a crash or OOM is a row."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 0.05
TIMEOUT_CODE = 124
RUSAGE_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
OVER_LIMIT_CODE = -1000  # no signal and no exit status has this number
# Sets the limit and becomes the subject: no moment in which it could allocate without one.
_LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[1]),) * 2)
os.execvp(sys.argv[2], sys.argv[2:])
"""
# What allocators of python, C++, torch, ONNX Runtime, OpenVINO and CUDA say when they fail.
_NO_MEMORY = re.compile(
    r"MemoryError|bad_alloc|can't allocate memory|CUDA out of memory|OutOfMemoryError|Cannot allocate memory"
    r"|Failed to allocate memory|failed to allocate|not enough memory|Out of memory",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Measured:
    """Wall seconds, peak memory, exit code and the end of the output.

    `peak_bytes` are the kernel's own high-water marks (VmHWM, ru_maxrss), not samples. Of a family of processes it is
    the sum of each one's mark: they need not have peaked together, so it is an upper bound.
    """

    seconds: float
    peak_bytes: int
    code: int
    output: str

    @property
    def status(self) -> str:
        """The status of a Row: ok, OOM (also if the system's killer struck) or failed."""
        if self.code == 0:
            return "ok"
        killed = self.code in (OVER_LIMIT_CODE, -signal.SIGKILL, 128 + signal.SIGKILL)
        return "OOM" if killed or _NO_MEMORY.search(self.output[-20_000:]) else "failed"

    @property
    def reason(self) -> str:
        """Why it is not ok, in one line: the last thing that it said."""
        if self.code == 0:
            return ""
        if self.code == OVER_LIMIT_CODE:
            return f"more than the memory limit: killed at {self.peak_bytes} bytes resident"
        if self.code == TIMEOUT_CODE:
            return f"out of time after {self.seconds:.0f} s"
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        return f"exit {self.code}: {_without_paths(lines[-1])[:300] if lines else 'no output'}"

    def document(self) -> dict[str, object]:
        """The last line of the output as JSON: how a subject reports figures of its own."""
        for line in reversed(self.output.strip().splitlines()):
            if line.startswith("{"):
                return dict(json.loads(line))
        raise ValueError(f"no JSON line in the output: {self.output[-400:]}")


def measure(
    command: Sequence[str],
    timeout: float,
    env: Mapping[str, str] | None = None,
    memory_limit: int | None = None,
    keep: Sequence[int] = (),
    on_start: Callable[[subprocess.Popen[str]], None] | None = None,
) -> Measured:
    """Run `command` to its end, or kill it and its children after `timeout` seconds or above `memory_limit` bytes.

    The limit holds for anonymous memory at once (RLIMIT_DATA, so that an allocation fails as on a smaller machine)
    and for resident memory within 50 ms; mapped files that are not in use do not count. The process keeps the open
    descriptors `keep`; `on_start` is given the process, for whoever may have to stop it from another thread.
    """
    started = time.monotonic()
    # no timeout: `_waited` has reaped it, or it is killed
    with subprocess.Popen(
        [*([] if memory_limit is None else [sys.executable, "-c", _LIMITED, str(memory_limit)]), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **(env or {})},
        start_new_session=True,  # so that children of the subject can be stopped with it
        pass_fds=tuple(keep),
    ) as process:
        try:
            if on_start is not None:
                on_start(process)
            peak, code, output = _waited(process, timeout, memory_limit)
        except BaseException:
            _kill(process)
            raise
    return Measured(time.monotonic() - started, peak, code, output)


def _waited(process: subprocess.Popen[str], timeout: float, limit: int | None) -> tuple[int, int, str]:
    """(peak bytes, exit code, output) of a process that is watched until it has ended, or is killed."""
    watch, output = _Watch(process.pid, limit), _Output(process)
    started = time.monotonic()
    late = over = False
    while not _ended(process, watch):
        watch.look()
        over = over or watch.over
        late = late or time.monotonic() - started > timeout
        if over or late:
            _kill(process)
        # a short process is looked at often, a long one seldom; the end of its output wakes us at once
        output.ended.wait(min(POLL_SECONDS, 0.002 + (time.monotonic() - started) / 20))
    if not output.complete(max(timeout - (time.monotonic() - started), 1.0)):  # a child holds it open
        late = True
        _kill(process)
    code = TIMEOUT_CODE if late else OVER_LIMIT_CODE if over else process.returncode
    return watch.peak, code, output.text()


def _ended(process: subprocess.Popen[str], watch: _Watch) -> bool:
    """Whether it has ended; reaped by `wait4`, which knows the largest process of its family that ever was."""
    if process.returncode is None:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if not pid:
            return False
        process.returncode = os.waitstatus_to_exitcode(status)
        watch.reaped(usage.ru_maxrss * RUSAGE_UNIT)
    return True


class _Output:
    """Reads what a process says, in a thread, so that its pipe never fills."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None  # it is a pipe
        self._stream, self._parts = process.stdout, list[str]()
        self.ended = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for line in self._stream:  # no timeout: whoever waits for this thread has one
                self._parts.append(line)
        finally:
            self.ended.set()

    def complete(self, seconds: float) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def text(self) -> str:
        self._thread.join(30)
        return "".join(self._parts)


class _Watch:
    """The high-water marks of a process and its descendants, and whether they are above a limit just now."""

    def __init__(self, pid: int, limit: int | None) -> None:
        self._pid, self._limit = pid, limit
        self._floor = memory_of("self").peak  # what ru_maxrss of a child starts from: it was once a part of us
        self._marks: dict[int, int] = {}
        self._largest = 0
        self.over = False

    @property
    def peak(self) -> int:
        return max(sum(self._marks.values()), self._largest)

    def look(self) -> None:
        now = 0
        for pid in family(self._pid):
            found = memory_of(pid)
            now += found.resident
            if found.peak:  # the last reading, not the largest: between fork and exec a child shows its parent's mark
                self._marks[pid] = found.peak
        self.over = self._limit is not None and now > self._limit

    def reaped(self, largest: int) -> None:
        """`largest`: ru_maxrss of the whole family. It counts if it is larger than this process ever was."""
        if largest > self._floor:
            self._largest = largest


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def family(pid: int) -> list[int]:
    """A process and all its descendants; any of them may end while it is looked at."""
    found = [pid]
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found
    for thread in threads:
        with suppress(OSError):
            for child in Path(f"/proc/{pid}/task/{thread}/children").read_text().split():
                found += family(int(child))
    return found


@dataclass(frozen=True)
class Memory:
    """Bytes of one process, mapped file pages included: resident now, and the most that ever were (VmHWM)."""

    resident: int
    peak: int


def memory_of(pid: int | str = "self") -> Memory:
    """What Linux says of a process; nothing of one that is gone, and on systems without /proc."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return Memory(0, 0)
    fields = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    resident = fields.get("VmRSS", 0)
    return Memory(resident, max(resident, fields.get("VmHWM", 0)))


def resident_bytes(pid: int | str = "self") -> int:
    """Resident memory of one process now: what `time -v` calls the resident set."""
    return memory_of(pid).resident


def _without_paths(line: str) -> str:
    """The line with every absolute path shortened to its last name: results say nothing of the machine's folders."""
    return re.sub(r"(?<![\w.])/(?:[^\s'\"/:]+/)+([^\s'\"/:]*)", r".../\1", line)
