"""The server under load: what step-level batching gains, latency at 70 %, goodput at five times its capacity.

python -m diffship.benchmarks.serving --bundle out/emoji --out benchmarks/results/serving.json

The server is a process of its own, its clients are threads of this one over loopback; every request has its own prompt
seed. Rounds are interleaved: one client, eight clients, eight clients without batching, then all again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from diffship.benchmarks.entry import enter, named_bundle
from diffship.benchmarks.process import family, resident_bytes
from diffship.benchmarks.record import write_result
from diffship.core.errors import RunnerError
from diffship.core.row import Row
from diffship.runtimes.model import open_model
from diffship.sampling.generate import Request, start
from diffship.sampling.loop import advance, plain

SUITE = "serving"
BATCH = 8
QUEUE = 8
OVERLOAD = 5
STEADY = 0.7
WARM_SECONDS = 120.0  # of the memory's slope, as in case 26
_START_SECONDS = 120.0


@dataclass(frozen=True)
class Answer:
    """One request as its client saw it: status, seconds from sending to the last byte, which client."""

    status: int
    seconds: float
    client: int = 0


@dataclass
class Server:
    """A running server: where, and its process."""

    place: str
    pid: int
    seeds: Iterator[int] = field(default_factory=count)

    def ask(self, steps: int, deadline: float, client: int = 0) -> Answer:
        body = {"prompt": "a red apple", "steps": steps, "seed": next(self.seeds), "deadline_seconds": deadline}
        begin = time.perf_counter()
        with closing(HTTPConnection(self.place, timeout=deadline + 10)) as connection:
            connection.request("POST", "/v1/generate", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
        return Answer(answer.status, time.perf_counter() - begin, client)

    def resident_bytes(self) -> int:
        """Memory of the server's process and of its engines, which are children of it (Linux)."""
        return sum(map(resident_bytes, family(self.pid)))


