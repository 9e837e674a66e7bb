"""What a handoff adds to a picture: writing the trajectory, HTTP over loopback, reading it.

python -m diffship.benchmarks handoff-overhead [--bundle out/emoji]

The server is a process of its own, with the same bundle as this one. HTTP is the time that the client waits, less what
the server says it queued and drew (`Server-Timing`), so that it holds parsing, waking threads and the network.
Rounds with and without embeddings are interleaved. The goal is under 10 ms and under 2 % of the generation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diffship.benchmarks.entry import enter, named_bundle
from diffship.benchmarks.measure.intervals import spread
from diffship.benchmarks.measure.record import write_result
from diffship.benchmarks.measure.row import Row
from diffship.benchmarks.studies.service.load import server
from diffship.benchmarks.studies.workbench import add_work, bundle
from diffship.core.errors import RunnerError
from diffship.core.quiet import timing
from diffship.runtimes.handoff.client import HybridClient
from diffship.runtimes.handoff.transport import Answer
from diffship.sampling.request import Request
from diffship.sampling.wire import pack, unpack

SUITE = "handoff-overhead"
_SECONDS = 600.0


@dataclass(frozen=True)
class Overhead:
    """One handoff, in milliseconds."""

    pack_ms: float
    http_ms: float
    unpack_ms: float
    size_bytes: int

    @property
    def total_ms(self) -> float:
        return self.pack_ms + self.http_ms + self.unpack_ms


@dataclass(frozen=True)
class Plan:
    """`split` is (calls of the server, calls here); `seed` counts up, so that no answer is one that was kept."""

    bundle: Path
    split: tuple[int, int]
    rounds: int
    size: int | None = None

    @property
    def steps(self) -> int:
        return sum(self.split)

    def request(self, seed: int) -> Request:
        size = None if self.size is None else (self.size, self.size)
        return Request("a red apple", steps=self.steps, size=size, seed=seed)


def overhead(client: HybridClient, plan: Plan, seed: int, embeddings: bool) -> Overhead:
    """One handoff of `plan.split[0]` calls, whose answer is written and read once more here, each timed alone.

    Raises:
        RunnerError: the server does not say how long it drew, or its answer is not what is written here.
        CloudError: no answer.
    """
    settled = client.settled(plan.request(seed), plan.steps)
    asked = json.loads(client.body(client.facts(), settled, plan.split[0], _SECONDS))
    body = json.dumps({**asked, "embeddings": embeddings}).encode()
    answer = client.cloud.submit(client.cloud.handoff(body, uuid.uuid4().hex, _SECONDS)).result(_SECONDS + 1)
    since = time.perf_counter()
    trajectory = unpack(answer.body)
    read = time.perf_counter()
    again = pack(trajectory, embeddings=embeddings)
    written = time.perf_counter()
    if again != answer.body:
        raise RunnerError("the trajectory that came is not the one that is written here: other versions?")
    return Overhead(1000 * (written - read), _http_ms(answer), 1000 * (read - since), len(answer.body))


def measure(client: HybridClient, plan: Plan) -> tuple[dict[bool, list[Overhead]], list[float]]:
    """Handoffs with (True) and without embeddings, and the milliseconds of whole pictures, one of each a round."""
    client.generate(plan.request(0), plan.split)
    found: dict[bool, list[Overhead]] = {True: [], False: []}
    whole = []
    for turn in range(plan.rounds):
        for place, embeddings in enumerate(found):
            found[embeddings].append(overhead(client, plan, 3 * turn + place + 1, embeddings))
        report = client.generate(plan.request(3 * turn + 3), plan.split).report
        if report.fallback is not None:
            raise RunnerError(f"the cloud failed: {report.fallback}")
        whole.append(report.total_ms)
    return found, whole


def rows(plan: Plan, found: dict[bool, list[Overhead]], whole: Sequence[float]) -> list[Row]:
    made = [_row(plan, "generation_ms", whole, "ms")]
    for embeddings, handoffs in found.items():
        for metric in ("pack_ms", "http_ms", "unpack_ms", "total_ms"):
            values = [getattr(handoff, metric) for handoff in handoffs]
            made.append(_row(plan, f"handoff_{metric}", values, "ms", embeddings))
        shares = [handoff.total_ms / ms for handoff, ms in zip(handoffs, whole, strict=True)]
        made.append(_row(plan, "handoff_share", shares, "", embeddings))
        sizes = _row(plan, "handoff_bytes", [handoff.size_bytes for handoff in handoffs], "bytes", embeddings)
        made.append(replace(sizes, kind="size"))
    return made


def _http_ms(answer: Answer) -> float:
    if answer.queue_ms is None or answer.run_ms is None:
        raise RunnerError("the server does not say how long it drew (Server-Timing)")
    return 1000 * answer.seconds - answer.queue_ms - answer.run_ms


def _row(plan: Plan, metric: str, values: Sequence[float], unit: str, embeddings: bool | None = None) -> Row:
    """The median of the rounds, with the least and the largest."""
    conditions: dict[str, object] = {"steps": plan.steps, "split": ",".join(map(str, plan.split))}
    conditions |= {} if embeddings is None else {"embeddings": embeddings}
    label = {None: "", True: ", with embeddings", False: ", without embeddings"}[embeddings]
    return Row(
        SUITE,
        f"{plan.bundle.name}, split {conditions['split']}{label}",
        metric,
        statistics.median(values),
        unit,
        conditions=conditions,
        **spread(values),
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=named_bundle, help="on both sides (emoji, made)")
    parser.add_argument("--split", type=int, nargs=2, default=(10, 15), metavar=("CLOUD", "HERE"))
    parser.add_argument("--size", type=int, help="pixels (default: the model's)")
    parser.add_argument("--rounds", type=int, default=20)
    add_work(parser)
    words = parser.parse_args(argv)
    plan = Plan(words.bundle or bundle("emoji", words.work), tuple(words.split), words.rounds, words.size)
    with timing(SUITE), server(plan.bundle, 1, 8) as served:
        with HybridClient(plan.bundle, f"http://{served.place}") as client:
            made = rows(plan, *measure(client, plan))
    if words.out:
        settings = {"split": list(plan.split), "rounds": plan.rounds, "size": plan.size}
        command = "python -m diffship.benchmarks handoff-overhead"
        command += f" --bundle {words.bundle.name}" if words.bundle else ""
        write_result(words.out, SUITE, command, made, settings)
    for row in made:
        print(f"{row.subject:50} {row.metric:20} {row.value:.4g} {row.unit} ({row.low:.4g} to {row.high:.4g})")


if __name__ == "__main__":
    enter(main)
