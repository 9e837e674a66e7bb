"""Processes that take turns: who is called when, what happens to the rest when one ends, and what their ratios say."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from diffship.benchmarks.measure import clock
from diffship.benchmarks.measure.case import Bench, Case, cases_of, sets
from diffship.benchmarks.measure.clock import TURNS, timed
from diffship.benchmarks.measure.figures import rows_of
from diffship.benchmarks.measure.session import Measurement, Outcome
from diffship.benchmarks.measure.turns import Job, take_turns

pytestmark = pytest.mark.skipif(os.name != "posix", reason="turns are taken by pipes")

# notes its calls in a file that all share, and takes as long as it is told
PLAYER = """
import sys, time
from diffship.benchmarks.measure.clock import report, timed
name, seconds, log = sys.argv[1], float(sys.argv[2]), sys.argv[3]
def call():
    with open(log, "a") as file:
        file.write(name)
    time.sleep(seconds)
report(timed(lambda: call, 99))
"""


def player(name: str, seconds: float, log: Path, program: str = PLAYER) -> Job:
    return Job([sys.executable, "-c", program, name, str(seconds), str(log)], {})


@pytest.mark.slow
def test_processes_call_in_turn_after_all_are_loaded(tmp_path: Path) -> None:
    log = tmp_path / "log"
    found = take_turns([player("a", 0.26, log), player("b", 0.27, log)], 3, 60)
    assert log.read_text(encoding="ascii") == "ab" + "ab" * 4  # the warm-ups, a turn without a clock, the turns
    for measured, least in zip(found, (0.26, 0.27), strict=True):
        figures = measured.document()
        assert measured.code == 0 and figures["seconds"] == figures["turns"] and len(figures["turns"]) == 3  # type: ignore[arg-type]
        assert min(figures["turns"]) >= least  # type: ignore[call-overload]


@pytest.mark.slow
def test_a_short_call_has_one_before_it_for_the_caches(tmp_path: Path) -> None:
    (measured,) = take_turns([player("a", 0.04, tmp_path / "log")], 3, 60)
    figures: Any = measured.document()
    calls = len((tmp_path / "log").read_text(encoding="ascii"))
    assert len(figures["turns"]) == 3 == len(figures["seconds"]) and calls == 1 + 1 + 3 * 2


ENDS = {
    "dies while it loads": "raise SystemExit('no')",
    "dies in its turn": PLAYER.replace("time.sleep(seconds)", "n = open(log).read().count(name); assert n < 4"),
    "knows of no turns": "print('{\"seconds\": [1]}')",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ENDS)
def test_one_that_ends_leaves_the_others_their_turns(case: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    first, odd, last = take_turns(
        [player("a", 0.26, log), player("x", 0.26, log, ENDS[case]), player("c", 0.26, log)], 3, 60
    )
    assert [first.code, last.code] == [0, 0] and (odd.code == 0) == (case == "knows of no turns")
    assert [len(found.document()["turns"]) for found in (first, last)] == [3, 3]  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_process_out_of_time_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    hangs = PLAYER.replace("time.sleep(seconds)", "time.sleep(0 if open(log).read().count(name) < 2 else 60)")
    begun = time.monotonic()
    slow, quick = take_turns([player("x", 0, tmp_path / "log", hangs), player("b", 0.26, tmp_path / "log")], 2, 6)
    assert (slow.code, quick.code) == (124, 0) and time.monotonic() - begun < 20


@pytest.mark.slow
def test_an_interruption_leaves_no_process_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    from diffship.benchmarks.measure import turns

    def interrupt(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(turns._Player, "turn", interrupt)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        take_turns([player("a", 0.01, log), player("b", 0.01, log)], 3, 60)
    assert threading.active_count() <= before


def test_a_long_call_takes_no_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "LONG_SECONDS", 0.05)
    ours, ready = os.pipe()
    monkeypatch.setenv(TURNS, f"{ours},{ready}")
    found: Any = timed(lambda: lambda: time.sleep(0.06), 3)
    assert found["seconds"] == [found["first"]] and found["turns"] == []
    os.close(ours)
    os.close(ready)


def test_sets_hold_the_first_with_all_others() -> None:
    bench = Bench(("toy",), tuple("abcde"), parts=("unet",))
    cases = cases_of(bench, {"toy": ("unet",)}, {})

    def names(together: int) -> list[str]:
        return ["".join(case.runner for case in members) for members in sets(cases, together)]

    assert names(1) == list("abcde") and names(2) == ["ab", "ac", "ad", "ae"]
    assert names(3) == ["abc", "ade"] and names(4) == ["abcd", "ae"] and names(5) == ["abcde"] == names(9)
    assert [[case.runner for case in members] for members in sets(cases[:1], 4)] == [["a"]]


def outcome(turns: list[float], place: tuple[int, int] = (0, 0), status: str = "ok") -> Outcome:
    return Outcome(status, figures={"seconds": turns, "turns": turns, "load": 1, "first": 1, "cold": 1}, place=place)


def ratios(outcomes: dict[str, list[Outcome]]) -> dict[str, tuple[float, int | None, Any]]:
    """{their runner: (ratio, rounds, pairs)} of `onnxruntime`."""
    from test_benchmarks_session import TOY

    bench = Bench(("toy",), ("onnxruntime",), tuple(outcomes)[1:], ("unet",))
    cases: list[Case] = cases_of(bench, {"toy": ("unet",)}, {})
    measurement = Measurement({case: outcomes[case.runner] for case in cases}, dict.fromkeys(cases, TOY), {})
    rows = [row for row in rows_of(measurement, "s") if row.metric == "call_seconds_ratio"]
    return {str(row.conditions["against"]): (row.value or 0, row.n, row.conditions["pairs"]) for row in rows}


def test_ratios_pair_neighbouring_calls_of_one_set_and_round() -> None:
    drift = [1.0, 2.0, 4.0]  # the machine slows down; each call of theirs takes twice as long as ours beside it
    ours = [outcome(drift, (r, s)) for r in range(3) for s in (0, 1)]
    theirs = [outcome([2 * value for value in drift], (r, 0)) for r in range(3)]
    other = [outcome([value / 2 for value in drift], (r, 1)) for r in range(3)]
    found = ratios({"onnxruntime": ours, "diffusers": theirs, "compile": other})
    assert found["diffusers"] == (pytest.approx(0.5), 3, 9) and found["compile"] == (pytest.approx(2), 3, 9)


def test_rounds_that_did_not_end_pair_with_nothing() -> None:
    ours = [outcome([1.0, 1.0], (r, 0)) for r in range(3)]
    theirs = [outcome([2.0, 2.0], (0, 0)), outcome([], (1, 0), "OOM"), outcome([2.0], (2, 0))]
    assert ratios({"onnxruntime": ours, "diffusers": theirs})["diffusers"] == (pytest.approx(0.5), 2, 2)


@pytest.mark.slow
def test_a_report_of_turns_is_one_line_of_json(tmp_path: Path) -> None:
    (measured,) = take_turns([player("a", 0.26, tmp_path / "log")], 1, 60)
    assert json.loads(measured.output.strip().splitlines()[-1])["turns"]