@contextmanager
def server(bundle: Path, batch: int, queue: int) -> Iterator[Server]:
    """`diffship serve` in a process of its own, ready, for a `with` block.

    Raises:
        RunnerError: it did not become ready, or did not stop when asked to.
    """
    words = ["serve", str(bundle), "--port", "0", "--batch", str(batch), "--queue", str(queue), "--quiet"]
    command = [sys.executable, "-m", "diffship", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None  # it is a pipe
    reader: threading.Thread | None = None
    try:
        url = _ready(process)
        reader = threading.Thread(target=process.stderr.read, daemon=True)
        reader.start()
        yield Server(urlsplit(url).netloc, process.pid)
        process.send_signal(signal.SIGTERM)
        if process.wait(60) != 0:
            raise RunnerError(f"the server ended with {process.returncode}")
    finally:
        process.kill()
        process.wait()
        if reader is not None:
            reader.join(10)
        process.stderr.close()


def _ready(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    lines, end = [], time.monotonic() + _START_SECONDS
    while time.monotonic() < end and (line := process.stderr.readline()):
        lines.append(line)
        found = re.match(r"ready on (\S+)", line)
        if found:
            return found[1]
    raise RunnerError(f"the server is not ready: {''.join(lines)[-500:]}")


def closed_loop(served: Server, clients: int, steps: int, seconds: float) -> tuple[list[Answer], float]:
    """Every client asks again as soon as it has its answer; the answers, and how long it took."""
    begin = time.perf_counter()

    def client(number: int) -> list[Answer]:
        made = []
        while time.perf_counter() - begin < seconds:
            made.append(served.ask(steps, 600, number))
        return made

    with ThreadPoolExecutor(clients) as pool:
        answers = [answer for made in pool.map(client, range(clients)) for answer in made]
    return answers, time.perf_counter() - begin


def open_loop(
    served: Server, rate: float, steps: int, seconds: float, deadline: float, seed: int = 0
) -> tuple[list[Answer], float]:
    """Requests at random moments, `rate` a second on average (a Poisson process), whatever becomes of the others."""
    draw, begin, jobs, at = random.Random(seed), time.perf_counter(), [], 0.0
    with ThreadPoolExecutor(256) as pool:
        while (at := at + draw.expovariate(rate)) < seconds:
            time.sleep(max(begin + at - time.perf_counter(), 0))
            jobs.append(pool.submit(served.ask, steps, deadline))
        answers = [job.result() for job in jobs]
    return answers, time.perf_counter() - begin


def quantile(values: Sequence[float], share: float) -> float:
    """Linear between neighbours, as numpy's default."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def slope(times: Sequence[float], values: Sequence[float]) -> float:
    """Least squares: change of the values per unit of time."""
    x, y = statistics.fmean(times), statistics.fmean(values)
    spread = sum((t - x) ** 2 for t in times)
    return sum((t - x) * (v - y) for t, v in zip(times, values, strict=True)) / spread if spread else 0.0


@dataclass(frozen=True)
class Plan:
    """What is measured: seconds per phase and round, rounds, steps of a picture, clients, deadline of the overload."""

    bundle: Path
    steps: int
    seconds: float
    rounds: int
    clients: int
    soak: float

    @property
    def subject(self) -> str:
        return f"{self.bundle.name}, {self.steps} steps"


def engine_curve(plan: Plan, batches: Sequence[int] = (1, 2, 4, 8)) -> list[Row]:
    """Images a second of the U-Net calls alone, by how many share one: what batching could gain at most."""
    rows = []
    with open_model(plan.bundle) as model:
        denoiser = plain(model.use("unet"))
        for batch in batches:
            begun = start(model, Request("a red apple", steps=plan.steps))[0]
            advance([begun] * batch, denoiser)
            seconds = []
            for _ in range(5):
                begin = time.perf_counter()
                advance([begun] * batch, denoiser)
                seconds.append(time.perf_counter() - begin)
            rates = [batch / value for value in seconds]
            rows.append(_row(plan, "call_images_per_second", rates, "images/s", batch=batch))
    return rows


def batching(plan: Plan) -> tuple[list[Row], float]:
    """One client, eight, and eight without batching; the rows, and the capacity in images a second."""
    found: dict[str, list[list[Answer]]] = {"one": [], "many": [], "unbatched": []}
    rates: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(plan.rounds):
        for name, batch, clients in (
            ("one", BATCH, 1),
            ("many", BATCH, plan.clients),
            ("unbatched", 1, plan.clients),
        ):
            with server(plan.bundle, batch, plan.clients) as served:
                served.ask(plan.steps, 600)
                answers, seconds = closed_loop(served, clients, plan.steps, plan.seconds)
            _require_ok(answers)
            found[name].append(answers)
            rates[name].append(len(answers) / seconds)
    rows = []
    for name, clients in (("one", 1), ("many", plan.clients), ("unbatched", plan.clients)):
        where = {"clients": clients, "batch": 1 if name == "unbatched" else BATCH}
        rows.append(_row(plan, "throughput", rates[name], "images/s", **where))
        for share, metric in ((0.5, "request_seconds_p50"), (0.99, "request_seconds_p99")):
            values = [quantile([answer.seconds for answer in turn], share) for turn in found[name]]
            rows.append(_row(plan, metric, values, "s", **where))
    gains = [many / one for many, one in zip(rates["many"], rates["one"], strict=True)]
    rows.append(_row(plan, "throughput_ratio", gains, "", clients=plan.clients, against="one client"))
    gains = [many / other for many, other in zip(rates["many"], rates["unbatched"], strict=True)]
    rows.append(_row(plan, "throughput_ratio", gains, "", clients=plan.clients, against="batch 1"))
    rows.append(_row(plan, "slowest_over_fastest_client", [_fairness(turn) for turn in found["many"]], ""))
    return rows, statistics.median(rates["many"])


def steady(plan: Plan, capacity: float) -> list[Row]:
    """Latency at 70 % of the capacity, and in a soak how the server's memory grows once it is warm."""
    samples: list[tuple[float, float]] = []
    over = threading.Event()
    seconds = max(plan.seconds, plan.soak)
    with server(plan.bundle, BATCH, QUEUE) as served:
        served.ask(plan.steps, 600)

        def watch() -> None:
            begin = time.perf_counter()
            while not over.wait(seconds / 200):
                samples.append((time.perf_counter() - begin, served.resident_bytes() / 1e6))

        watcher = threading.Thread(target=watch)
        watcher.start()
        answers, _ = open_loop(served, STEADY * capacity, plan.steps, seconds, 600)
        over.set()
        watcher.join()
    values = [answer.seconds for answer in answers if answer.status == 200]
    where = {"load": STEADY, "requests": len(answers)}
    rows = [
        _row(plan, "request_seconds_p50", [quantile(values, 0.5)], "s", **where),
        _row(plan, "request_seconds_p99", [quantile(values, 0.99)], "s", **where),
        _row(plan, "refused_share", [sum(a.status != 200 for a in answers) / len(answers)], "", **where),
    ]
    late = [sample for sample in samples if sample[0] > WARM_SECONDS]
    if seconds >= 2 * WARM_SECONDS:  # an engine's arena grows with the first batch of every size
        rows.append(_row(plan, "memory_slope", [60 * slope(*zip(*late, strict=True))], "MB/min", seconds=seconds))
    return rows


def overload(plan: Plan, capacity: float) -> list[Row]:
    """Five times the capacity: what is still served in time, and how fast the rest is turned away."""
    deadline = min(max(1.0, 2 * (QUEUE + BATCH) / capacity), 600.0)
    goodput, refused, late, busiest = [], [], [], []
    for turn in range(plan.rounds):
        with server(plan.bundle, BATCH, QUEUE) as served:
            served.ask(plan.steps, 600)
            answers, seconds = open_loop(served, OVERLOAD * capacity, plan.steps, plan.seconds, deadline, turn)
        goodput.append(sum(answer.status == 200 for answer in answers) / seconds / capacity)
        refused += [answer.seconds for answer in answers if answer.status == 503]
        late.append(sum(answer.status == 504 for answer in answers) / len(answers))
        busiest.append(max(answer.seconds for answer in answers))
    where = {"load": OVERLOAD, "deadline_seconds": round(deadline, 3)}
    rows = [
        _row(plan, "goodput_over_capacity", goodput, "", **where),
        _row(plan, "late_share", late, "", **where),
        _row(plan, "slowest_answer_seconds", busiest, "s", **where),
    ]
    if refused:
        rows.append(_row(plan, "refusal_seconds_p99", [quantile(refused, 0.99)], "s", **where))
    return rows


def run(plan: Plan) -> list[Row]:
    rows, capacity = batching(plan)
    return [*engine_curve(plan), *rows, *steady(plan, capacity), *overload(plan, capacity)]


def _row(plan: Plan, metric: str, values: Sequence[float], unit: str, **conditions: Any) -> Row:
    """The median of the rounds, with the least and the largest."""
    return Row(
        SUITE,
        f"{plan.subject}, {', '.join(f'{key} {value}' for key, value in conditions.items())}".rstrip(", "),
        metric,
        statistics.median(values),
        unit,
        kind="load",
        low=min(values),
        high=max(values),
        n=len(values),
        conditions=conditions,
    )


def _fairness(answers: Sequence[Answer]) -> float:
    means = {
        number: statistics.fmean(answer.seconds for answer in answers if answer.client == number)
        for number in {answer.client for answer in answers}
    }
    return max(means.values()) / min(means.values())


def _require_ok(answers: Sequence[Answer]) -> None:
    bad = [answer.status for answer in answers if answer.status != 200]
    if bad:
        raise RunnerError(f"{len(bad)} of {len(answers)} requests failed; the first with {bad[0]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=named_bundle, required=True)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=30.0, help="of every phase and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--soak", type=float, default=0.0, help="seconds of the steady phase, where longer")
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    plan = Plan(words.bundle, words.steps, words.seconds, words.rounds, words.clients, words.soak)
    rows = run(plan)
    if words.out:
        settings = {"steps": words.steps, "seconds": words.seconds, "rounds": words.rounds, "soak": words.soak}
        command = f"python -m diffship.benchmarks.serving --bundle {words.bundle.name}"
        write_result(words.out, SUITE, command, rows, {**settings, "cores": os.cpu_count()})
    for row in rows:
        print(f"{row.subject:60} {row.metric:28} {row.value:.4g} {row.unit}")


if __name__ == "__main__":
    enter(main)
