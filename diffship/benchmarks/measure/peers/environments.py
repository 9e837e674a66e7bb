"""A virtual environment per peer, made from pinned requirements and found again by what is installed in it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from diffship.benchmarks.measure.peers.table import PEERS, Peer
from diffship.core.errors import PeerError

_VERSIONS = """
import importlib.metadata, json
print(json.dumps({d.metadata["Name"].lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}))
"""
_PIN = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?(?:==([A-Za-z0-9.+]+))?\Z")


def peer_python(name: str, root: Path, install: bool = True) -> Path:
    """The interpreter that runs a peer: ours, or that of `root/.venv-NAME`, made now if it is not complete.

    Raises:
        PeerError: it cannot be made; one line says why.
    """
    peer = PEERS[name]
    if not peer.then:
        _require_own(name)
        return Path(sys.executable)
    folder = root / f".venv-{name}"
    python = folder / "bin" / "python"
    if not missing(python, (*peer.first, *peer.then)):
        return python
    if not install:
        raise PeerError(f"{name} is not installed in .venv-{name}; run without --no-install to make it")
    for program in peer.needs:
        if shutil.which(program) is None:
            raise PeerError(f"{name} is built from source and needs {program}, which is not installed")
    _make(name, peer, folder, python)
    return python


def missing(python: Path, requirements: Sequence[str]) -> list[str]:
    """The requirements that the environment of `python` lacks or has at another version; all, if it does not run."""
    if not python.exists():
        return list(requirements)
    try:
        done = subprocess.run([python, "-c", _VERSIONS], capture_output=True, text=True, timeout=60, check=True)
        found = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return list(requirements)
    return [requirement for requirement in requirements if not _met(requirement, found)]


def versions(python: Path, names: Sequence[str]) -> dict[str, str]:
    """Installed versions of a peer's requirements, for the record."""
    done = subprocess.run([python, "-c", _VERSIONS], capture_output=True, text=True, timeout=60, check=True)
    found = json.loads(done.stdout)
    bare = [match[1].lower() for name in names if (match := _PIN.match(name))]
    return {name: found[name] for name in bare if name in found}


def isolated_path(folder: Path) -> Path:
    """A folder that holds this package alone, so that PYTHONPATH shows a peer nothing else of our environment."""
    folder.mkdir(parents=True, exist_ok=True)
    link, package = folder / "diffship", Path(__file__).parents[3]
    if not link.exists() or link.resolve() != package.resolve():
        link.unlink(missing_ok=True)
        link.symlink_to(package, target_is_directory=True)
    return folder


def _require_own(name: str) -> None:
    from diffship.runtimes.engines.engine import installed

    for package in ("torch", "diffusers", "transformers"):
        if not installed(package):
            raise PeerError(f"{name} needs {package}, which is not installed. Run: pip install 'diffship[torch]'")


def _make(name: str, peer: Peer, folder: Path, python: Path) -> None:
    if not python.exists():
        _run(name, [sys.executable, "-m", "venv", str(folder)], 300)
    for requirements in (peer.first, peer.then):
        if requirements and missing(python, requirements):
            # what was installed first stands again in the second step, so that nothing there replaces it
            _run(name, [str(python), "-m", "pip", "install", *peer.first, *requirements], peer.build_seconds)
    lacking = missing(python, (*peer.first, *peer.then))
    if lacking:
        raise PeerError(f"{name}: {lacking[0]} is still not there after it was installed")


def _run(name: str, command: list[str], timeout: float) -> None:
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout, env=env)
    except (OSError, subprocess.TimeoutExpired) as fault:
        raise PeerError(f"{name} cannot be installed: {type(fault).__name__} after at most {timeout:g} s") from None
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if "ERROR" in line or "error:" in line]
        raise PeerError(f"{name} cannot be installed: {(lines or ['pip failed without a word'])[0].strip()[:300]}")


def _met(requirement: str, found: dict[str, str]) -> bool:
    match = _PIN.match(requirement)
    if match is None:
        return False
    version = found.get(match[1].lower().replace("_", "-"))
    return version is not None and match[2] in (None, version.partition("+")[0])
