"""A picture in two ways, in processes of their own, and what is said where one fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffship.benchmarks.measure.process import Measured
from diffship.benchmarks.studies.cost import low_memory
from diffship.benchmarks.studies.cost.low_memory import main, rows_of
from diffship.core.errors import ConfigError


def test_a_run_that_fails_is_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_memory, "measure", lambda command, timeout: Measured(1.0, 5, 2, "it is broken"))
    with pytest.raises(ConfigError, match=r"emoji, 64 px, 2 steps, as it is: ended with 2: it is broken"):
        list(rows_of(tmp_path, "emoji", 64, 2))


@pytest.mark.slow
def test_both_ways_are_measured(tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "low-memory.json"
    main(["--bundle", str(tiny_bundle), "--size", "64", "--steps", "1", "--out", str(out)])
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert {row["conditions"]["memory"] for row in rows} == {"as it is", "--memory low"}
    assert all(row["value"] > 0 for row in rows) and len(rows) == 4
