"""What the sentinels measure: cheap forms of published figures, a minute or two each, as intervals.

Every function takes a Kit and returns its readings by name. What is compared is measured in pairs, side by side, so
that a slow or a busy machine moves both.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np

from diffship.benchmarks.measure import clock, exports, intervals
from diffship.benchmarks.measure.case import Bench
from diffship.benchmarks.measure.figures import rows_of
from diffship.benchmarks.measure.intervals import Interval
from diffship.benchmarks.measure.peers.environments import peer_python
from diffship.benchmarks.measure.process import measure
from diffship.benchmarks.measure.session import Session, Settings
from diffship.benchmarks.studies.cost import cold_start
from diffship.benchmarks.studies.service import reliability, serving
from diffship.benchmarks.studies.service.load import Server, closed_loop, open_loop, server
from diffship.benchmarks.studies.workbench import JUDGE, bundle, edge_python, emoji_data
from diffship.core.child import command
from diffship.core.errors import PeerError, RunnerError
from diffship.core.registry import kind

Readings = dict[str, Interval]
SMALL = "arch:bk-tiny"  # Stable Diffusion's blocks, fewer of them, in a folder that stock diffusers and optimum load
ROUNDS = 3
PROMPTS = 50
_TIMEOUT = 900.0
_SLEEP = 0.05
_SPIKE = "held = bytearray(125 << 20); held[::4096] = b'1' * len(held[::4096]); del held; import time; time.sleep(0.2)"


@dataclass(frozen=True)
class Kit:
    """Where things lie. edge: an interpreter without torch (made). peers: the folder of other toolchains'
    environments; those that are not there are not made. data: pictures with captions (made)."""

    work: Path
    peers: Path
    edge: str | None = None
    data: Path | None = None

    @cached_property
    def emoji(self) -> Path:
        return bundle("emoji", self.work)

    def has(self, peer: str) -> bool:
        try:
            return bool(peer_python(peer, self.peers, install=False))
        except PeerError:
            return False


def instruments(kit: Kit) -> Readings:
    """The rulers themselves, against what is known: a sleep, 125 MiB, a server's delay, and how often verdicts err."""
    seconds = clock.timed(lambda: lambda: time.sleep(_SLEEP), 8)["seconds"]
    assert isinstance(seconds, list)
    with _delayed(_SLEEP) as served:
        due = time.perf_counter() - 1.0  # a second late, which its user has waited
        late = served.ask(1, 5.0, due=due).seconds - 1.0
        asked = [served.ask(1, 5.0).seconds for _ in range(8)]
    spike = measure([sys.executable, "-c", _SPIKE], 60.0)
    return {
        "clock": _once(float(np.median(seconds)) / _SLEEP),
        "client_clock": _once(min([late, *asked]) / _SLEEP),
        "peak": _once(spike.peak_bytes / (125 << 20)),
        "false_verdicts": _once(_false_verdicts()),
    }


def _false_verdicts(trials: int = 4000, rounds: int = 3) -> float:
    """The share of verdicts where there is no difference, with 5 % drift between the rounds: one in twenty is due."""
    draw = np.random.default_rng(0)
    logs = draw.normal(0, 0.05, (trials, rounds, 12)) + draw.normal(0, 0.05, (trials, rounds, 1))
    mean, half = intervals.t_interval(np.median(logs, axis=-1))
    ends = zip(np.exp(mean - half), np.exp(mean + half), strict=True)
    said = [intervals.ratio_verdict(float(low), float(high), rounds) for low, high in ends]
    return sum(word != intervals.NO_DIFFERENCE for word in said) / trials


def export(kit: Kit) -> Readings:
    """The whole export of Stable Diffusion 1.5's shape, proof included: the published figure itself."""
    target = kit.work / "exported"
    run = exports.ExportRun(
        exports.OURS,
        command("diffship", "export", "arch:sd15", "--to", "onnx", "--precision", "fp32", "-o", str(target)),
        target,
    )
    found = _exported(run, "arch:sd15")
    return {"seconds": _once(found["export_seconds"]), "peak_bytes": _once(found["export_peak_resident_bytes"])}


