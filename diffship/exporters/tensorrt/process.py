"""Start a build, hear its progress, and turn its end into a result or an error."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict
from typing import Any

from diffship.core import child
from diffship.core.errors import UnsupportedError
from diffship.core.job import Job
from diffship.exporters.tensorrt.build import Order


def run_build(order: Order, part: str, job: Job) -> dict[str, Any]:
    """What the build reports: seconds, peak_bytes, bytes, layers, version.

    Raises:
        UnsupportedError: the library refuses, or the process died (for want of memory, say).
        Cancelled: the job was stopped; so is the process.
    """
    command = child.command("diffship.exporters.tensorrt.child", json.dumps(asdict(order)))
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        env=child.environment(),
    ) as process:  # fmt: skip
        try:
            found = _followed(process, part, job)
        except BaseException:
            process.kill()
            raise
    if "made" in found:
        return dict(found["made"])
    if "fault" in found:
        raise child.restored(found["kinds"], found["fault"], UnsupportedError)
    said = f": {found['last']}" if found.get("last") else ""
    raise UnsupportedError(f"the build of {part} ended with code {process.returncode}{said}"[:600])


def _followed(process: subprocess.Popen[str], part: str, job: Job) -> dict[str, Any]:
    """The last word of the process; its progress goes to the job."""
    found: dict[str, Any] = {}
    for line in process.stdout or ():
        document = _document(line)
        if "phase" in document:
            job.progress(f"build {part}: {document['phase']}", int(document["done"]), int(document["total"]))
        elif document:
            found = document
        elif line.strip() and "made" not in found:
            found = {"last": " ".join(line.split())[:300]}
    return found


def _document(line: str) -> dict[str, Any]:
    if not line.startswith("{"):
        return {}
    try:
        document = json.loads(line)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}
