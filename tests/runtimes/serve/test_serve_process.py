"""The process: signals, exit codes, the verb itself."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from sampling_toy import ToyModel
from serve_toy import until

from diffship.cli.main import main
from diffship.core.errors import ConfigError, UnsupportedError
from diffship.runtimes.serve.connections import bind
from diffship.runtimes.serve.opened import named
from diffship.runtimes.serve.options import ServeOptions
from diffship.runtimes.serve.server import serve_until_asked
from diffship.runtimes.serve.service import Service
from diffship.runtimes.serve.worker import Served

HERE = Path(__file__).parent


@contextmanager
def child(*words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process and its URL, once it is ready; killed at the end if it still runs."""
    path = os.pathsep.join([str(HERE), str(HERE.parents[1] / "sampling"), str(HERE.parents[2])])
    process = subprocess.Popen(
        [sys.executable, *words],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert process.stderr is not None and process.stdout is not None
    try:
        url, end = "", time.monotonic() + 60
        while not url and time.monotonic() < end:
            line = process.stderr.readline()
            assert line or process.poll() is None, "it ended before it was ready"
            found = re.match(r"ready on (\S+)", line)
            url = found[1] if found else ""
        drain = threading.Thread(target=process.stderr.read, daemon=True)
        drain.start()
        try:
            yield process, url
        finally:
            process.kill()
            drain.join(10)
    finally:
        process.kill()
        process.wait(10)
        process.stderr.close()
        process.stdout.close()


def post(url: str, **body: Any) -> int:
    return httpx.post(f"{url}/v1/generate", json={"prompt": "cat", **body}, timeout=60).status_code


def under_way(url: str, running: int, waiting: int) -> bool:
    text = httpx.get(f"{url}/metrics").text
    return f'running{{model="toy"}} {running}\n' in text and f'waiting{{model="toy"}} {waiting}\n' in text


@pytest.mark.slow
def test_case_33_sigterm_finishes_what_runs_and_refuses_what_waits() -> None:
    with child(str(HERE / "serve_child.py"), "0.1", "20", "3") as (process, url), ThreadPoolExecutor(9) as pool:
        jobs = [pool.submit(post, url, steps=30) for _ in range(8)]
        until(lambda: under_way(url, 3, 5))
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        ready = httpx.get(f"{url}/ready")
        assert ready.status_code == 503 and ready.json()["models"] == {"toy": "draining"}
        assert post(url, steps=1) == 503
        assert process.wait(20) == 0
        assert sorted(job.result() for job in jobs) == [200] * 3 + [503] * 5


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_case_33_a_second_signal_ends_it_at_once(number: signal.Signals, code: int) -> None:
    with child(str(HERE / "serve_child.py"), "0.2", "30", "1") as (process, url), ThreadPoolExecutor(1) as pool:
        job = pool.submit(post, url, steps=100)
        until(lambda: under_way(url, 1, 0))
        process.send_signal(number)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(5) == code
        with pytest.raises(httpx.TransportError):
            job.result()


@pytest.mark.slow
def test_case_33_work_beyond_the_grace_time_is_cut_off_with_its_own_code() -> None:
    with child(str(HERE / "serve_child.py"), "0.1", "0.5", "1") as (process, url), ThreadPoolExecutor(1) as pool:
        job = pool.submit(post, url, steps=100)
        until(lambda: under_way(url, 1, 0))
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 4
        assert job.result() == 503


@pytest.mark.slow
def test_the_verb_serves_a_bundle_and_says_what_it_did(tiny_bundle: Path, tmp_path: Path) -> None:
    words = ["-m", "diffship", "serve", f"small={tiny_bundle}", "--port", "0", "--json", "--option", "threads=1"]
    with child(*words) as (process, url):
        (entry,) = httpx.get(f"{url}/v1/models").json()["data"]
        assert (
            entry["id"] == "small" and entry["engine"] == "onnxruntime" and len(entry["facts"]["digests"]["unet"]) == 64
        )
        ask = partial(httpx.post, f"{url}/v1/generate", timeout=60)
        picture = ask(json={"prompt": "red apple", "steps": 2, "seed": 5})
        with ThreadPoolExecutor(4) as pool:  # case 18: in a batch as alone, within rounding
            body = {"prompt": "red apple", "steps": 2, "seed": 5}
            together = list(pool.map(lambda seed: ask(json={**body, "seed": seed}), (5, 6, 7, 8)))
        drawn = [np.asarray(Image.open(io.BytesIO(answer.content)), int) for answer in (picture, together[0])]
        assert np.abs(drawn[0] - drawn[1]).max() <= 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stdout is not None
        assert '"done": 5' in process.stdout.read()
    assert (
        main(["run", str(tiny_bundle), "red apple", "--steps", "2", "--seed", "5", "-o", str(tmp_path / "a.png")]) == 0
    )
    assert (tmp_path / "a.png").read_bytes() == picture.content
    assert str(tiny_bundle) not in str(entry)


def engine_of(server: int) -> int:
    """The child process of a server."""
    threads = Path(f"/proc/{server}/task").glob("*/children")
    (found,) = [word for thread in threads for word in thread.read_text(encoding="ascii").split()]
    return int(found)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the child in /proc")
def test_case_34_a_killed_engine_is_a_503_and_the_server_goes_on(tiny_bundle: Path) -> None:
    words = ["-m", "diffship", "serve", f"toy={tiny_bundle}", "--port", "0", "--restarts", "2", "--option", "threads=1"]
    body = {"prompt": "red apple", "seed": 5, "steps": 2}
    with child(*words) as (process, url), ThreadPoolExecutor(1) as pool:
        before = httpx.post(f"{url}/v1/generate", json=body, timeout=60).content
        for _ in range(2):
            engine = engine_of(process.pid)
            job = pool.submit(httpx.post, f"{url}/v1/generate", json={**body, "steps": 150}, timeout=60)
            until(lambda: under_way(url, 1, 0))
            os.kill(engine, signal.SIGKILL)
            answer = job.result()
            assert answer.status_code == 503 and answer.headers["Retry-After"] == "1"
            error = answer.json()["error"]
            assert error["request_id"] == answer.headers["X-Request-Id"] and "ended with code -9" in error["message"]
            until(lambda: httpx.get(f"{url}/ready").status_code == 200, 20)
            assert engine_of(process.pid) != engine
            assert httpx.post(f"{url}/v1/generate", json=body, timeout=60).content == before
        os.kill(engine_of(process.pid), signal.SIGKILL)
        until(lambda: httpx.get(f"{url}/ready").json()["models"] == {"toy": "restarting"})
        assert httpx.get(f"{url}/live").status_code == 200 and post(url, steps=1) == 503
        assert 'diffship_restarts_total{model="toy"} 2\n' in httpx.get(f"{url}/metrics").text
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the child in /proc")
def test_case_33_an_engine_that_hangs_does_not_keep_a_stopped_server(tiny_bundle: Path) -> None:
    words = ["-m", "diffship", "serve", f"toy={tiny_bundle}", "--port", "0", "--grace", "0.5", "--option", "threads=1"]
    with child(*words) as (process, url), ThreadPoolExecutor(1) as pool:
        engine = engine_of(process.pid)
        job = pool.submit(post, url, steps=150)
        until(lambda: under_way(url, 1, 0))
        os.kill(engine, signal.SIGSTOP)
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 4 and time.monotonic() - begun < 15
        assert job.result() == 503 and not Path(f"/proc/{engine}").exists()


@pytest.mark.slow
def test_case_34_a_model_that_breaks_ends_the_process_with_its_reason() -> None:
    before = signal.getsignal(signal.SIGTERM)
    said: list[str] = []
    service = Service([Served("fill", ToyModel("inpaint"))], ServeOptions())
    with pytest.raises(UnsupportedError, match="fills masks"):
        serve_until_asked(service, bind("127.0.0.1", 0), said=said.append)
    assert len(said) == 1 and "loading fill" in said[0]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_case_26_ten_minutes_at_70_percent_grow_nothing() -> None:
    psutil = pytest.importorskip("psutil")
    with child(str(HERE / "serve_child.py"), "0.005", "5", "4") as (process, url), httpx.Client(base_url=url) as client:
        watched = psutil.Process(process.pid)
        seconds = []
        for seed in range(50):
            begin = time.monotonic()
            client.post("/v1/generate", json={"prompt": "cat", "steps": 5, "seed": seed})
            seconds.append(time.monotonic() - begin)
        pause, samples, begin = float(np.median(seconds)) / 0.7, [], time.monotonic()
        while (now := time.monotonic() - begin) < 600:
            tick = time.monotonic()
            assert client.post("/v1/generate", json={"prompt": "cat", "steps": 5, "seed": 1}).status_code == 200
            if now > 120 and (not samples or now - samples[-1][0] > 1):
                memory, files, threads = watched.memory_info().rss / 1e6, watched.num_fds(), watched.num_threads()
                samples.append((now, memory, files, threads))
            time.sleep(max(tick + pause - time.monotonic(), 0))
    times, memory, files, threads = np.array(samples).T
    assert 60 * np.polyfit(times, memory, 1)[0] < 1.0
    assert files.max() - files.min() <= 2 and threads.max() - threads.min() <= 2


BAD = {
    "no bundle": (["serve"], 2, "required: [NAME=]DIR"),
    "missing bundle": (["serve", "./nowhere", "--port", "0"], 2, "nowhere"),
    "open to all": (["serve", "D", "--host", "0.0.0.0"], 2, "needs a token"),
    "empty label": (["serve", "D", "--host", "a..b", "--token", "t" * 16], 2, "--host 'a..b'"),
    "long label": (["serve", "D", "--host", "a" * 64, "--token", "t" * 16], 2, "an address of this machine"),
    "short token": (["serve", "D", "--token", "abc"], 2, "legal is 16 to 512"),
    "port": (["serve", "D", "--port", "70000"], 2, "from 0 to 65535"),
    "queue": (["serve", "D", "--queue", "0"], 2, "from 1 to 4096"),
    "batch": (["serve", "D", "--batch", "65"], 2, "from 1 to 64"),
    "deadline": (["serve", "D", "--deadline", "601"], 2, "600"),
    "two of a name": (["serve", "a/x", "b/x"], 2, "NAME=DIR"),
    "bad name": (["serve", "A B=x"], 2, "legal are"),
}


@pytest.mark.parametrize("name", BAD)
def test_case_36_bad_usage_is_exit_code_2(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.delenv("DIFFSHIP_TOKEN", raising=False)
    words, code, message = BAD[name]
    assert main(words) == code
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == "" and "Traceback" not in captured.err


def test_case_36_a_port_in_use_ends_the_verb_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with bind("127.0.0.1", 0) as listener:
        assert main(["serve", "D", "--port", str(listener.port)]) == 2
    assert "in use" in capsys.readouterr().err


def test_names_of_models() -> None:
    assert named(["out/Emoji", "b=out/x", "arch:tiny-sd"]) == {
        "emoji": "out/Emoji",
        "b": "out/x",
        "arch-tiny-sd": "arch:tiny-sd",
    }
    with pytest.raises(ConfigError, match="two models"):
        named(["a=x", "a=y"])
