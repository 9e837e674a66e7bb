from __future__ import annotations

import importlib.util
import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from diffship.cli import compress, doctor
from diffship.cli.main import main
from diffship.cli.output import Result
from diffship.cli.progress import Stages
from diffship.core.errors import UnsupportedError
from diffship.runtimes.engines.onnxruntime import OnnxRuntimeRunner

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")


@pytest.fixture(autouse=True)
def usual_handlers() -> Iterator[None]:
    """As a process in a terminal begins, whatever tests run in: a signal must not end the worker of other tests."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def library_that_fails_of(number: int) -> None:
    """What torch does where a signal falls between two lines of a context manager's exit."""
    try:
        signal.raise_signal(number)
    except KeyboardInterrupt:
        raise RuntimeError("trying to pop from empty mode stack") from None


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_an_error_that_a_signal_caused_is_told_as_the_signal(
    number: int, code: int, word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(options: object) -> None:
        try:
            library_that_fails_of(number)
        except RuntimeError as fault:
            raise UnsupportedError(f"text_encoder: {fault}") from fault

    monkeypatch.setattr(doctor, "run", run)
    before = signal.getsignal(number)
    assert main(["doctor"]) == code
    assert capsys.readouterr().err == f"diffship doctor: {word}; what was not finished was not kept\n"
    assert signal.getsignal(number) == before


def test_verbs_with_checkpoints_say_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compress, "run", lambda options: signal.raise_signal(signal.SIGINT))
    assert main(["compress", "emoji"]) == 130
    message = capsys.readouterr().err
    assert message == "diffship compress: interrupted; the same command goes on from its last checkpoint\n"


def test_a_signal_that_is_ignored_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(doctor, "run", lambda options: seen.append(signal.getsignal(signal.SIGINT)) or exit(0))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert main(["doctor"]) == 0
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIG_IGN]


def test_another_thread_changes_no_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []
    monkeypatch.setattr(doctor, "run", lambda options: seen.append(signal.getsignal(signal.SIGTERM)) or exit(0))
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["doctor"])))
    thread.start()
    thread.join(10)
    assert codes == [0] and seen == [before]


def test_a_forked_child_ends_by_the_signal_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(options: object) -> None:
        child = os.fork()
        if not child:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        raise SystemExit(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 99)

    monkeypatch.setattr(doctor, "run", run)
    assert main(["doctor"]) == signal.SIGTERM


def test_a_signal_whose_exception_was_lost_is_raised_again_by_the_next_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(options: object) -> Result:
        with suppress(KeyboardInterrupt):  # what a native module's start does with it
            signal.raise_signal(signal.SIGTERM)
        Stages(quiet=True)("step", 1, 2)
        return Result({}, "went on regardless")

    monkeypatch.setattr(doctor, "run", run)
    assert main(["doctor"]) == 143
    assert "went on" not in capsys.readouterr().out
    Stages(quiet=True)("step", 1, 2)  # nothing of it is left behind


def test_a_label_with_control_codes_does_nothing_to_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A label holds the prompt of whoever made a trajectory."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with Stages(quiet=False) as stages:
        stages("1/1 \x1b]0;owned\x07\x1b[2Jred apple", 1, 2)
    told = stream.getvalue()
    assert r"\x1b]0;owned\x07\x1b[2Jred apple" in told and "\x1b]0" not in told and "\x1b[2J" not in told


def test_an_engine_that_was_stopped_while_it_started_is_not_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(name: str) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as stop:
            raise ImportError("initialization failed") from stop

    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("diffship.core.lazy.importlib", SimpleNamespace(import_module=start, util=importlib.util))
    with pytest.raises(KeyboardInterrupt):
        OnnxRuntimeRunner.probe()
    monkeypatch.setattr("diffship.runtimes.engines.onnxruntime._import", lambda: exec("raise ImportError('broken')"))
    assert OnnxRuntimeRunner.probe().reason == "onnxruntime does not start: broken"


def test_a_second_signal_while_the_first_is_told_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def say(line: str) -> None:
        signal.raise_signal(signal.SIGINT)
        print(line, file=sys.stderr)

    monkeypatch.setattr(doctor, "run", lambda options: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr("diffship.cli.main.say", say)
    assert main(["doctor"]) == 143
    assert "terminated" in capsys.readouterr().err


def piped(words: list[str], closed: str) -> tuple[int, str]:
    """Exit code and what the other stream says, where nobody reads stream `closed` ("stdout" or "stderr")."""
    reader, writer = os.pipe()
    os.close(reader)
    other = "stderr" if closed == "stdout" else "stdout"
    command = [sys.executable, "-m", "diffship", *words]
    try:
        process = subprocess.Popen(command, text=True, **{closed: writer, other: subprocess.PIPE})
        said = "".join(text or "" for text in process.communicate(timeout=120))
    finally:
        os.close(writer)
    return process.returncode, said


@pytest.mark.slow
def test_work_goes_on_where_nobody_reads_the_progress(tiny_bundle: Path, tmp_path: Path) -> None:
    words = ["run", str(tiny_bundle), "a", "b", "c", "--steps", "2", "-o", str(tmp_path / "out")]
    code, said = piped(words, "stderr")
    assert code == 0 and len(said.splitlines()) == len(list((tmp_path / "out").glob("*.png"))) == 3


@pytest.mark.slow
def test_a_reader_who_has_seen_enough_is_no_error_and_failures_stay_failures(tmp_path: Path) -> None:
    assert piped(["doctor"], "stdout") == (0, "")
    code, said = piped(["run", str(tmp_path / "none"), "a", "--json"], "stdout")
    assert code == 2 and "none" in said and "Traceback" not in said
