"""The server under load: what step-level batching gains, latency at 70 %, goodput at five times its capacity.

python -m diffship.benchmarks serving [--bundle out/emoji] [--soak 600]

The server is a process of its own, its clients are threads of this one over loopback; every request has its own prompt
seed. Rounds are interleaved: one client, eight clients, eight clients without batching, then all again.
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from diffship.benchmarks.entry import enter, named_bundle
from diffship.benchmarks.measure.intervals import ratio, spread, supports
from diffship.benchmarks.measure.record import write_result
from diffship.benchmarks.measure.row import Row
from diffship.benchmarks.studies.service.load import Answer, Server, closed_loop, open_loop, server
from diffship.benchmarks.studies.workbench import add_work, bundle
from diffship.core.errors import RunnerError
from diffship.core.quiet import timing
from diffship.runtimes.engines.model import open_model
from diffship.sampling.generate import Request, start
from diffship.sampling.loop import advance, denoiser_of

SUITE = "serving"
BATCH = 8
QUEUE = 8
OVERLOAD = 5
STEADY = 0.7
WARM_SECONDS = 120.0  # of the memory's slope: arenas grow with the first batch of every size


def slope(times: Sequence[float], values: Sequence[float]) -> float:
    """Least squares: change of the values per unit of time."""
    x, y = statistics.fmean(times), statistics.fmean(values)
    square = sum((t - x) ** 2 for t in times)
    return sum((t - x) * (v - y) for t, v in zip(times, values, strict=True)) / square if square else 0.0


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
        denoiser = denoiser_of(model)
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


PHASES = ("one", "many", "unbatched")


def batching(plan: Plan, phases: Sequence[str] = PHASES) -> tuple[list[Row], float]:
    """One client, eight, and eight without batching; the rows, and the capacity in images a second."""
    found: dict[str, list[list[Answer]]] = {name: [] for name in phases}
    rates: dict[str, list[float]] = {name: [] for name in phases}
    shapes = {"one": (BATCH, 1), "many": (BATCH, plan.clients), "unbatched": (1, plan.clients)}
    for _ in range(plan.rounds):
        for name in phases:
            batch, clients = shapes[name]
            with server(plan.bundle, batch, plan.clients) as served:
                served.ask(plan.steps, 600)
                answers, seconds = closed_loop(served, clients, plan.steps, plan.seconds)
            _require_ok(answers)
            found[name].append(answers)
            rates[name].append(len(answers) / seconds)
    rows = []
    for name in phases:
        batch, clients = shapes[name]
        where = {"clients": clients, "batch": batch}
        rows.append(_row(plan, "throughput", rates[name], "images/s", **where))
        rows += _percentiles(plan, [[answer.seconds for answer in turn] for turn in found[name]], where)
    for other, against in (("one", "one client"), ("unbatched", "batch 1")):
        if other not in phases:
            continue
        gain = ratio(rates["many"], rates[other])
        row = _row(plan, "throughput_ratio", [gain.mean], "", clients=plan.clients, against=against)
        facts = {**row.conditions, "interval": gain.how}
        rows.append(replace(row, low=gain.low, high=gain.high, n=gain.n, conditions=facts))
    rows.append(_row(plan, "slowest_over_fastest_client", [_fairness(turn) for turn in found["many"]], ""))
    return rows, statistics.median(rates["many"])


def _percentiles(plan: Plan, rounds: Sequence[Sequence[float]], where: dict[str, Any]) -> list[Row]:
    """p50 and p99 of requests: the median of the rounds' own, each only if every round has enough requests for it."""
    rows = []
    for share, metric in ((0.5, "request_seconds_p50"), (0.99, "request_seconds_p99")):
        if all(supports(len(values), share) for values in rounds):
            found = [float(np.quantile(values, share)) for values in rounds]
            rows.append(_row(plan, metric, found, "s", **where))
    return rows


