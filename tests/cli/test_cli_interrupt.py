from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="POSIX signals")]


def interrupt_when(
    words: list[str], ready: object, timeout: float = 120.0, number: int = signal.SIGINT, **environment: str
) -> tuple[int, str]:
    """Exit code and stderr of `diffship WORDS` after a signal, Ctrl-C, as soon as `ready()` is true."""
    process = subprocess.Popen(
        [sys.executable, "-m", "diffship", *words],
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
        text=True,
        # A shell's background job ignores Ctrl-C, and so would all its children: tests may run in one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    end = time.monotonic() + timeout
    assert callable(ready)
    while not ready() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    assert process.poll() is None, "it ended before it could be interrupted"
    process.send_signal(number)
    _, text = process.communicate(timeout=timeout)
    return process.returncode, text


def test_ctrl_c_in_an_export_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    words = ["export", "arch:tiny-sd", "--to", "onnx", "-o", str(tmp_path / "new" / "bundle")]
    code, text = interrupt_when(words, lambda: any(tmp_path.glob("new/.bundle.partial-*")))
    assert code == 130 and "Traceback" not in text, text
    assert list(tmp_path.iterdir()) == []


def test_a_terminated_export_leaves_nothing_among_temporary_files_either(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "tmp").mkdir()
    words = ["export", "arch:tiny-sd", "--to", "onnx", "-o", str(tmp_path / "bundle")]
    code, text = interrupt_when(
        words,
        lambda: any(tmp_path.glob("tmp/diffship-job-*")),
        number=signal.SIGTERM,
        TMPDIR=str(tmp_path / "tmp"),
    )
    assert code == 143 and text.endswith("terminated; what was not finished was not kept\n"), text
    assert not any(tmp_path.glob("tmp/diffship-*")) and not any(tmp_path.glob("*bundle*"))


def test_ctrl_c_in_a_run_leaves_whole_pictures_only(tiny_bundle: Path, tmp_path: Path) -> None:
    from diffship.sampling.picture import read_pixels

    out = tmp_path / "out"
    words = ["run", str(tiny_bundle), *(f"prompt {i}" for i in range(200)), "--steps", "5", "-o", str(out)]
    code, text = interrupt_when(words, lambda: len(list(out.glob("*.png"))) >= 2)
    assert code == 130 and "Traceback" not in text, text
    files = list(out.iterdir())
    assert 2 <= len(files) < 200 and all(file.suffix == ".png" for file in files)
    for file in files:
        read_pixels(file)
