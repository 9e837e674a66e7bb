"""The machine that measured: what its results must say of it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

PACKAGES = ("diffship", "numpy", "torch", "diffusers", "transformers", "onnx", "onnxruntime", "openvino")
# What is made once and kept depends on: everything that computes or measures. (Of figures, see freshness.)
ROOMS = ("core", "sampling", "models", "kinds", "targets", "exporters", "runtimes", "export.py")
_MODULES = ("case", "ceiling", "child", "clock", "machine", "materials", "process", "peers", "turns")
MEASURING = tuple(f"benchmarks/measure/{name}" for name in _MODULES)


def environment() -> dict[str, object]:
    """Processor, GPU, memory, threads, system, versions, commit and date of this machine; no host name, no path."""
    gpu = gpus()
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count() or 1,
        "threads": threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [entry["name"] for entry in gpu],
        "gpu_memory_gib": [entry["memory_gib"] for entry in gpu],
        "driver": gpu[0]["driver"] if gpu else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def hardware(env: Mapping[str, Any]) -> str:
    """One name for the machine of an environment block: its GPU, or its processor with cores and memory."""
    if env.get("gpus"):
        return f"{env['gpus'][0]} ({env['gpu_memory_gib'][0]:g} GiB)"
    return f"{env['cpu']}, {env['threads']} threads, {env['memory_gib']:g} GiB"


def threads() -> int:
    """Threads that engines will use: OMP_NUM_THREADS if it is set, else the cores that this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(int(asked), allowed) if asked.isdigit() and int(asked) else allowed


@cache
def gpus() -> tuple[dict[str, Any], ...]:
    """Name, memory and driver of every NVIDIA GPU; empty if there is none."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    lines = (_output(query) or "").splitlines()
    cells = [[cell.strip() for cell in line.split(",")] for line in lines]
    return tuple(
        {"name": name, "memory_gib": round(float(memory) / 1024, 1), "driver": driver}
        for name, memory, driver in (row for row in cells if len(row) == 3)
    )


def code_digest(package: Path | None = None, names: Sequence[str] = (*ROOMS, *MEASURING)) -> str:
    """sha256 over the sources of these rooms and modules: the key of what is kept from one run to the next."""
    root = package or Path(__file__).parents[2]
    files = {file for name in names for file in _sources(root / name)}
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _sources(path: Path) -> list[Path]:
    file = path.with_suffix(".py")
    return [file] if file.is_file() else sorted(path.rglob("*.py"))


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return processor(lines) or platform.machine()


def processor(lines: Sequence[str]) -> str:
    """The name of the first processor of /proc/cpuinfo; empty without one.

    Its family and model stand beside it where they are told: virtual machines call all generations "AMD EPYC", and
    whose kernels are faster differs between those with and without AVX-512.
    """
    told: dict[str, str] = {}
    for line in lines:
        key, colon, value = line.partition(":")
        if colon:
            told.setdefault(key.strip(), value.strip())
    name, family, model = (told.get(key, "") for key in ("model name", "cpu family", "model"))
    return f"{name} (family {family}, model {model})" if name and family and model else name


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    return _output(["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"])


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
