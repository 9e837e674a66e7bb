"""Run one measured subject in its own process, so that memory is its own and a crash is a row."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Measured:
    """Wall seconds, peak resident bytes of the process and its children, exit code and the end of the output."""

    seconds: float
    peak_bytes: int
    code: int
    output: str

    def document(self) -> dict[str, object]:
        """The last line of the output as JSON: how a subject reports figures of its own."""
        for line in reversed(self.output.strip().splitlines()):
            if line.startswith("{"):
                return dict(json.loads(line))
        raise ValueError(f"no JSON line in the output: {self.output[-400:]}")


def measure(command: Sequence[str], timeout: float, env: Mapping[str, str] | None = None) -> Measured:
    """Run `command` to its end or kill it after `timeout` seconds (exit code 124)."""
    started = time.monotonic()
    with subprocess.Popen(
        list(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **(env or {})}
    ) as process:
        peak = [0]
        watch = threading.Thread(target=_watch, args=(process, peak), daemon=True)
        watch.start()
        try:
            output, _ = process.communicate(timeout=timeout)
            code = process.returncode
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate(timeout=30)
            code = 124
        watch.join(timeout=5)
    return Measured(time.monotonic() - started, peak[0], code, output)


def _watch(process: subprocess.Popen[str], peak: list[int]) -> None:
    while process.poll() is None:
        peak[0] = max(peak[0], sum(resident_bytes(pid) for pid in _family(process.pid)))
        time.sleep(POLL_SECONDS)


def _family(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:
            continue
        for child in children:
            found += _family(int(child))
    return found


def resident_bytes(pid: int | str = "self") -> int:
    """Resident memory of one process, mapped file pages included: what `time -v` calls the resident set."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    fields = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    return 1024 * sum(int(fields.get(key, 0)) for key in ("RssAnon", "RssShmem", "RssFile"))
