"""doctor: say which engines, exporters and packages work on this machine, and what to install for the others."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from diffship import __version__
from diffship.cli.output import Result, size_text, table
from diffship.targets.tensorrt.gpus import GPUS, LEGEND, capability_text

if TYPE_CHECKING:
    from packaging.requirements import Requirement

EXAMPLES = """examples:
  diffship doctor
  diffship doctor --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Only the common flags."""


def complete(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """All flags are known."""


def run(options: argparse.Namespace) -> Result:
    from diffship.runtimes.engines.engine import probe_all

    engines = [probe.to_json() for probe in probe_all()]
    extras = [_extra(name, requirements) for name, requirements in _extras().items() if name != "dev"]
    conflicts = [str(engine["conflict"]) for engine in engines if engine.get("conflict")]
    conflicts += [f"{name}: {text}" for entry in extras for name, text in entry["conflicts"].items()]
    machine = _machine()
    document = {"machine": machine, "engines": engines, "extras": extras, "conflicts": conflicts}
    return Result(document, _text(machine, engines, extras, conflicts), 1 if conflicts else 0)


def _machine() -> dict[str, Any]:
    return {
        "diffship": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "memory_bytes": _memory(),
        "free_disk_bytes": shutil.disk_usage(".").free,
    }


def _memory() -> int | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _extras() -> dict[str, list[Requirement]]:
    """Requirements of every extra, as the installed package declares them."""
    from importlib import metadata  # neither above: they are a seventh of the time of every --help

    from packaging.requirements import Requirement

    try:
        about = metadata.metadata("diffship")
    except metadata.PackageNotFoundError:
        return {}  # run from a folder that was not installed
    known = [Requirement(line) for line in about.get_all("Requires-Dist") or []]
    return {
        extra: [entry for entry in known if entry.marker and wanted_by(entry, extra)]
        for extra in about.get_all("Provides-Extra") or []
    }


def wanted_by(requirement: Requirement, extra: str) -> bool:
    """Whether a requirement is of this extra, on this machine."""
    marker = requirement.marker
    return marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


def _extra(name: str, requirements: Iterable[Requirement]) -> dict[str, Any]:
    from importlib import metadata

    installed, missing, conflicts = {}, [], {}
    for requirement in requirements:
        package = requirement.name
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            missing.append(package)
            continue
        installed[package] = version
        if not requirement.specifier.contains(version, prereleases=True):
            conflicts[package] = f"version {version} is installed, [{name}] needs {requirement.specifier}"
    return {
        "extra": name,
        "ready": not missing and not conflicts,
        "installed": installed,
        "missing": missing,
        "conflicts": conflicts,
        "install": f"pip install 'diffship[{name}]'",
    }


def _text(machine: dict[str, Any], engines: list[Any], extras: list[Any], conflicts: list[str]) -> str:
    memory = f", {size_text(machine['memory_bytes'])} memory" if machine["memory_bytes"] else ""
    lines = [
        f"diffship {machine['diffship']}, Python {machine['python']} ({sys.executable})",
        f"{machine['system']}, {machine['cores']} cores{memory}, {size_text(machine['free_disk_bytes'])} free here",
        "",
    ]
    rows = [
        (
            engine["engine"],
            "yes" if engine["available"] else "no",
            engine["version"],
            ", ".join(engine["devices"]),
            "" if engine["available"] else f"{engine['reason']}. {engine['install']}".strip(". "),
        )
        for engine in engines
    ]
    lines.append(table(("engine", "works", "version", "devices", "what to do"), rows))
    wanted = [
        (entry["extra"], "yes" if entry["ready"] else "no", "" if entry["ready"] else entry["install"])
        for entry in extras
    ]
    if wanted:
        lines += ["", table(("extra", "ready", "what to do"), wanted)]
    gpus = [(gpu.name, capability_text(gpu.sm), gpu.rtx, gpu.trt) for gpu in GPUS]
    lines += ["", table(("TensorRT engines for", "SM", "rtx", "trt"), gpus)]
    lines += [f"{word}: {meaning}" for word, meaning in LEGEND.items()]
    lines += [f"conflict: {conflict}" for conflict in conflicts]
    return "\n".join(lines)
