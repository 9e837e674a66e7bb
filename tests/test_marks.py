"""Which tests a mark expression chooses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PROOFS = "benchmarks/test_benchmarks_proof.py"


@pytest.mark.slow
@pytest.mark.parametrize(("expression", "code"), [("not slow", 5), ("proof", 0)])  # 5: nothing collected
def test_proofs_run_only_when_asked_for(expression: str, code: int) -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-m", expression]
    done = subprocess.run([*command, str(TESTS / PROOFS)], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout[-2000:]
    assert ("test_whole_export_of_sd15" in done.stdout) == (code == 0)
