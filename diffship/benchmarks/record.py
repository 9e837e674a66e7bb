"""A committed result: rows, the command and the machine that made them, and a digest that shows edits by hand."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from diffship.core.row import Row

SCHEMA = 1
PACKAGES = ("diffship", "numpy", "torch", "diffusers", "transformers", "onnx", "onnxruntime", "openvino")


def environment() -> dict[str, object]:
    """Processor, memory, threads, system, package versions and commit of this machine; no host name, no path."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count() or 1,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": _commit(),
    }


def write_result(
    file: Path, suite: str, command: str, rows: Sequence[Row], notes: Mapping[str, object] | None = None
) -> None:
    """Write one suite as JSON; `notes` says what a reader must know to repeat it."""
    listed = [asdict(row) for row in rows]
    content = {
        "schema": SCHEMA,
        "suite": suite,
        "command": command,
        "environment": environment(),
        "notes": dict(notes or {}),
        "rows": listed,
        "digest": rows_digest(listed),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def rows_digest(rows: Sequence[Mapping[str, object]]) -> str:
    """sha256 over the rows in canonical JSON."""
    text = json.dumps(list(rows), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
