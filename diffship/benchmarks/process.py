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

from diffship.core.row import Row

POLL_SECONDS = 0.05
TIMEOUT_CODE = 124
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
    """Wall seconds, peak resident bytes of the process and its children, exit code and the end of the output."""

    seconds: float
    peak_bytes: int
    code: int
    output: str

    @property
    def status(self) -> str:
        """The status of a Row: ok, OOM (also where the system's killer struck) or failed."""
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


def failed_row(suite: str, subject: str, metric: str, unit: str, measured: Measured, kind: str = "latency") -> Row:
    """The row of a subject that did not finish."""
    return Row(suite, subject, metric, None, unit, measured.status, kind=kind, reason=measured.reason)


def _waited(process: subprocess.Popen[str], timeout: float, limit: int | None) -> tuple[int, int, str]:
    peak = [0]
    watch = threading.Thread(target=_watch, args=(process, peak, limit), daemon=True)
    watch.start()
    try:
        output, _ = process.communicate(timeout=timeout)
        code = process.returncode
    except subprocess.TimeoutExpired:
        _kill(process)
        output, _ = process.communicate(timeout=30)
        code = TIMEOUT_CODE
    watch.join(timeout=5)
    over = limit is not None and peak[0] > limit and code != TIMEOUT_CODE
    return peak[0], OVER_LIMIT_CODE if over else code, output


def _watch(process: subprocess.Popen[str], peak: list[int], limit: int | None) -> None:
    started = time.monotonic()
    while process.poll() is None:
        peak[0] = max(peak[0], sum(resident_bytes(pid) for pid in family(process.pid)))
        if limit is not None and peak[0] > limit:
            _kill(process)
        # a short process is looked at often, a long one seldom
        time.sleep(min(POLL_SECONDS, 0.002 + (time.monotonic() - started) / 20))


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


def resident_bytes(pid: int | str = "self") -> int:
    """Resident memory of one process, mapped file pages included: what `time -v` calls the resident set."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    fields = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    return 1024 * sum(int(fields.get(key, 0)) for key in ("RssAnon", "RssShmem", "RssFile"))


def _without_paths(line: str) -> str:
    """The line with every absolute path shortened to its last name: results say nothing of the machine's folders."""
    return re.sub(r"(?<![\w.])/(?:[^\s'\"/:]+/)+([^\s'\"/:]*)", r".../\1", line)
