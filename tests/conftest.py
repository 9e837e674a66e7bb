from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffship.cli.main import main

Command = Callable[..., dict[str, Any]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """`command("inspect", DIR)` runs a verb with --json here; its document, with `exit_code` and `stderr`."""

    def run(*words: object) -> dict[str, Any]:
        capsys.readouterr()
        code = main([*map(str, words), "--json"])
        captured = capsys.readouterr()
        return {**json.loads(captured.out), "exit_code": code, "stderr": captured.err}

    return run


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`arch:tiny-sd` exported to ONNX and proved; read-only."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    assert main(["export", "arch:tiny-sd", "--to", "onnx", "-o", str(folder), "--quiet"]) == 0
    return folder
