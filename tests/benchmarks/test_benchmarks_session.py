"""Rounds, resume, and rows of what cannot run: with small programs in the place of models."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffship.benchmarks.measure import session as module
from diffship.benchmarks.measure.case import Bench, Case, cases_of, engine_of
from diffship.benchmarks.measure.figures import rows_of
from diffship.benchmarks.measure.materials import Materials
from diffship.benchmarks.measure.row import Row
from diffship.benchmarks.measure.session import Journal, Outcome, Session, Settings
from diffship.core.errors import ConfigError, PeerError

# long enough for its memory to be seen
REPORT = (
    "import json, time; time.sleep(0.1); "
    "print(json.dumps({'load': 1, 'first': 2, 'cold': 4, 'seconds': %s, 'device_peak': None}))"
)
BENCH = Bench(("toy",), ("fast", "slow"), parts=("unet",), calls=2)
PART = {"parameters": 10, "conv_linear_macs": 100, "attention_macs": 20, "file_bytes": {"fast": 40, "folder": 50}}
PARTS: dict[str, dict[str, Any]] = {"unet": PART, "vae_decoder": {**PART, "conv_linear_macs": 1000}}
ROLES = {"unet": "denoiser", "vae_decoder": "decoder"}
TOY = Materials("toy", "random weights", "f", {"fast": "b", "slow": "b"}, 64, 2, PARTS, {"unet": {"1": "x"}}, ROLES)


class Fake(Session):
    """A session whose cases are the programs of `programs`, by runner; it keeps the order in which they ran."""

    programs: Mapping[str, str]
    ran: list[tuple[str, int]]

    def _materials(self, bench: Bench, target: str) -> Materials:
        return TOY

    def _ceilings(self, turn: int, device: str) -> dict[str, float]:
        return {"matrix_product_flops": 960.0 + turn}

    def _command(self, case: Case, materials: Materials) -> tuple[list[str], dict[str, str]]:
        program = self.programs[case.runner]
        if program.startswith("missing"):
            raise PeerError(program)
        self.ran.append((case.runner, case.steps))
        return [sys.executable, "-c", program], {}


def measured(
    tmp_path: Path, programs: Mapping[str, str], benches: Sequence[Bench] = (BENCH,), **settings: Any
) -> tuple[list[Row], list[tuple[str, int]]]:
    made = Fake(Settings(tmp_path, tmp_path, **{"rounds": 3, "timeout": 30, **settings}))
    made.programs, made.ran = programs, []
    return rows_of(made.measure(benches), "s"), made.ran


def by_metric(rows: Sequence[Row], subject: str) -> dict[str, Row]:
    return {row.metric: row for row in rows if row.subject == subject}


@pytest.mark.slow
def test_rounds_interleave_the_cases_that_are_compared(tmp_path: Path) -> None:
    _, ran = measured(tmp_path, {"fast": REPORT % [1, 1], "slow": REPORT % [2, 2]})
    assert ran == [("fast", 0), ("slow", 0)] * 3


@pytest.mark.slow
def test_figures_of_a_case(tmp_path: Path) -> None:
    rows, _ = measured(tmp_path, {"fast": REPORT % [1, 2], "slow": REPORT % [4, 4]})
    found = by_metric(rows, "toy / fast / unet")
    assert found["call_seconds_p50"].value == 1.5 and found["call_seconds_p50"].n == 6
    assert "call_seconds_p90" not in found and "call_seconds_p99" not in found  # six calls have none
    rows, _ = measured(tmp_path / "many", {"fast": REPORT % list(range(1, 35)), "slow": REPORT % [1]})
    many = by_metric(rows, "toy / fast / unet")
    assert many["call_seconds_p90"].value == pytest.approx(np.quantile(list(range(1, 35)) * 3, 0.9))
    assert many["call_seconds_p99"].value == pytest.approx(np.quantile(list(range(1, 35)) * 3, 0.99))
    assert [found[name].value for name in ("load_seconds", "warm_up_seconds", "cold_start_seconds")] == [1, 2, 4]
    assert found["throughput"].value == pytest.approx(1 / 1.5)
    assert (found["parameters"].value, found["file_bytes"].value) == (10, 40)
    assert found["conv_linear_macs"].value == 200  # two rows: guidance
    assert found["flops"].value == pytest.approx(2 * 240 / 1.5)
    assert found["share_of_ceiling"].value == pytest.approx(2 * 240 / 1.5 / 962)
    assert found["peak_host_bytes"].value > 1e6 and found["peak_host_bytes"].kind == "memory"
    assert found["call_seconds_p50"].conditions["weights"] == "random weights"


@pytest.mark.slow
def test_ratios_are_paired_and_carry_an_interval(tmp_path: Path) -> None:
    rows, _ = measured(tmp_path, {"fast": REPORT % [1, 1], "slow": REPORT % [2, 2]})
    (ratio,) = [row for row in rows if row.subject == "toy / fast / unet against slow"]
    assert (ratio.value, ratio.low, ratio.high, ratio.n) == (pytest.approx(0.5), *[pytest.approx(0.5)] * 2, 3)
    assert ratio.conditions["interval"] == "Student t over 3 rounds" and ratio.conditions["by_round"] == [0.5] * 3
    assert not [row for row in rows if row.subject == "toy / slow / unet against fast"], "one row a pair"


def test_one_round_has_no_spread_and_no_interval(tmp_path: Path) -> None:
    rows, _ = measured(tmp_path, {"fast": REPORT % [1, 1], "slow": REPORT % [2, 2]}, rounds=1)
    (ratio,) = [row for row in rows if row.metric == "call_seconds_ratio"]
    assert (ratio.value, ratio.low, ratio.high, ratio.n) == (pytest.approx(0.5), None, None, 1)
    found = by_metric(rows, "toy / fast / unet")
    assert {row.low for row in found.values()} == {row.high for row in found.values()} == {None}


@pytest.mark.slow
def test_macs_of_an_image_are_those_of_its_calls(tmp_path: Path) -> None:
    bench = Bench(("toy",), ("fast",), parts=("image",), steps=(4,), batches=(2,))
    rows, _ = measured(tmp_path, {"fast": REPORT % [1]}, [bench])
    found = by_metric(rows, "toy / fast / image, 4 steps, batch 2")
    assert found["conv_linear_macs"].value == 4 * 2 * 2 * 100 + 2 * 1000
    assert found["throughput"].value == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "status", "reason"),
    [
        ("raise MemoryError", "OOM", "MemoryError"),
        ("raise SystemExit('it broke')", "failed", "it broke"),
        ("missing: not installed", "missing", "not installed"),
        ("print('no figures')", "failed", "no figures"),
        ("import time; time.sleep(60)", "failed", "out of time"),
    ],
)
def test_what_does_not_run_is_one_row_that_says_why(tmp_path: Path, program: str, status: str, reason: str) -> None:
    rows, _ = measured(tmp_path, {"fast": REPORT % [1], "slow": program}, rounds=1, timeout=2)
    (row,) = [row for row in rows if row.subject == "toy / slow / unet"]
    assert (row.value, row.status) == (None, status) and reason in row.reason and "\n" not in row.reason
    assert by_metric(rows, "toy / fast / unet")["call_seconds_p50"].value == 1


def test_a_limit_makes_a_row_out_of_memory_and_leaves_the_next_alone(tmp_path: Path) -> None:
    programs = {"fast": f"held = bytearray(500_000_000); {REPORT % [1]}", "slow": REPORT % [1]}
    rows, _ = measured(tmp_path, programs, rounds=1, memory_limit=200_000_000)
    assert by_metric(rows, "toy / fast / unet")["call_seconds_p50"].status == "OOM"
    assert by_metric(rows, "toy / slow / unet")["call_seconds_p50"].status == "ok"


@pytest.mark.slow
def test_rounds_that_failed_are_counted(tmp_path: Path) -> None:
    once = f"import pathlib; p = pathlib.Path({str(tmp_path / 'flag')!r}); e = p.exists(); p.touch()\nassert not e\n"
    rows, _ = measured(tmp_path, {"fast": once + REPORT % [1], "slow": REPORT % [2]})
    assert by_metric(rows, "toy / fast / unet")["call_seconds_p50"].reason == "2 of 3 rounds did not end"


@pytest.mark.slow
def test_an_interrupted_suite_goes_on_where_it_was(tmp_path: Path) -> None:
    class Interrupted(Fake):
        def _command(self, case: Case, materials: Materials) -> tuple[list[str], dict[str, str]]:
            if len(self.ran) == 3:
                raise KeyboardInterrupt
            return super()._command(case, materials)

    programs = {"fast": REPORT % [1, 1], "slow": REPORT % [2, 2]}
    first = Interrupted(Settings(tmp_path, tmp_path, rounds=3))
    first.programs, first.ran = programs, []
    with pytest.raises(KeyboardInterrupt):
        first.measure([BENCH])
    rows, ran = measured(tmp_path, programs, resume=True)
    assert ran == [("fast", 0), ("slow", 0)] * 2  # what takes turns is measured together, or not at all
    assert by_metric(rows, "toy / fast / unet")["call_seconds_p50"].n == 6
    assert measured(tmp_path, programs, resume=True)[1] == []
    assert len(measured(tmp_path, programs)[1]) == 6  # without --resume everything is measured anew


@pytest.mark.slow
def test_other_code_or_another_limit_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = {"fast": REPORT % [1], "slow": REPORT % [1]}
    measured(tmp_path, programs, rounds=1)
    assert len(measured(tmp_path, programs, rounds=1, resume=True, memory_limit=10**12)[1]) == 2
    monkeypatch.setattr(module, "code_digest", lambda: "other")
    assert len(measured(tmp_path, programs, rounds=1, resume=True)[1]) == 2


def test_a_missing_peer_is_tried_again_and_a_failure_is_kept(tmp_path: Path) -> None:
    measured(tmp_path, {"fast": "missing: later", "slow": "raise SystemExit(3)"}, rounds=1)
    _, ran = measured(tmp_path, {"fast": REPORT % [1], "slow": REPORT % [1]}, rounds=1, resume=True)
    assert ran == [("fast", 0)]


def test_a_journal_line_that_was_cut_short_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    Journal(file, False).put("a", Outcome("ok", 1.0, 2, {"seconds": [1.0]}))
    with open(file, "a", encoding="utf-8") as stream:
        stream.write('\n{"key": "b", "status": "o')
    journal = Journal(file, True)
    assert journal.get("a") == Outcome("ok", 1.0, 2, {"seconds": [1.0]}) and journal.get("b") is None
    journal.put("c", Outcome("failed", reason="x"))
    assert Journal(file, True).get("c") == Outcome("failed", reason="x")


def test_cases_are_every_combination_with_the_compared_next_to_each_other() -> None:
    bench = Bench(("a", "b"), (), ("diffusers",), ("unet", "image"), (1, 2), (4, 25))
    cases = cases_of(bench, {"a": ("unet", "vae_decoder"), "b": ("unet",)}, {"a": ("torch",), "b": ("torch",)})
    assert len(cases) == 2 * (2 + 4) * 2
    assert [case.runner for case in cases[:2]] == ["torch", "diffusers"] and cases[0].group == cases[1].group
    assert {case.part for case in cases_of(Bench(("a",)), {"a": ("unet",)}, {"a": ("torch",)})} == {"unet", "image"}


def test_absolute_paths_stay_out_of_results(tmp_path: Path) -> None:
    (case,) = cases_of(Bench((str(tmp_path / "mine"),), ("torch",), parts=("unet",)), {str(tmp_path / "mine"): ()}, {})
    text = json.dumps([case.subject, case.conditions("trained weights")])
    assert str(tmp_path) not in text and "mine / torch / unet" in text


def test_nothing_to_measure_is_said() -> None:
    with pytest.raises(ConfigError, match="name a bundle or a source"):
        Bench(())


def test_an_engine_with_options_is_a_runner_of_its_own() -> None:
    assert engine_of("onnxruntime") == ("onnxruntime", {})
    assert engine_of("onnxruntime:threads=1+tune=false") == ("onnxruntime", {"threads": 1, "tune": False})
    with pytest.raises(ConfigError, match="'threads' is not KEY=VALUE"):
        engine_of("onnxruntime:threads")


@pytest.mark.parametrize(
    ("runner", "status", "reason"),
    [
        ("onnxruntime:thread=1", "unsupported", "unknown key 'thread'"),
        ("onnxruntime:graphs=true", "unsupported", "they go with device cuda"),
        ("tensorrt", "missing", "Run: pip install"),
    ],
)
def test_an_engine_that_cannot_be_opened_is_a_row(tmp_path: Path, runner: str, status: str, reason: str) -> None:
    pytest.importorskip("onnxruntime")
    (case,) = cases_of(Bench(("toy",), (runner,), parts=("unet",)), {"toy": ("unet",)}, {})
    made = Session(Settings(tmp_path, tmp_path))
    found: dict[Case, Outcome] = {}
    materials = replace(TOY, bundles={"onnxruntime": "b"})
    assert not made._jobs([case], {case: materials}, found)
    assert found[case].status == status and reason in found[case].reason
