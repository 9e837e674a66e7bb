"""Several runs of one suite: how far their ratios lie apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from diffship.benchmarks.freshness import suite_digest
from diffship.benchmarks.measure.record import Results, read_result, save
from diffship.benchmarks.measure.row import Row
from diffship.benchmarks.studies.repeats import METRIC, main, repeats
from diffship.core.errors import ConfigError

ENVIRONMENT = {"cpu": "a", "threads": 2, "memory_gib": 24.0, "gpus": []}


def a_run(first: float, second: float | None) -> Results:
    def ratio(subject: str, value: float | None) -> Row:
        status = "ok" if value is not None else "failed"
        return Row("edge", subject, "call_seconds_ratio", value, status=status, conditions={"against": "torch"})

    rows = (ratio("emoji", first), ratio("sd15", second), Row("edge", "emoji", "call_seconds_p50", 1.0, "s"))
    return Results("edge", "again", "c0de", ENVIRONMENT, {}, rows)


def test_the_deviation_is_from_the_median_and_the_largest_stands_first() -> None:
    found = repeats([a_run(0.50, 0.8), a_run(0.52, 0.8), a_run(0.40, 1.0)])
    assert found.suite == "edge-repeats"
    assert [(row.subject, row.metric) for row in found.rows] == [("sd15", METRIC), ("emoji", METRIC)]
    assert found.rows[0].value == pytest.approx(0.25)
    assert found.rows[1].value == pytest.approx(0.2)
    assert (found.rows[1].low, found.rows[1].high, found.rows[1].n) == (0.40, 0.52, 3)


def test_a_ratio_that_a_run_lacks_is_no_repeat() -> None:
    assert [row.subject for row in repeats([a_run(0.5, None), a_run(0.5, 0.8)]).rows] == ["emoji"]


def test_runs_that_cannot_be_compared_are_refused() -> None:
    run = a_run(0.5, 0.8)
    with pytest.raises(ConfigError, match="at least two"):
        repeats([run])
    for other in (
        replace(run, code="other"),
        replace(run, suite="export"),
        replace(run, environment={**ENVIRONMENT, "cpu": "b"}),
    ):
        with pytest.raises(ConfigError, match="differ in suite, code or machine"):
            repeats([run, other])


def test_repeats_are_as_fresh_as_their_runs(tmp_path: Path) -> None:
    conditions = {"runner": "onnxruntime", "against": "diffusers"}
    row = Row("cpu-edge", "emoji", "call_seconds_ratio", 0.5, conditions=conditions)
    code = suite_digest("cpu-edge", ["onnxruntime"])
    run = Results("cpu-edge", "again", code, ENVIRONMENT, {}, (row,))
    assert repeats([run, run]).code == suite_digest("cpu-edge-repeats", ["onnxruntime"])
    old = replace(run, code="0" * 64)
    assert repeats([old, old]).code != suite_digest("cpu-edge-repeats", ["onnxruntime"])


def test_the_command_writes_a_results_file_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = [tmp_path / f"{number}.json" for number in (1, 2)]
    for file, value in zip(files, (0.5, 0.6), strict=True):
        save(file, a_run(value, 0.8))
    main([*map(str, files), "--out", str(tmp_path / "repeats.json")])
    found = read_result(tmp_path / "repeats.json")
    assert {row.subject: row.value for row in found.rows}["sd15"] == 0
    assert "9.1%" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"1.json", "2.json", "repeats.json"}
