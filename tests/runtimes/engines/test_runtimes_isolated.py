"""An engine in a process of its own: the same results, and a process that dies takes nothing but its call."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from diffship.core import child as core_child
from diffship.core.bundle import Bundle
from diffship.core.errors import ConfigError, PeerError, RunnerError
from diffship.runtimes.engines.isolated import engine, frames
from diffship.runtimes.engines.isolated.child import Sessions
from diffship.runtimes.engines.isolated.engine import IsolatedEngine
from diffship.runtimes.engines.model import BundleModel
from diffship.sampling.generate import Request, generate

pytest.importorskip("onnxruntime")
REQUEST = Request("red apple", steps=2, seed=3)
THREADS = {"threads": 1}


@pytest.fixture
def model(tiny_bundle: Path) -> Iterator[BundleModel]:
    made = BundleModel(Bundle.open(tiny_bundle), "onnxruntime", make=IsolatedEngine, **THREADS)
    yield made
    made.close()


def process(model: BundleModel) -> IsolatedEngine:
    assert isinstance(model.opener, IsolatedEngine)
    return model.opener


def kill(model: BundleModel) -> None:
    pid = process(model).pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def gone(pid: int, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.01)
    return not Path(f"/proc/{pid}").exists()


@pytest.mark.slow
def test_a_picture_from_another_process_is_the_same_to_the_bit(model: BundleModel, tiny_bundle: Path) -> None:
    own = BundleModel(Bundle.open(tiny_bundle), "onnxruntime", **THREADS)
    assert process(model).pid is None and process(model).alive(), "nothing is started before it is needed"
    (there,), (here,) = generate(model, REQUEST), generate(own, REQUEST)
    assert np.array_equal(there.pixels, here.pixels) and process(model).pid != os.getpid()
    own.close()


@pytest.mark.slow
def test_case_34_a_killed_process_is_told_and_another_goes_on(model: BundleModel) -> None:
    before = generate(model, REQUEST)[0].pixels
    unet, first = model.use("unet"), process(model).pid
    feeds = {spec.name: np.zeros(spec.resolve(SIZES), np.float32) for spec in unet.inputs}
    handle = unet.put(feeds["encoder_hidden_states"])
    alone = unet.run(feeds)["out_sample"]
    kill(model)
    for _ in range(2):
        with pytest.raises(PeerError, match="ended with code -9"):
            unet.run(feeds)
    assert not process(model).alive()
    process(model).restart()
    assert process(model).alive() and process(model).pid != first
    assert np.array_equal(unet.run({**feeds, "encoder_hidden_states": handle})["out_sample"], alone)
    assert np.array_equal(generate(model, REQUEST)[0].pixels, before)


@pytest.mark.slow
def test_a_restart_that_opens_half_of_the_files_does_not_count_as_alive(
    model: BundleModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.use("text_encoder")
    model.use("unet")
    kill(model)
    sessions = list(process(model)._sessions.values())
    monkeypatch.setattr(sessions[-1], "_files", ["nowhere.onnx"])
    with pytest.raises((RunnerError, PeerError)):
        process(model).restart()
    assert not process(model).alive()
    monkeypatch.undo()
    process(model).restart()
    assert process(model).alive() and generate(model, REQUEST)


SIZES = {"batch_size": 1, "height": 8, "width": 8, "sequence_length": 77}


@pytest.mark.slow
def test_what_the_engine_refuses_is_its_own_error_and_the_process_goes_on(model: BundleModel, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(RunnerError, match=r"onnxruntime refuses .*bad\.onnx"):
        process(model).open([tmp_path / "bad.onnx"])
    assert generate(model, REQUEST) and process(model).alive()
    with pytest.raises(ConfigError, match="threads"):
        IsolatedEngine("onnxruntime", {"threads": -1})


@pytest.mark.slow
def test_the_process_ends_with_its_last_session_and_not_by_a_signal_for_the_group(model: BundleModel) -> None:
    model.use("unet")
    model.use("text_encoder")
    pid = process(model).pid
    assert pid is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(pid, number)
    model.release("unet")
    assert process(model).pid == pid and generate(model, REQUEST)
    model.close()
    assert process(model).pid is None and gone(pid)
    assert generate(model, REQUEST), "it starts again when it is needed again"


@pytest.mark.slow
def test_a_call_that_never_ends_is_ended(tiny_bundle: Path) -> None:
    def make(name: str, options: Any) -> IsolatedEngine:
        return IsolatedEngine(name, options, call_seconds=20.0)

    model = BundleModel(Bundle.open(tiny_bundle), "onnxruntime", make=make, **THREADS)
    unet = model.use("unet")
    pid = process(model).pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    process(model)._process._seconds = 0.3  # type: ignore[union-attr]
    begun = time.monotonic()
    with pytest.raises(PeerError, match=r"a call took more than 0\.3 s"):
        unet.run({spec.name: np.zeros(spec.resolve(SIZES), np.float32) for spec in unet.inputs})
    assert time.monotonic() - begun < 5 and gone(pid)
    model.close()


def hung(model: BundleModel) -> Thread:
    """A call of the U-Net that will not end by itself, in a thread whose fault is PeerError."""
    unet, pid = model.use("unet"), process(model).pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)

    def call() -> None:
        with pytest.raises(PeerError, match="process was ended"):
            unet.run({spec.name: np.zeros(spec.resolve(SIZES), np.float32) for spec in unet.inputs})

    thread = Thread(target=call, daemon=True)
    thread.start()
    end = time.monotonic() + 10
    while process(model)._process._call is None and time.monotonic() < end:  # type: ignore[union-attr]
        time.sleep(0.01)
    return thread


@pytest.mark.slow
def test_closing_does_not_wait_behind_a_call_that_hangs(model: BundleModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_END_SECONDS", 0.3)
    model.use("text_encoder")
    thread, pid, begun = hung(model), process(model).pid, time.monotonic()
    assert pid is not None
    model.close()
    thread.join(5)
    assert time.monotonic() - begun < 5 and not thread.is_alive() and gone(pid)


@pytest.mark.slow
def test_closing_does_not_wait_for_a_process_that_stands_still(
    model: BundleModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_END_SECONDS", 0.3)
    model.use("text_encoder")
    model.use("unet")
    pid, begun = process(model).pid, time.monotonic()
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    model.close()
    assert time.monotonic() - begun < 5 and gone(pid)


@pytest.mark.slow
def test_a_process_that_is_ended_in_a_call_does_not_wait_for_it(
    model: BundleModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_END_SECONDS", 0.3)
    thread, begun = hung(model), time.monotonic()
    process(model)._process.end()  # type: ignore[union-attr]
    thread.join(5)
    assert time.monotonic() - begun < 5 and not thread.is_alive()


@pytest.mark.slow
def test_a_killed_engine_ends_its_call_and_starts_no_more(model: BundleModel) -> None:
    thread, pid, begun = hung(model), process(model).pid, time.monotonic()
    assert pid is not None
    process(model).kill()
    thread.join(5)
    assert time.monotonic() - begun < 5 and not thread.is_alive() and gone(pid)
    with pytest.raises(PeerError, match="was ended"):
        process(model).restart()
    model.close()
    with pytest.raises(PeerError, match="was ended"):
        model.use("unet")


@pytest.mark.slow
def test_the_process_does_not_outlive_who_asks(tiny_bundle: Path) -> None:
    program = (
        "import os, sys; from diffship.core.bundle import Bundle\n"
        "from diffship.runtimes.engines.isolated.engine import IsolatedEngine\n"
        "from diffship.runtimes.engines.model import BundleModel\n"
        "model = BundleModel(Bundle.open(sys.argv[1]), 'onnxruntime', make=IsolatedEngine)\n"
        "model.use('unet'); print(model.opener.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tiny_bundle)], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )  # fmt: skip
    assert done.returncode == -9 and gone(int(done.stdout))


class Loud:
    """An engine that fails in every way a child must carry over."""

    def open(self, files: Any) -> Any:
        faults = {"memory": MemoryError("7 GB"), "refused": RunnerError("no"), "odd": KeyError("sample")}
        raise faults[Path(files[0]).name]


def test_a_process_whose_asker_is_gone_ends_in_silence() -> None:
    command = [sys.executable, "-m", "diffship.runtimes.engines.isolated.child", "onnxruntime", "{}"]
    pipe, env = subprocess.PIPE, {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=env) as child:
        assert child.stdin is not None and child.stdout is not None and child.stderr is not None
        child.stdout.close()  # nobody reads what it answers
        frames.send(child.stdin, {"do": "open", "files": ["/nowhere.onnx"], "session": 1}, ())
        assert b"BrokenPipeError" not in child.stderr.read()
        assert child.wait(60) == 0


def test_errors_become_replies() -> None:
    sessions = Sessions(Loud())  # type: ignore[arg-type]
    answers = [sessions.answer({"do": "open", "files": [name], "session": 1}, ())[0] for name in ("memory", "refused")]
    assert answers[0] == {"error": ["RunnerError"], "message": "not enough memory: 7 GB"}
    assert answers[1]["error"][:2] == ["RunnerError", "DiffshipError"] and answers[1]["message"] == "no"


def test_a_fault_of_our_own_takes_one_call_and_not_the_process(capsys: pytest.CaptureFixture[str]) -> None:
    sessions = Sessions(Loud())  # type: ignore[arg-type]
    odd = sessions.answer({"do": "open", "files": ["odd"], "session": 1}, ())[0]
    unknown = sessions.answer({"do": "run", "session": 7, "feeds": [], "outputs": []}, ())[0]
    assert odd == {"error": ["RunnerError"], "message": "the engine failed: KeyError: 'sample'"}
    assert unknown["error"] == ["RunnerError"] and "Traceback" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("fault", [MemoryError("7 GB"), KeyboardInterrupt()])
def test_an_answer_that_was_not_read_whole_is_not_taken_for_the_next_one(
    fault: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipe holds the rest of it: only another process gives answers that belong to their questions."""
    process = engine._Process(core_child.command("diffship.runtimes.engines.isolated.child", "onnxruntime", "{}"), 30)
    whole = engine.receive
    try:
        with pytest.raises(RunnerError, match="the engine failed"):
            process.ask({"do": "close", "session": 1})
        with monkeypatch.context() as patch:
            patch.setattr(engine, "receive", lambda stream: (_ for _ in ()).throw(fault))
            with pytest.raises(type(fault)):
                process.ask({"do": "close", "session": 2})
        assert engine.receive is whole and not process.alive()
        with pytest.raises(PeerError, match="the engine's process"):
            process.ask({"do": "close", "session": 3})
    finally:
        process.end()


