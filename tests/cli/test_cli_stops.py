from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from diffship.cli import compress, doctor
from diffship.cli.main import main
from diffship.core.errors import UnsupportedError

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")


def library_that_fails_of(number: int) -> None:
    """What torch does where a signal falls between two lines of a context manager's exit."""
    try:
        os.kill(os.getpid(), number)
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
    monkeypatch.setattr(compress, "run", lambda options: os.kill(os.getpid(), signal.SIGINT))
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
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        raise SystemExit(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 99)

    monkeypatch.setattr(doctor, "run", run)
    assert main(["doctor"]) == signal.SIGTERM
