"""Start a build, hear its progress, and turn its end into a result or an error."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

from diffship.core import child
from diffship.core.errors import DeadlineError, UnsupportedError
from diffship.core.job import Job
from diffship.exporters.tensorrt.build import Order

SILENT_SECONDS = 1800.0  # a builder tells each of its steps; one that says nothing for so long hangs
_ASK_SECONDS = 0.2
_END_SECONDS = 10.0  # that a process may take to end after its last word, or after it was killed


def run_build(order: Order, part: str, job: Job) -> dict[str, Any]:
    """What the build reports: seconds, peak_bytes, bytes, layers, version.

    Raises:
        UnsupportedError: the library refuses, or the process died (for want of memory, say).
        Cancelled: the job was stopped; so is the process.
        DeadlineError: the process said nothing for SILENT_SECONDS.
    """
    with _started(child.command("diffship.exporters.tensorrt.child", json.dumps(asdict(order)))) as process:
        found = _followed(process, part, job)
    if "made" in found:
        return dict(found["made"])
    if "fault" in found:
        raise child.restored(found["kinds"], found["fault"], UnsupportedError)
    said = f": {found['last']}" if found.get("last") else ""
    raise UnsupportedError(f"the build of {part} ended with code {process.returncode}{said}"[:600])


@contextmanager
def _started(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """Start a process for a `with` block; it has ended after the block, by itself or killed.

    `with Popen` would wait for it without a limit, and for its output as long as a child of it holds that open.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=child.environment(),
    )
    try:
        yield process
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_SECONDS)
    finally:
        process.kill()
        with suppress(subprocess.TimeoutExpired):  # deep in a driver: it goes when that lets it
            process.wait(_END_SECONDS)


def _followed(process: subprocess.Popen[str], part: str, job: Job) -> dict[str, Any]:
    """The last word of the process; its progress goes to the job."""
    found: dict[str, Any] = {}
    for line in _lines(process, part, job):
        document = _document(line)
        if "phase" in document:
            job.progress(f"build {part}: {document['phase']}", int(document["done"]), int(document["total"]))
        elif document:
            found = document
        elif line.strip() and "made" not in found:
            found = {"last": " ".join(line.split())[:300]}
    return found


def _lines(process: subprocess.Popen[str], part: str, job: Job) -> Iterator[str]:
    """What the process prints; the job is asked whether to go on, whether much is said or nothing.

    Raises:
        Cancelled: the job was stopped.
        DeadlineError: nothing came for SILENT_SECONDS.
    """
    said: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_hear, args=(process, said), daemon=True).start()
    heard = time.monotonic()
    while True:
        job.check()
        try:
            line = said.get(timeout=_ASK_SECONDS)
        except queue.Empty:
            if time.monotonic() - heard > SILENT_SECONDS:
                raise DeadlineError(
                    f"the build of {part} said nothing for {SILENT_SECONDS:g} s; it was stopped"
                ) from None
            continue
        if line is None:
            return
        heard = time.monotonic()
        yield line


def _hear(process: subprocess.Popen[str], said: queue.Queue[str | None]) -> None:
    assert process.stdout is not None  # it is a pipe
    with process.stdout as lines:  # closed here: who closes what another thread reads waits for it
        for line in lines:
            said.put(line)
    said.put(None)


def _document(line: str) -> dict[str, Any]:
    if not line.startswith("{"):
        return {}
    try:
        document = json.loads(line)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}
