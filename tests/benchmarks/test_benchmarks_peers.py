"""Peers' environments: found by what is installed in them, made from pins, and one line where that fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffship.benchmarks.measure.peers import environments
from diffship.benchmarks.measure.peers.environments import isolated_path, missing, peer_python
from diffship.benchmarks.measure.peers.table import PEERS, TORCH
from diffship.core.errors import PeerError


def test_pins_are_exact_and_torch_comes_first() -> None:
    for name, peer in PEERS.items():
        loose = [word for word in (*peer.first, *peer.then) if "==" not in word]
        assert loose in ([], ["accelerate"]), f"{name}: {loose}"
        assert not peer.first or peer.first[0] == TORCH


@pytest.mark.slow
def test_requirements_are_met_by_name_and_version() -> None:
    import numpy

    python = Path(sys.executable)
    assert missing(python, ["numpy", f"numpy=={numpy.__version__}"]) == []
    assert missing(python, ["numpy==0.0.1", "no-such-thing"]) == ["numpy==0.0.1", "no-such-thing"]
    assert missing(Path("/no/such/python"), ["numpy"]) == ["numpy"]


def test_a_peer_that_may_not_be_installed_says_so(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match=r"optimum is not installed in .venv-optimum; run without --no-install"):
        peer_python("optimum", tmp_path, install=False)
    assert list(tmp_path.iterdir()) == []


def test_a_build_without_its_tools_names_the_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PeerError, match="needs cmake, which is not installed"):
        peer_python("sdcpp", tmp_path)


def test_an_installation_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def fails(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        code = int("pip" in command)
        return subprocess.CompletedProcess(command, code, "", "WARNING: x\nERROR: no matching distribution\nmore")

    monkeypatch.setattr(environments.subprocess, "run", fails)
    with pytest.raises(PeerError) as fault:
        peer_python("optimum", tmp_path)
    assert str(fault.value) == "optimum cannot be installed: ERROR: no matching distribution"
    assert calls[-1][-1] == TORCH  # the first step; the second is not tried


def test_a_peer_of_our_own_environment_needs_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("diffship.runtimes.engines.engine.installed", lambda name: name != "torch")
    with pytest.raises(PeerError, match=r"needs torch.*pip install 'diffship\[torch\]'"):
        peer_python("diffusers", tmp_path)


def test_a_peer_sees_this_package_and_nothing_else_of_ours(tmp_path: Path) -> None:
    path = isolated_path(tmp_path / "only")
    assert isolated_path(tmp_path / "only") == path and [entry.name for entry in path.iterdir()] == ["diffship"]
    code = "import sys, diffship.benchmarks.measure.clock; print([m for m in sys.modules if m in ('numpy', 'torch')])"
    env = {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, "-S", "-c", code]  # -S: no site-packages, as in an environment that lacks ours
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("module", sorted({peer.child for peer in PEERS.values()}))
def test_children_import_with_the_standard_library_alone(module: str, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(isolated_path(tmp_path))}
    command = [sys.executable, "-S", "-c", f"import {module}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 0, done.stderr
