"""Results carry their command, their machine and a digest; processes are measured with their children."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from diffship.benchmarks.process import measure
from diffship.benchmarks.record import environment, rows_digest, write_result
from diffship.core.row import Row

RESULTS = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*.json"))


def _row(value: float) -> Row:
    return Row(suite="s", subject="x", metric="m", value=value, unit="s", status="ok", environment={})


def test_a_result_says_where_it_comes_from(tmp_path: Path) -> None:
    write_result(tmp_path / "deep" / "r.json", "s", "make it", [_row(1.5)])
    content = json.loads((tmp_path / "deep" / "r.json").read_text(encoding="utf-8"))
    assert content["command"] == "make it"
    assert content["environment"]["cores"] >= 1
    assert content["digest"] == rows_digest(content["rows"])
    content["rows"][0]["value"] = 1.4
    assert content["digest"] != rows_digest(content["rows"])


def test_the_environment_names_no_host_and_no_path() -> None:
    text = json.dumps(environment())
    assert "/" not in text.replace("\\/", "")
    assert set(environment()) >= {"cpu", "memory_gib", "python", "packages"}


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_no_committed_result_was_edited_by_hand(file: Path) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["schema"] == 1
    assert content["digest"] == rows_digest(content["rows"])
    assert content["command"]


def test_memory_of_children_counts() -> None:
    child = "held = bytearray([1]) * 60_000_000; import time; time.sleep(0.5)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    measured = measure([sys.executable, "-c", program], timeout=30)
    assert measured.code == 0
    assert measured.peak_bytes > 60_000_000
    assert measured.seconds > 0.5


def test_a_subject_that_hangs_is_killed_and_said_to_be() -> None:
    measured = measure(
        [sys.executable, "-c", "import time; print('{\"a\": 1}', flush=True); time.sleep(60)"], timeout=1
    )
    assert measured.code == 124
    assert measured.document() == {"a": 1}
    with pytest.raises(ValueError, match="no JSON line"):
        measure([sys.executable, "-c", "print('nothing')"], timeout=30).document()
