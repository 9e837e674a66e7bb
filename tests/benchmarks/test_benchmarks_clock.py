"""What runs inside a measured process."""

from __future__ import annotations

import json
import time

import pytest

from diffship.benchmarks.measure import clock
from diffship.benchmarks.measure.clock import SPAWNED, device_peak, report, timed, told, waits


def test_load_first_call_and_the_others_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []

    def call() -> None:
        time.sleep(0.02 if calls else 0.1)
        calls.append(time.perf_counter())

    def load() -> object:
        time.sleep(0.05)
        return call

    monkeypatch.setenv(SPAWNED, repr(time.time() - 1))
    found = timed(load, 3)  # type: ignore[arg-type]
    assert len(calls) == 4 and len(found["seconds"]) == 3  # type: ignore[arg-type]
    assert found["load"] >= 0.05 and found["first"] >= 0.1  # type: ignore[operator]
    assert min(found["seconds"]) >= 0.02  # type: ignore[call-overload]
    assert found["cold"] >= 1.15  # type: ignore[operator]


def test_a_long_call_is_its_own_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "LONG_SECONDS", 0.05)
    calls: list[float] = []

    def call() -> None:
        calls.append(0.0)
        time.sleep(0.06)

    found = timed(lambda: call, 3)
    assert len(calls) == 1 and found["seconds"] == [found["first"]]


def test_the_child_hears_when_it_was_started_and_stays_offline() -> None:
    before = time.time()
    found = told()
    assert before <= float(found[SPAWNED]) <= time.time() and found["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in told(offline=False)  # the process that prepares: only the user's own setting counts


def test_a_report_is_one_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    print("progress without an end", end="")
    report({"load": 1.5})
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"load": 1.5}


def test_a_cpu_has_no_device_memory_and_nothing_to_wait_for() -> None:
    assert device_peak("cpu") is None
    assert waits(dict, "cpu") is dict


@pytest.mark.gpu
def test_a_gpu_is_waited_for_and_its_memory_counted() -> None:
    torch = pytest.importorskip("torch")
    matrix = torch.ones(8192, 8192, device="cuda")
    call = waits(lambda: matrix @ matrix, "cuda")
    call()
    started = time.perf_counter()
    call()
    seconds = time.perf_counter() - started
    assert seconds > 2 * 8192**3 / 2e15  # faster than any GPU computes: it was not waited for
    assert (device_peak("cuda") or 0) >= 2 * matrix.numel() * 4