ARRAYS = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.array(3, np.int64),
    np.zeros((0, 4), np.float16),
    np.array([True, False]),
]


def test_frames_carry_arrays_of_every_shape() -> None:
    stream = io.BytesIO()
    frames.send(stream, {"do": "a"}, ARRAYS)
    frames.send(stream, {"do": "b"})
    stream.seek(0)
    header, arrays = frames.receive(stream)
    assert header == {"do": "a"} and frames.receive(stream) == ({"do": "b"}, [])
    for found, sent in zip(arrays, ARRAYS, strict=True):
        assert found.dtype == sent.dtype and found.shape == sent.shape and np.array_equal(found, sent)
    with pytest.raises(EOFError):
        frames.receive(stream)


def frame(text: str, body: bytes = b"") -> bytes:
    return len(text).to_bytes(4, "little") + text.encode() + body


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"", EOFError),
        (b"\x01", EOFError),
        (b"\xff\xff\xff\xff", ValueError),
        (frame("{}")[:-1], EOFError),
        (frame("{}"), ValueError),
        (frame("[1]"), ValueError),
        (frame("{"), ValueError),
        (frame('{"arrays": [["float32", [9999999999]]]}'), ValueError),
        (frame('{"arrays": [["float32", [-1]]]}'), ValueError),
        (frame('{"arrays": [["object", [1]]]}'), ValueError),
        (frame('{"arrays": [["float32"]]}'), ValueError),
        (frame('{"arrays": [["float32", [2]]]}', b"1234"), EOFError),
    ],
)
def test_broken_frames_are_refused(raw: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        frames.receive(io.BytesIO(raw))
