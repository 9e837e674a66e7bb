"""A measured process: its memory, its end, and why it ended."""

from __future__ import annotations

import sys
import time

import pytest

from diffship.benchmarks.measure.process import Measured, measure, memory_of

HOLD = "held = bytearray([1]) * 60_000_000; import time; time.sleep(0.5)"


def python(code: str, timeout: float = 30, limit: int | None = None) -> Measured:
    return measure([sys.executable, "-c", code], timeout, memory_limit=limit)


@pytest.mark.slow
def test_memory_of_children_counts() -> None:
    measured = python(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLD!r}])")
    assert (measured.code, measured.status, measured.reason) == (0, "ok", "")
    assert measured.peak_bytes > 60_000_000
    assert measured.seconds > 0.5


# 125 MiB that are held for some milliseconds, by the process itself or by a child of it
SPIKE = "held = bytearray(125 << 20); held[::4096] = b'1' * len(held[::4096]); del held"
SPIKES = {
    "itself": f"import time; {SPIKE}; time.sleep(0.3)",
    "a child": f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SPIKE!r}])",
    "at the very end": SPIKE,
}


@pytest.mark.slow
@pytest.mark.parametrize("where", SPIKES)
def test_memory_that_is_held_for_milliseconds_is_seen(where: str) -> None:
    """The measuring process is a small one, as it is in use: the kernel counts a child from its parent's size on."""
    code = "import sys; from diffship.benchmarks.measure.process import measure\n"
    code += f"print(measure([sys.executable, '-c', {SPIKES[where]!r}], 30).peak_bytes)"
    peaks = [int(python(code).output) for _ in range(2)]
    assert all(125 << 20 < peak < 160 << 20 for peak in peaks), peaks


def test_the_mark_of_a_process_stays_when_its_memory_is_given_back() -> None:
    found = memory_of()
    assert found.peak >= found.resident > 1 << 20
    assert memory_of(2**22 + 1).peak == 0, "a process that is gone"


@pytest.mark.slow
def test_a_subject_that_hangs_is_killed_and_said_to_be() -> None:
    measured = python("import time; print('{\"a\": 1}', flush=True); time.sleep(60)", timeout=1)
    assert (measured.code, measured.status) == (124, "failed")
    assert measured.reason == "out of time after 1 s"
    assert measured.document() == {"a": 1}
    with pytest.raises(ValueError, match="no JSON line"):
        python("print('nothing')").document()


@pytest.mark.slow
def test_children_of_a_subject_that_hangs_go_with_it() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    started = time.monotonic()
    assert python(code, timeout=1).code == 124
    assert time.monotonic() - started < 20  # a child that lives on keeps the pipe open


def test_an_allocation_above_the_limit_is_oom() -> None:
    measured = python("held = bytearray(400_000_000)", limit=200_000_000)
    assert measured.status == "OOM" and "MemoryError" in measured.reason


def test_resident_memory_above_the_limit_is_oom() -> None:
    # shared pages are not what RLIMIT_DATA counts: only the watch sees them
    fill = "import mmap, time; m = mmap.mmap(-1, 300_000_000); [m.write(b'1' * 10**6) for _ in range(300)]"
    measured = python(f"{fill}; time.sleep(30)", limit=250_000_000)
    assert measured.status == "OOM" and "more than the memory limit" in measured.reason
    assert measured.seconds < 20


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "OOM"),  # what the system's killer does
        ("raise MemoryError", "OOM"),
        ('raise RuntimeError("DefaultCPUAllocator: can\'t allocate memory: you tried to allocate 1")', "OOM"),
        ("import os; print('what():  std::bad_alloc', flush=True); os.abort()", "OOM"),
        ("import os; os.abort()", "failed"),
        ("raise ValueError('wrong in /home/someone/deep/file.py')", "failed"),
    ],
)
def test_how_a_process_ends_is_its_status(code: str, status: str) -> None:
    measured = python(code)
    assert measured.status == status
    assert measured.reason


def test_reasons_hold_no_folders_of_this_machine() -> None:
    assert python("raise ValueError('wrong in /home/someone/deep/file.py')").reason == (
        "exit 1: ValueError: wrong in .../file.py"
    )