def export_peer(kit: Kit) -> Readings:
    """A quarter of that model, by diffship and by optimum: seconds and peak memory, ours / theirs."""
    cli = peer_python("optimum", kit.peers, install=False).parent / "optimum-cli"
    folder = kit.work / "source"
    exports.save_source(SMALL, folder)
    ours, _, theirs = exports.runs_of(folder, kit.work, "fp32", str(cli))
    a, b = (_exported(run, SMALL) for run in (ours, theirs))
    return {
        "seconds_ratio": _once(a["export_seconds"] / b["export_seconds"]),
        "peak_ratio": _once(a["export_peak_resident_bytes"] / b["export_peak_resident_bytes"]),
    }


def _exported(run: exports.ExportRun, model: str) -> dict[str, float]:
    rows = exports.export_rows(run, model, "fp32", _TIMEOUT)
    if any(row.value is None for row in rows):
        raise RunnerError(f"{run.subject} did not export {model}: {rows[0].reason}")
    return {row.metric: row.value for row in rows if row.value is not None}


def calls(kit: Kit) -> Readings:
    """A picture of `emoji` in four steps, our bundle in ONNX Runtime against diffusers and optimum, in turns."""
    against = ("diffusers", *(("optimum",) if kit.has("optimum") else ()))
    shape = {"parts": ("image",), "steps": (4,), "guidance": 4.0, "images": 8}
    return _ratios(kit, Bench(("emoji",), ("onnxruntime",), against, **shape))  # type: ignore[arg-type]


def large_calls(kit: Kit) -> Readings:
    """A U-Net call of SD's blocks, batch 2, 256 px, in our engines against diffusers, in turns."""
    from diffship.runtimes.engines.engine import engine_class

    found: Readings = {}
    for engine in ("onnxruntime", "openvino"):
        if engine_class(engine).probe().available:
            bench = Bench((SMALL,), (engine,), ("diffusers",), (kind("sd").denoiser,), size=256, calls=3)
            found[engine] = _ratios(kit, bench)["diffusers"]
    return found


def _ratios(kit: Kit, bench: Bench) -> Readings:
    """Ours / theirs by the name of the other."""
    settings = Settings(kit.work.resolve(), kit.peers.resolve(), ROUNDS, _TIMEOUT, install=False)
    rows = rows_of(Session(settings).measure([bench]), "sentinels")
    bad = [row for row in rows if row.value is None]
    if bad:
        raise RunnerError(f"{bad[0].subject}: {bad[0].status}: {bad[0].reason}")
    found = {
        str(row.conditions["against"]): Interval(
            row.value or 0, row.low, row.high, row.n or 0, row.conditions["interval"]
        )
        for row in rows
        if row.metric.endswith("_ratio")
    }
    if set(found) != set(bench.against):
        raise RunnerError(f"only {', '.join(found) or 'nothing'} was compared of {', '.join(bench.against)}")
    return found


def small_model(kit: Kit) -> Readings:
    """A U-Net call of the distilled model that comes with the package, over one of its teacher."""
    from diffship.benchmarks.studies.quality.siblings import unet_seconds

    bundles = {"small": bundle("emoji-small", kit.work), "teacher": kit.emoji}
    rounds = [unet_seconds(bundles, 15) for _ in range(ROUNDS)]
    ratio = intervals.ratio([found["small"] for found in rounds], [found["teacher"] for found in rounds])
    return {"call_ratio": ratio}


def cold(kit: Kit) -> Readings:
    """From the command to the first picture, in an environment without torch."""
    rows = cold_start.run(kit.edge or str(edge_python(kit.work)), kit.emoji, 4, 5)
    found = {row.metric: row for row in rows}
    seconds = found["cold_start_seconds_median"]
    how = f"median of {seconds.n} starts, with the least and the longest"
    return {
        "seconds": Interval(seconds.value or 0, seconds.low, seconds.high, seconds.n or 0, how),
        "installed_bytes": _once(found["installed_bytes"].value or 0),
    }


