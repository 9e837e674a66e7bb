"""Timing excludes timing and training, of this and of other processes; trainings run beside each other."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from diffship.core.errors import BusyError
from diffship.core.quiet import HELD, timing, training

HOLD = {
    "timing": "with timing('serving'):",
    "training": "with training(print):",
}
CODE = (
    "import sys\nfrom diffship.core.quiet import timing, training\n{}\n    print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture(autouse=True)
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFSHIP_LOCK", str(tmp_path / "lock"))
    return tmp_path / "lock"


@contextmanager
def another(what: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock, until its input ends."""
    command = [sys.executable, "-c", CODE.format(HOLD[what])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_nothing_is_timed_while_a_training_runs() -> None:
    with (
        another("training"),
        pytest.raises(BusyError, match=r"cpu-edge is not timed now: a training runs.*Try again later"),
        timing("cpu-edge"),
    ):
        pass
    with timing("cpu-edge"):  # it ended, by a signal even
        pass


def test_two_things_are_not_timed_at_once_and_the_other_is_named() -> None:
    with another("timing"), pytest.raises(BusyError, match=r"something is timed \(serving, process \d+\)"):
        with timing("cpu-edge"):
            pass


def test_a_training_waits_and_says_so_and_gives_up_in_the_end() -> None:
    said: list[str] = []
    begin = time.monotonic()
    with another("timing"), pytest.raises(BusyError, match="no training starts while something is timed"):
        with training(said.append, wait=0.2):
            pass
    assert time.monotonic() - begin < 10
    assert len(said) == 1 and "something is timed (serving, process" in said[0] and "at most 0 s" in said[0]


@pytest.mark.slow
def test_a_training_begins_when_the_timing_is_over() -> None:
    with another("timing") as process:
        threading.Timer(0.5, process.kill).start()
        with training(lambda text: None, wait=20):
            assert process.wait(10) != 0


def test_trainings_run_beside_each_other() -> None:
    with another("training"), training(pytest.fail), training(pytest.fail):
        pass


def test_what_belongs_to_a_measurement_is_not_kept_out() -> None:
    """A suite times several things, and its children time theirs."""
    with timing("cpu-edge"):
        assert os.environ[HELD] == "cpu-edge"
        with timing("export"), training(pytest.fail):
            pass
        code = "from diffship.core.quiet import timing\nwith timing('child'): print('timed')"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
        assert done.stdout == "timed\n"
    assert HELD not in os.environ


def test_the_lock_is_free_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), timing("x"):
        raise ZeroDivisionError
    assert HELD not in os.environ
    with timing("y"):
        pass
