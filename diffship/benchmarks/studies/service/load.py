"""A server in a process of its own, and clients that ask it: each as fast as it is answered, or at given moments."""

from __future__ import annotations

import json
import queue
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit

from diffship.benchmarks.measure.process import family, resident_bytes
from diffship.core.errors import RunnerError

CLIENTS = 256  # requests of an open loop that are under way at once
_START_SECONDS = 120.0
_SAID = 50  # lines of the server that an error may quote


@dataclass(frozen=True)
class Answer:
    """One request as its client saw it: status, seconds from when it was due to the last byte, which client."""

    status: int
    seconds: float
    client: int = 0


@dataclass
class Server:
    """A running server: where, and its process."""

    place: str
    pid: int
    seeds: Iterator[int] = field(default_factory=count)

    def ask(self, steps: int, deadline: float, client: int = 0, due: float | None = None) -> Answer:
        """One picture. `due` (of `time.perf_counter`) is when it should have been sent, by default now: a client that
        was late has kept its user waiting, and that time counts."""
        begin = time.perf_counter() if due is None else due
        body = {"prompt": "a red apple", "steps": steps, "seed": next(self.seeds), "deadline_seconds": deadline}
        with closing(HTTPConnection(self.place, timeout=deadline + 10)) as connection:
            connection.request("POST", "/v1/generate", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
        return Answer(answer.status, time.perf_counter() - begin, client)

    def resident_bytes(self) -> int:
        """Memory of the server's process and of its engines, which are children of it (Linux)."""
        return sum(map(resident_bytes, family(self.pid)))


@contextmanager
def server(bundle: Path, batch: int, waiting: int) -> Iterator[Server]:
    """`diffship serve` in a process of its own, ready, for a `with` block.

    Raises:
        RunnerError: it did not become ready, or did not stop when asked to.
    """
    words = ["serve", str(bundle), "--port", "0", "--batch", str(batch), "--queue", str(waiting), "--quiet"]
    command = [sys.executable, "-m", "diffship", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    said = _Said(process)
    try:
        yield Server(urlsplit(said.address(_START_SECONDS)).netloc, process.pid)
        process.send_signal(signal.SIGTERM)
        if process.wait(60) != 0:
            raise RunnerError(f"the server ended with {process.returncode}")
    finally:
        process.kill()
        process.wait(60)
        said.close()


class _Said:
    """What a server says, read by a thread, so that its pipe never fills and waiting for it has a limit."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None  # it is a pipe
        self._stream, self._lines = process.stderr, queue.Queue[str]()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for line in self._stream:  # no timeout: it ends with the server, which is killed if need be
            if self._lines.qsize() < _SAID:
                self._lines.put(line)
        self._lines.put("")

    def address(self, seconds: float) -> str:
        """Where it serves, once it says so. Raises RunnerError after `seconds`, or if it ends first."""
        lines, end = [], time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            try:
                line = self._lines.get(timeout=left)
            except queue.Empty:
                break
            if not line:
                break
            lines.append(line)
            found = re.match(r"ready on (\S+)", line)
            if found:
                return found[1]
        raise RunnerError(f"the server is not ready: {''.join(lines)[-500:]}")

    def close(self) -> None:
        self._thread.join(10)
        self._stream.close()


def closed_loop(served: Server, clients: int, steps: int, seconds: float) -> tuple[list[Answer], float]:
    """Every client asks again as soon as it has its answer; the answers, and how long it took."""
    begin = time.perf_counter()

    def client(number: int) -> list[Answer]:
        made = []
        while time.perf_counter() - begin < seconds:
            made.append(served.ask(steps, 600, number))
        return made

    # no timeout: every request has one
    with ThreadPoolExecutor(clients) as pool:
        answers = [answer for made in pool.map(client, range(clients)) for answer in made]
    return answers, time.perf_counter() - begin


def open_loop(
    served: Server, rate: float, steps: int, seconds: float, deadline: float, seed: int = 0, clients: int = CLIENTS
) -> tuple[list[Answer], float]:
    """Requests at random moments, `rate` a second on average (a Poisson process), whatever becomes of the others.

    Latency counts from the moment at which a request was due. If all `clients` wait for a server that stalls, the
    requests that fall due meanwhile are sent late, and their users have waited all the same.
    """
    draw, begin, jobs, at = random.Random(seed), time.perf_counter(), [], 0.0
    # no timeout: every request has one
    with ThreadPoolExecutor(clients) as pool:
        while (at := at + draw.expovariate(rate)) < seconds:
            time.sleep(max(begin + at - time.perf_counter(), 0))
            jobs.append(pool.submit(served.ask, steps, deadline, 0, begin + at))
        answers = [job.result() for job in jobs]  # no timeout: every request has one
    return answers, time.perf_counter() - begin
