"""Sentinels: every figure of the README is watched, and each kind of false claim is contradicted."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from diffship.benchmarks.measure import clock, intervals
from diffship.benchmarks.measure.intervals import Interval
from diffship.benchmarks.measure.materials import Materials
from diffship.benchmarks.publish import readings, sentinels
from diffship.benchmarks.publish.readings import SENTINELS, Kit, Readings
from diffship.benchmarks.publish.sentinels import CLAIMS, RULERS, figures_of, found, judged, main, processors, watched
from diffship.benchmarks.studies.service.load import Server
from diffship.core.errors import ConfigError, UnsupportedError
from diffship.core.quiet import HELD

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIGURE = re.compile(r"<!-- figure: ([^\n]*?) -->")
MARKERS = FIGURE.findall(README)
WRITTEN = re.compile(r"(?s)<!-- (figure|table): .*?<!-- end \1 -->|```.*?```")  # by `make tables`, or to be typed
MEASURED = re.compile(r"\d[\d.,]*[ \u00a0]?(?:ms|s|seconds|minutes|[GM]i?B|dB|times|images/s)\b")
FIGURES = figures_of(ROOT)


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(tmp_path, tmp_path)


def fitting() -> dict[str, Readings]:
    """Readings that are just what is claimed."""
    known: dict[str, Readings] = {"instruments": {name: exactly(low) for name, (low, _) in RULERS.items()}}
    for claim in CLAIMS:
        value = claim.of([found(name, FIGURES) for name in claim.figures])
        known.setdefault(claim.sentinel, {}).setdefault(claim.reading.partition(".")[2], exactly(value))
    return known


def exactly(value: float) -> Interval:
    return Interval(value, None, None, 1, "measured once")


def contradicted(known: dict[str, Readings], figures: dict[str, float] = FIGURES) -> list[str]:
    """The readings of which something is wrong."""
    lines = judged(known, figures)
    assert {line.status for line in lines} <= {"fine", "contradicted"}
    return [line.text.partition(":")[0] for line in lines if line.status == "contradicted"]


def test_a_lead_over_others_is_told_on_another_processor_and_our_own_figures_are_held_anywhere() -> None:
    known = fitting()
    known["large-calls"]["onnxruntime"] = exactly(2.0)
    known["small-model"]["call_ratio"] = exactly(2.0)
    cpus = processors(ROOT)
    for here, status in ((cpus["cpu-edge"], "contradicted"), ("another", "not checked")):
        lines = judged(known, FIGURES, cpus, here)
        found = {line.text.partition(":")[0]: line for line in lines if line.status != "fine"}
        assert {name: line.status for name, line in found.items()} == {
            "large-calls.onnxruntime": status,
            "small-model.call_ratio": "contradicted",
        }
    assert "and this is another" in found["large-calls.onnxruntime"].text


@pytest.mark.parametrize("marker", MARKERS)
def test_every_figure_of_the_readme_has_a_sentinel(marker: str) -> None:
    claims = watched(marker)
    assert claims, f"nothing watches {marker}; add a Claim"
    assert all(claim.sentinel in SENTINELS for claim in claims)


def test_no_sentinel_watches_what_nobody_claims() -> None:
    for claim in CLAIMS:
        assert any(claim in watched(marker) for marker in MARKERS), claim.figures
    assert {claim.sentinel for claim in CLAIMS} | {"instruments"} == set(SENTINELS)
    with pytest.raises(ConfigError, match="have 0 such figures"):
        found("cold-start / nobody / seconds", FIGURES)


def test_a_figure_of_the_readme_without_a_sentinel_would_be_noticed() -> None:
    assert watched("low-memory / arch:koala-700m+taesd / peak_resident_bytes") == []


def test_no_figure_of_the_readme_is_typed_by_hand() -> None:
    """Outside of markers nothing writes it anew and nothing watches it."""
    assert MEASURED.findall(WRITTEN.sub("", README)) == []
    freed = re.sub(r"<!-- figure: export-sd15 / diffship / export_seconds -->(.*?)<!-- end figure -->", r"\1", README)
    assert freed != README and len(MEASURED.findall(WRITTEN.sub("", freed))) == 1


def test_what_is_claimed_is_not_contradicted_by_itself() -> None:
    """Claims that share a reading (two pictures, one proxy) still hold together."""
    assert contradicted(fitting()) == []


@pytest.mark.parametrize("marker", MARKERS)
def test_a_figure_that_is_made_better_by_a_hand_is_contradicted(marker: str) -> None:
    """Three times better than what is measured: no slack is as wide as that."""
    known = fitting()
    figures = dict(FIGURES)
    (name,) = [name for name in figures if fnmatchcase(name, marker)]
    betters = [figures[name] / 3, figures[name] * 3] if figures[name] else []
    if marker.endswith(("memory_slope", "refused_share")):  # growth of half a minute, no refusals: see below
        return
    wrong = [contradicted(known, {**figures, name: better}) for better in betters]
    assert any(wrong), f"{marker} can be claimed three times better, and nobody says so"


def test_a_server_that_refuses_or_leaks_is_contradicted() -> None:
    known = fitting()
    known["load"] = {**known["load"], "refused_share": exactly(0.1), "grown_mb": exactly(200.0)}
    assert contradicted(known) == ["load.refused_share", "load.grown_mb"]


def test_an_interval_that_reaches_the_bound_contradicts_nothing() -> None:
    known = fitting()
    (claim,) = [claim for claim in CLAIMS if claim.reading == "calls.diffusers"]
    bound = claim.bound(FIGURES)
    for low, wrong in ((0.9 * bound, []), (1.1 * bound, ["calls.diffusers"])):
        known["calls"] = {**known["calls"], "diffusers": Interval(1.2 * bound, low, 1.3 * bound, 3, "Student t")}
        assert contradicted(known) == wrong
    (claim,) = [claim for claim in CLAIMS if claim.reading == "judge.teacher"]
    for high, wrong in ((0.9, []), (0.5, ["judge.teacher"])):
        known = fitting()
        known["judge"] = {**known["judge"], "teacher": Interval(0.4, 0.3, high, 50, "Student t")}
        assert contradicted(known) == wrong


@pytest.mark.parametrize("reading", ["calls.diffusers", "judge.teacher"])
def test_a_reading_that_is_no_number_supports_no_claim(reading: str) -> None:
    known = fitting()
    sentinel, _, name = reading.partition(".")
    known[sentinel] = {**known[sentinel], name: exactly(math.nan)}
    assert contradicted(known) == [reading]


@pytest.mark.slow
def test_what_is_not_measured_is_told_and_fails_where_all_is_wanted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def missing(kit: Kit) -> Readings:
        raise UnsupportedError("no npm")

    monkeypatch.setitem(SENTINELS, "judge", missing)
    monkeypatch.setitem(SENTINELS, "calls", lambda kit: {"diffusers": exactly(0.3)})
    words = ["--only", "judge,calls", "--root", str(ROOT), "--work", str(tmp_path)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "not checked   judge: no npm" in out and "not checked   calls.optimum: not measured here" in out
    assert main([*words, "--all"]) == 1
    with pytest.raises(ConfigError, match="did you mean 'calls'"):
        main(["--only", "cals", "--root", str(ROOT)])


@pytest.mark.slow
def test_the_rulers_are_right(kit: Kit) -> None:
    assert contradicted({"instruments": readings.instruments(kit)}) == []


@pytest.mark.slow
@pytest.mark.parametrize("ruler", ["clock", "client_clock", "peak", "false_verdicts"])
def test_a_ruler_that_is_changed_is_noticed(ruler: str, kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock doubled, requests timed from when they are sent, half the memory seen, a level of one half."""
    if ruler == "clock":
        once = clock._once
        monkeypatch.setattr(clock, "_once", lambda call: 2 * once(call))
    elif ruler == "client_clock":
        ask = Server.ask
        monkeypatch.setattr(Server, "ask", lambda self, *words, due=None: ask(self, *words))
    elif ruler == "peak":
        measure = readings.measure
        monkeypatch.setattr(
            readings, "measure", lambda *words: replace(made := measure(*words), peak_bytes=made.peak_bytes // 2)
        )
    else:
        monkeypatch.setattr(intervals, "LEVEL", 0.5)
    assert f"instruments.{ruler}" in contradicted({"instruments": readings.instruments(kit)})


class Slow(readings.Session):
    """Measures programs that say how long their calls take, in place of the engines."""

    seconds: dict[str, float]

    def _materials(self, bench: Any, target: str) -> Materials:
        part = {"parameters": 1, "conv_linear_macs": 1, "attention_macs": 0, "file_bytes": {"folder": 1}}
        parts: dict[str, dict[str, Any]] = {"unet": part, "vae_decoder": part}
        roles, feeds = {"unet": "denoiser", "vae_decoder": "decoder"}, {"unet": {"1": "x"}}
        return Materials(target, "random weights", "f", {"onnxruntime": "b"}, 64, 2, parts, feeds, roles)

    def _ceilings(self, turn: int, device: str) -> dict[str, float]:
        return {}

    def _command(self, case: Any, materials: Materials) -> tuple[list[str], dict[str, str]]:
        seconds = [self.seconds[case.runner] * (1 + 0.01 * place) for place in range(3)]
        figures = {"load": 1, "first": 2, "cold": 4, "seconds": seconds, "device_peak": None}
        return [sys.executable, "-c", f"print({json.dumps(figures)!r})"], {}


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    """Seconds of a picture in each engine, to be changed."""
    seconds = {"onnxruntime": 0.25, "diffusers": 0.65}
    monkeypatch.setattr(Slow, "seconds", seconds, raising=False)
    monkeypatch.setattr(readings, "Session", Slow)
    yield seconds


@pytest.mark.slow
def test_an_engine_that_became_slow_is_contradicted(kit: Kit, engines: dict[str, float]) -> None:
    wrong = [line.text for line in judged({"calls": readings.calls(kit)}, FIGURES) if line.status == "contradicted"]
    assert wrong == []
    engines["onnxruntime"] *= 2
    (wrong,) = [line for line in judged({"calls": readings.calls(kit)}, FIGURES) if line.status == "contradicted"]
    assert wrong.text.startswith("calls.diffusers: 0.7692 (")


def test_a_sentinel_holds_the_lock_while_it_measures(kit: Kit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(SENTINELS, "judge", lambda kit: {"held": exactly(float(HELD in os.environ))})
    known = sentinels.run(kit, ["judge"], lambda text: None)
    assert known == {"judge": {"held": exactly(1.0)}}