def load(kit: Kit) -> Readings:
    """The server: what batching gains, then latency at 70 % and goodput at five times what it can do.

    The gain is measured on whole pictures, as published; latencies on short ones, of which a minute has enough for
    percentiles. Latencies are multiplied by the capacity: pictures that the server could have made meanwhile.
    """
    plan = serving.Plan(kit.emoji, 25, 8.0, ROUNDS, 8, 0.0)
    rows, _ = serving.batching(plan, ("one", "many"))
    gain = next(row for row in rows if row.metric == "throughput_ratio")
    short = replace(plan, steps=4, seconds=30.0)
    with server(kit.emoji, serving.BATCH, serving.QUEUE) as served:
        served.ask(4, 60.0)
        answers, seconds = closed_loop(served, 8, 4, 6.0)
        capacity = len(answers) / seconds
        before = served.resident_bytes()
        steady, _ = open_loop(served, serving.STEADY * capacity, 4, short.seconds, 60.0)
        grown = served.resident_bytes() - before
    rounds = [serving.overload(replace(short, seconds=6.0, rounds=1), capacity) for _ in range(ROUNDS)]
    goodput = [[row.value or 0 for row in rows if row.metric == "goodput_over_capacity"] for rows in rounds]
    waits = [answer.seconds * capacity for answer in steady if answer.status == 200]
    late = intervals.supports(len(waits), 0.99)  # of too few requests there is no 99th percentile
    return {
        "batching_gain": Interval(gain.value or 0, gain.low, gain.high, gain.n or 0, gain.conditions["interval"]),
        "p50_pictures": _in_parts(waits),
        **({"p99_pictures": _once(float(np.quantile(waits, 0.99)))} if late else {}),
        "refused_share": _once(sum(answer.status != 200 for answer in steady) / max(len(steady), 1)),
        "grown_mb": _once(grown / 1e6),
        "goodput": intervals.ratio(goodput, [[1.0]] * ROUNDS),
    }


def _in_parts(waits: Sequence[float], parts: int = 6) -> Interval:
    """The median with its interval over consecutive parts: what waits together is one sample, not many."""
    medians = [[float(np.median(part))] for part in np.array_split(np.asarray(waits), parts)]
    return intervals.ratio(medians, [[1.0]] * parts)


def counts(kit: Kit) -> Readings:
    """What must be refused and survived, all of it: the shares, and how many were tried."""
    subjects = {
        "requests that are not legal": "requests",
        "files with a changed byte": "files",
        "faults of the cloud": "faults",
    }
    rows = {(subjects[row.subject], row.metric): row.value or 0 for row in reliability.run(kit.emoji, print)}
    found: Readings = {}
    for name in subjects.values():
        tried = rows[name, "tried"]
        good = rows[name, "survived" if name == "faults" else "refused"]
        found |= {f"{name}_share": _once(good / tried), f"{name}_tried": _once(tried)}
    return found


def judge(kit: Kit) -> Readings:
    """Fifty captions, drawn by `emoji` and by `emoji-small`: how often the judge finds the right one among five."""
    from diffship.benchmarks.studies.quality.emoji_quality import draw
    from diffship.benchmarks.studies.quality.judging import Judging
    from diffship.runtimes.engines.model import open_model

    data = kit.data or emoji_data(kit.work)
    found = {}
    for name, folder in (("teacher", kit.emoji), ("small", bundle("emoji-small", kit.work))):
        with open_model(str(folder)) as model:
            judging = Judging.read(data, JUDGE, model.tokenizers["tokenizer"], PROMPTS)
            pictures = draw(model, judging.asked.texts, 1, 25, 4.0)
        judged = judging.look(pictures, {})
        found[name] = intervals.quality([judged.by_prompt["top5"]], judged.prompts, trained=False)
    return found


SENTINELS: dict[str, Callable[[Kit], Readings]] = {
    "instruments": instruments,
    "calls": calls,
    "large-calls": large_calls,
    "small-model": small_model,
    "cold-start": cold,
    "load": load,
    "counts": counts,
    "judge": judge,
    "export": export,
    "export-peer": export_peer,
}


def _once(value: float) -> Interval:
    return Interval(value, None, None, 1, "measured once")


class _Slow(BaseHTTPRequestHandler):
    """Answers after a known time."""

    seconds = 0.0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(type(self).seconds)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@contextmanager
def _delayed(seconds: float) -> Iterator[Server]:
    handler = type("Delayed", (_Slow,), {"seconds": seconds})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        thread = Thread(target=listening.serve_forever, daemon=True)
        thread.start()
        try:
            yield Server(f"127.0.0.1:{listening.server_port}", 0)
        finally:
            listening.shutdown()  # no timeout: it looks for this twice a second
            thread.join(10)
