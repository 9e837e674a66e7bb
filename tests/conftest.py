from __future__ import annotations

import gc
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before torch is imported; children inherit it. Two threads on tiny tensors wait for each other more than they compute,
# and the workers of a parallel run would fight for the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from clean_clone import clean_clone
from filelock import FileLock

from diffship.cli.main import main

# What is timed in a test must not wait for the machine's own measurements, nor they for the test: each worker, a lock.
LOCKS = tempfile.TemporaryDirectory(prefix="diffship-lock-")
os.environ["DIFFSHIP_LOCK"] = str(Path(LOCKS.name) / "lock")

Command = Callable[..., dict[str, Any]]
ASKED_FOR = ("gpu", "mac", "soak", "proof")  # need another machine, or hours; proofs rewrite committed figures


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of ASKED_FOR run only where `-m` names their mark, so that `-m "not slow"` is what it seems."""
    words = set(re.findall(r"\w+", config.option.markexpr))
    unasked = [item for item in items if any(item.get_closest_marker(mark) for mark in ASKED_FOR if mark not in words)]
    if unasked:
        config.hook.pytest_deselected(items=unasked)
        items[:] = [item for item in items if item not in set(unasked)]


def pytest_collection_finish() -> None:
    """What collecting made stays: it is not looked through again by every later search for garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is remembered between runs lies with the other files of the tests."""
    os.environ["DIFFSHIP_CACHE"] = str(tmp_path_factory.getbasetemp() / "cache")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """`command("inspect", DIR)` runs a verb with --json here; its document, with `exit_code` and `stderr`."""

    def run(*words: object) -> dict[str, Any]:
        capsys.readouterr()
        code = main([*map(str, words), "--json"])
        captured = capsys.readouterr()
        return {**json.loads(captured.out), "exit_code": code, "stderr": captured.err}

    return run


@pytest.fixture
def rtx() -> Any:
    """The TensorRT-RTX library; tests that need it are skipped, with the reason, where it is not installed."""
    from diffship.core.errors import MissingExtra
    from diffship.targets.tensorrt.libraries import library

    try:
        return library("rtx")
    except MissingExtra as fault:
        pytest.skip(str(fault))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of a parallel run have in common."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def graphs_folder(shared: Path) -> Path:
    """Graphs that the tests of this run have made: an export of a seen architecture only streams weights."""
    return shared / "graphs"


@pytest.fixture(scope="session")
def tiny_bundle(shared: Path, graphs_folder: Path) -> Path:
    """`arch:tiny-sd` exported to ONNX and proved; read-only. The worker that asks first makes it."""
    pytest.importorskip("torch")
    folder = shared / "tiny"
    with FileLock(shared / "tiny.lock"):
        if not folder.exists():
            words = ["arch:tiny-sd", "--to", "onnx", "-o", str(folder), "--cache", str(graphs_folder)]
            assert main(["export", *words, "--quiet"]) == 0
    return folder


@pytest.fixture(scope="session")
def staged_bundle(shared: Path, graphs_folder: Path) -> Path:
    """`arch:tiny-sd` with its U-Net in two stages, exported to ONNX and proved; read-only."""
    pytest.importorskip("torch")
    folder = shared / "staged"
    with FileLock(shared / "staged.lock"):
        if not folder.exists():
            words = ["arch:tiny-sd", "--to", "onnx", "--stages", "2", "--cut", "speed", "-o", str(folder)]
            assert main(["export", *words, "--cache", str(graphs_folder), "--quiet"]) == 0
    return folder


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean clone called `diffship`, and its `.venv` as `make demo` leaves it (tests/clean_clone.py)."""
    return clean_clone(tmp_path_factory.mktemp("beside") / "diffship")