def steady(plan: Plan, capacity: float) -> list[Row]:
    """Latency at 70 % of the capacity, and in a soak how the server's memory grows once it is warm.

    One phase: its rows have no spread, and `requests` says how many there were.
    """
    seconds = max(plan.seconds, plan.soak)
    with server(plan.bundle, BATCH, QUEUE) as served, _Memory(served, seconds / 200) as memory:
        served.ask(plan.steps, 600)
        answers, _ = open_loop(served, STEADY * capacity, plan.steps, seconds, 600)
    where = {"load": STEADY, "requests": len(answers)}
    rows = _percentiles(plan, [[answer.seconds for answer in answers if answer.status == 200]], where)
    refused = sum(answer.status != 200 for answer in answers) / max(len(answers), 1)
    rows.append(_row(plan, "refused_share", [refused], "", **where))
    late = [sample for sample in memory.samples if sample[0] > WARM_SECONDS]
    if seconds >= 2 * WARM_SECONDS:
        rows.append(_row(plan, "memory_slope", [60 * slope(*zip(*late, strict=True))], "MB/min", seconds=seconds))
    return rows


class _Memory:
    """Looks at a server's memory from time to time, in a thread: (seconds, MB) in `samples`."""

    def __init__(self, served: Server, every: float) -> None:
        self._served, self._every, self._over = served, every, threading.Event()
        self.samples: list[tuple[float, float]] = []
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(10)

    def _watch(self) -> None:
        begin = time.perf_counter()
        while not self._over.wait(self._every):
            self.samples.append((time.perf_counter() - begin, self._served.resident_bytes() / 1e6))


def overload(plan: Plan, capacity: float) -> list[Row]:
    """Five times the capacity: what is still served in time, and how fast the rest is turned away."""
    deadline = min(max(1.0, 2 * (QUEUE + BATCH) / capacity), 600.0)
    goodput, late, busiest = [], [], []
    refused: list[list[float]] = []
    for turn in range(plan.rounds):
        with server(plan.bundle, BATCH, QUEUE) as served:
            served.ask(plan.steps, 600)
            answers, seconds = open_loop(served, OVERLOAD * capacity, plan.steps, plan.seconds, deadline, turn)
        goodput.append(sum(answer.status == 200 for answer in answers) / seconds / capacity)
        refused.append([answer.seconds for answer in answers if answer.status == 503])
        late.append(sum(answer.status == 504 for answer in answers) / max(len(answers), 1))
        busiest.append(max(answer.seconds for answer in answers))
    where = {"load": OVERLOAD, "deadline_seconds": round(deadline, 3)}
    rows = [
        _row(plan, "goodput_over_capacity", goodput, "", **where),
        _row(plan, "late_share", late, "", **where),
        _row(plan, "slowest_answer_seconds", busiest, "s", **where),
    ]
    if all(supports(len(values), 0.99) for values in refused):
        slowest = [float(np.quantile(values, 0.99)) for values in refused]
        rows.append(_row(plan, "refusal_seconds_p99", slowest, "s", **where))
    return rows


def run(plan: Plan) -> list[Row]:
    with timing(SUITE):
        rows, capacity = batching(plan)
        return [*engine_curve(plan), *rows, *steady(plan, capacity), *overload(plan, capacity)]


_MEASURED = ("requests", "deadline_seconds")  # conditions that the run itself finds: they do not name a row


def _row(plan: Plan, metric: str, values: Sequence[float], unit: str, **conditions: Any) -> Row:
    """The median of the rounds, with the least and the largest; no spread of one round."""
    named = [f"{key} {value}" for key, value in conditions.items() if key not in _MEASURED]
    subject = ", ".join([plan.subject, *named])
    value, facts = statistics.median(values), dict(conditions)
    return Row(SUITE, subject, metric, value, unit, kind="load", conditions=facts, **spread(values))


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


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=named_bundle, help="what is served (emoji, made)")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=30.0, help="of every phase and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--soak", type=float, default=600.0, help="seconds of the steady phase, if longer (600)")
    add_work(parser)
    words = parser.parse_args(argv)
    folder = words.bundle or bundle("emoji", words.work)
    plan = Plan(folder, words.steps, words.seconds, words.rounds, words.clients, words.soak)
    rows = run(plan)
    if words.out:
        settings = {"steps": words.steps, "seconds": words.seconds, "rounds": words.rounds, "soak": words.soak}
        command = "python -m diffship.benchmarks serving"
        command += f" --bundle {words.bundle.name}" if words.bundle else ""
        write_result(words.out, SUITE, command, rows, {**settings, "cores": os.cpu_count()})
    for row in rows:
        print(f"{row.subject:60} {row.metric:28} {row.value:.4g} {row.unit}")


if __name__ == "__main__":
    enter(main)
