"""docs/adding-a-target.md is a skeleton that runs: exporter, runner and the test to copy, as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "adding-a-target.md"
REGISTER = """
from diffship.core.registry import EXPORTERS, RUNNERS

EXPORTERS["mine"] = "mine_exporter:Mine"
RUNNERS["mine"] = "mine_runner:MineRunner"
"""


@pytest.mark.slow
def test_the_skeleton_of_the_page_runs(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("onnxruntime")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names = ("mine_exporter.py", "mine_runner.py", "test_mine.py")
    for name, block in zip(names, blocks, strict=True):
        (tmp_path / name).write_text(block, encoding="utf-8")
    (tmp_path / "conftest.py").write_text(REGISTER, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "test_mine.py"]
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr
