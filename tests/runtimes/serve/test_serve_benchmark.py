"""The load generator of the benchmark, held against numpy and against a server whose pace is known."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from serve_toy import HeldModel, toy_server

from diffship.benchmarks.studies.service import load, serving
from diffship.benchmarks.studies.service.load import Answer, Server, closed_loop, open_loop
from diffship.benchmarks.studies.service.serving import Plan, _fairness, slope
from diffship.core.errors import RunnerError


class Stalled(BaseHTTPRequestHandler):
    """A server that answers at once, but for its first second, in which it answers nobody."""

    opened = 0.0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(max(0.0, type(self).opened + 1.0 - time.perf_counter()))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


@contextmanager
def stalled_server() -> Iterator[Server]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Stalled) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        Stalled.opened = time.perf_counter()
        yield Server(f"127.0.0.1:{listening.server_port}", os.getpid())
        listening.shutdown()
        thread.join(10)


@pytest.mark.slow
def test_those_who_could_not_even_ask_have_waited_too() -> None:
    """40 requests a second, two of them at once, and a second of silence: whoever fell due in it waited for its end.

    A generator that starts its clock when it sends sees two slow requests, and the median of the others' milliseconds.
    """
    with stalled_server() as served:
        answers, _ = open_loop(served, 40, 1, 1.0, 5, seed=1, clients=2)
    seconds = sorted(answer.seconds for answer in answers)
    assert len(seconds) >= 25
    assert seconds[-1] > 0.9 and float(np.median(seconds)) > 0.3
    assert sum(value > 0.25 for value in seconds) > len(seconds) / 2


def test_percentiles_that_a_phase_has_not_are_left_out(tmp_path: Path) -> None:
    plan = Plan(tmp_path / "emoji", 25, 1.0, 3, 8, 0.0)
    few = serving._percentiles(plan, [[1.0, 2.0, 9.0]], {"load": 0.7, "requests": 3})
    assert [(row.metric, row.value, row.low, row.high, row.n) for row in few] == [
        ("request_seconds_p50", 2.0, None, None, 1)
    ]
    assert few[0].subject == "emoji, 25 steps, load 0.7", "what was counted does not name the row"
    many = serving._percentiles(plan, [[float(value) for value in range(100)]] * 2, {"load": 0.7})
    assert [(row.metric, row.value, row.low) for row in many] == [
        ("request_seconds_p50", 49.5, 49.5),
        ("request_seconds_p99", pytest.approx(98.01), pytest.approx(98.01)),
    ]


def test_a_server_that_says_nothing_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_START_SECONDS", 0.3)
    monkeypatch.setattr(load.sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text("#!/bin/sh\nexec sleep 30\n", encoding="utf-8")
    (tmp_path / "python").chmod(0o755)
    begin = time.monotonic()
    with pytest.raises(RunnerError, match="the server is not ready"), load.server(tmp_path, 1, 1):
        pass
    assert time.monotonic() - begin < 15


def test_the_slope_is_that_of_least_squares() -> None:
    draw = np.random.default_rng(1)
    times, values = draw.random(40), draw.random(40)
    assert slope(list(times), list(values)) == pytest.approx(np.polyfit(times, values, 1)[0])


def test_fairness_is_the_slowest_mean_over_the_fastest() -> None:
    answers = [Answer(200, 1.0, 0), Answer(200, 3.0, 0), Answer(200, 1.0, 1), Answer(200, 4.0, 2)]
    assert _fairness(answers) == 4.0


@pytest.mark.slow
def test_a_closed_loop_has_as_many_requests_under_way_as_clients() -> None:
    model = HeldModel(delay=0.01)
    with toy_server(model) as (url, service):
        served = Server(urlsplit(url).netloc, os.getpid())
        answers, seconds = closed_loop(served, 4, 3, 0.4)
        assert service.metrics.value("diffship_generations_total", model="toy", outcome="done") == len(answers)
    assert {answer.client for answer in answers} == {0, 1, 2, 3}
    assert all(answer.status == 200 and 0.03 <= answer.seconds <= seconds for answer in answers)
    assert max(model.batches) == 8  # two rows an image


@pytest.mark.slow
def test_an_open_loop_asks_at_its_own_pace_whatever_the_server_does() -> None:
    model = HeldModel(delay=0.02)
    with toy_server(model, batch=1, queue=1) as (url, _):
        served = Server(urlsplit(url).netloc, os.getpid())
        answers, _ = open_loop(served, 100, 4, 0.5, 5, seed=3)
        assert served.resident_bytes() > 1 << 20
    assert 25 <= len(answers) <= 80  # 50 expected of a Poisson process
    assert {answer.status for answer in answers} == {200, 503}
