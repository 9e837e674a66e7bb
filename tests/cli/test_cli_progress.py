"""Progress: one bar that moves with the phase, units where bytes are counted, regular lines in a log."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable

import pytest

from diffship.cli.progress import Stages
from diffship.core.job import Bytes


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def told(monkeypatch: pytest.MonkeyPatch, terminal: bool, act: Callable[[Stages, Clock], None]) -> str:
    """What stderr gets of `act`; time stands still but for what it does to the clock."""
    stream, clock = Stream(terminal), Clock()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(Stages, "_ticks", lambda self: None)
    with Stages(quiet=False, clock=clock) as stages:
        act(stages, clock)
    return stream.getvalue()


def phases(stages: Stages, clock: Clock) -> None:
    stages("graph unet", 0, 1)
    for clock.now in (5.0, 10.0, 15.0, 20.5):
        stages.tick()
    stages("graph unet", 1, 1)
    stages("12 pictures used", 1, 1)
    for clock.now in (21.0, 26.0, 31.0, 36.0, 41.0):
        stages("weights unet", int((clock.now - 21) * 1e8), Bytes(4_000_000_000))
    stages("steps", 1, 4)


def test_a_log_has_a_line_for_each_phase_and_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(monkeypatch, False, phases).splitlines() == [
        "graph unet",
        "graph unet: 10 s",
        "graph unet: 20 s",
        "12 pictures used",
        "weights unet",
        "weights unet: 25 %, 1.0 GB of 4.0 GB, 10 s, 30 s left",
        "weights unet: 50 %, 2.0 GB of 4.0 GB, 20 s, 20 s left",
        "steps",
    ]


def test_a_log_of_hours_has_a_line_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    def hours(stages: Stages, clock: Clock) -> None:
        for second in range(3600):
            clock.now = float(second)
            stages("distill", second, 3600)

    lines = told(monkeypatch, False, hours).splitlines()
    assert 100 < len(lines) < 115 and lines[60] == "distill: 18 %, 650 of 3600, 650 s, 2950 s left"


def test_a_terminal_has_one_bar_with_units(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = told(monkeypatch, True, phases)
    assert "\n" not in shown.replace("12 pictures used\n", ""), "a bar that stays is a line"
    frames = [frame.rstrip() for frame in shown.split("\r")]
    assert "graph unet: 00:00" in frames and not any("0%" in frame for frame in frames if "graph" in frame)
    assert any("50%" in frame and "2.00G/4.00G" in frame and "B/s" in frame for frame in frames)
    assert not any("it/s" in frame for frame in frames if "weights" in frame)
    assert any("1/4" in frame for frame in frames if "steps" in frame) and frames[-1] == ""


def test_a_phase_that_says_nothing_moves_and_its_thread_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    ticked = threading.Event()
    monkeypatch.setattr(sys, "stderr", Stream(False))
    monkeypatch.setattr(
        Stages, "tick", lambda self: ticked.set() if threading.current_thread().name == "progress" else None
    )
    with Stages(quiet=False) as stages:
        stages._ended.wait = lambda seconds: ticked.is_set()  # type: ignore[method-assign]
        stages("graph unet", 0, 1)
        assert ticked.wait(5)
        assert stages._ticker is not None
        stages._ticker.join(5)
        assert not stages._ticker.is_alive()
