"""What goes wrong, on purpose: requests and files that must be refused, and faults of a cloud that must be survived.

    python -m diffship.benchmarks reliability [--bundle out/emoji]

The server is a process of its own; bad requests come over a socket. A refusal counts if the answer is a client's
error (4xx) and the server still answers a good request afterwards; a fault counts as survived if the picture is the one
that is drawn alone, within the deadline.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np

from diffship.benchmarks.entry import enter, named_bundle
from diffship.benchmarks.measure.record import write_result
from diffship.benchmarks.measure.row import Row
from diffship.benchmarks.studies.service.fault_proxy import fault_proxy
from diffship.benchmarks.studies.service.load import server
from diffship.benchmarks.studies.workbench import add_work, bundle
from diffship.core.bundle import Bundle
from diffship.core.errors import BundleError
from diffship.runtimes.engines.model import open_model
from diffship.runtimes.handoff.client import HybridClient
from diffship.runtimes.serve.forms import GenerateForm, HandoffForm, ImagesForm
from diffship.sampling.generate import Request, generate

SUITE = "reliability"
FAULTS = ("down", "refuse", "503", "hang", "reset", "garbage", "slow")
DEADLINE = 8.0
FLIPS = 60
CUTS = 20
JSON, BYTES = "application/json", "application/octet-stream"
_FORMS: Mapping[str, tuple[type[Any], dict[str, Any]]] = {
    "/v1/generate": (GenerateForm, {"prompt": "cat", "steps": 1}),
    "/v1/handoff": (HandoffForm, {"prompt": "cat", "steps": 2, "split": 1}),
    "/v1/images/generations": (ImagesForm, {"prompt": "cat"}),
}


@dataclass(frozen=True)
class Bad:
    """A request that must be refused."""

    what: str
    path: str
    body: bytes
    kind: str = JSON
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    method: str = "POST"


def bad_requests(trajectory: bytes) -> Iterator[Bad]:
    """Fields past both ends and of every wrong type, damaged bodies, foreign callers, damaged trajectories."""
    for path, (form, good) in _FORMS.items():
        for name, value in bad_values(form):
            yield Bad(f"{name}={value!r:.30}", path, json.dumps({**good, name: value}).encode())
        for what, body in _DAMAGED.items():
            yield Bad(what, path, body)
        good_body = json.dumps(good).encode()
        yield Bad("an unknown key", path, json.dumps({**good, "stesp": 4}).encode())
        yield Bad("another content type", path, good_body, "text/plain")
        yield Bad("another method", path, good_body, method="PUT")
        yield Bad("a foreign host", path, good_body, headers={"Host": "example.org"})
        yield Bad("a foreign page", path, good_body, headers={"Origin": "https://example.org"})
    yield Bad("an unknown path", "/v1/generat", b"{}")
    for what, body in bad_trajectories(trajectory):
        yield Bad(what, "/v1/resume", body, BYTES)
    for query in ("until=-1", "until=152", "until=x", "dtype=float64", "response=gif", "until=1&until=2", "model=none"):
        yield Bad(query, f"/v1/resume?{query}", trajectory, BYTES)


_DAMAGED = {
    "no body": b"",
    "no JSON": b"{",
    "no UTF-8": b'{"prompt": "\xff"}',
    "no object": b'["cat"]',
    "NaN": b'{"prompt": "cat", "seed": NaN}',
    "a number without end": b'{"prompt": "cat", "seed": ' + b"1" * 5000 + b"}",
    "a key twice": b'{"prompt": "cat", "prompt": "dog"}',
    "deep nesting": b"[" * 100_000,
}


def bad_values(form: type[Any]) -> Iterator[tuple[str, Any]]:
    for entry in dataclasses.fields(form):
        about: Mapping[str, Any] = entry.metadata
        values: list[Any] = []
        if "low" in about and entry.name not in ("width", "height"):  # those two come together
            step = 1 if isinstance(about["low"], int) else 1e-6
            values = [about["low"] - step, about["high"] + step, 10**400, True, "3", [], {}]
        elif "choices" in about:
            values = ["", "no such thing", 1, True, []]
        elif "chars" in about:
            values = ["x" * (about["chars"][1] + 1), 1, True, [], "\ud800"]
        elif entry.name == "width":
            values = [64, 63, 1_000_000, "64"]  # 64 alone: the height is missing
        for value in values:
            yield entry.name, value


def bad_trajectories(whole: bytes) -> Iterator[tuple[str, bytes]]:
    draw = np.random.default_rng(0)
    for place in sorted({0, 1, 7, 8, len(whole) - 1, *draw.integers(0, len(whole), CUTS).tolist()}):
        yield f"cut at {place}", whole[:place]
    for place in draw.integers(0, len(whole), FLIPS).tolist():
        spoilt = bytearray(whole)
        spoilt[place] ^= 1 << int(draw.integers(8))
        yield f"a bit flipped at {place}", bytes(spoilt)
    yield "a header of 2**62 bytes", (1 << 62).to_bytes(8, "little") + whole[8:]
    yield "something behind it", whole + b"\0"


def refusals(bundle: Path) -> tuple[int, list[str]]:
    """(how many were tried, those that were not refused)."""
    wrong, count = [], 0
    with server(bundle, 4, 8) as served:
        made = _send(served.place, Bad("good", "/v1/handoff", b'{"prompt": "cat", "steps": 4, "split": 2}'))
        for bad in bad_requests(made[1]):
            count += 1
            status, _ = _send(served.place, bad)
            if not 400 <= status < 500:
                wrong.append(f"{bad.path}, {bad.what}: {status}")
        served.ask(2, 60)
        status, _ = _send(served.place, Bad("resume", "/v1/resume", made[1], BYTES))
        if status != 200:
            wrong.append(f"afterwards a good trajectory is {status}")
    return count, wrong


def _send(place: str, bad: Bad) -> tuple[int, bytes]:
    """Status and body; 0 if the server closes without an answer."""
    with closing(HTTPConnection(place, timeout=60)) as connection:
        try:
            connection.request(bad.method, bad.path, bad.body, {"Content-Type": bad.kind, **bad.headers})
            answer = connection.getresponse()
            return answer.status, answer.read()
        except OSError:
            return 0, b""


def damaged_files(bundle: Path) -> tuple[int, list[str]]:
    """One byte of every file changed, one file after the other: verify must name each."""
    wrong, names = [], sorted(Bundle.open(bundle).manifest.files)
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="diffship-damage-") as folder:
        copy = Path(folder) / "bundle"
        shutil.copytree(bundle, copy)
        for name in names:
            file = copy / name
            whole = file.read_bytes()
            spoilt = bytearray(whole)
            spoilt[int(draw.integers(len(whole)))] ^= 1 << int(draw.integers(8))
            file.write_bytes(spoilt)
            if not _refused(copy, name):
                wrong.append(name)
            file.write_bytes(whole)
        Bundle.open(copy).verify()
    return len(names), wrong


def _refused(folder: Path, name: str) -> bool:
    try:
        Bundle.open(folder).verify()
    except BundleError as fault:
        return name in str(fault)
    return False


def survived(bundle: Path, faults: Sequence[str] = FAULTS) -> dict[str, tuple[bool, str, float]]:
    """By fault: whether the picture was finished as it must be, why the cloud was left, and seconds."""
    request = Request("a red apple", seed=1, steps=25)
    found = {}
    with server(bundle, 4, 8) as served, open_model(bundle) as model:
        right = generate(model, request)[0].pixels
        for fault in faults:
            with _cloud(f"http://{served.place}", fault) as url, HybridClient(bundle, url, deadline=DEADLINE) as client:
                made = client.generate(request, (10, 15))
            seconds, reason = made.report.total_ms / 1000, made.report.fallback or ""
            fine = seconds <= DEADLINE and np.array_equal(made.picture.pixels, right)
            found[fault] = (fine, reason or "its answer came in time", seconds)
    return found


def _cloud(url: str, fault: str) -> AbstractContextManager[str]:
    """The address of a cloud with that fault."""

    @contextmanager
    def spoilt() -> Iterator[str]:
        with fault_proxy(url, fault) as proxy:
            yield proxy.url

    @contextmanager
    def down() -> Iterator[str]:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]
        yield f"http://127.0.0.1:{port}"

    return down() if fault == "down" else spoilt()


def run(bundle: Path, say: Callable[[str], object] = lambda text: None) -> list[Row]:
    rows = []
    for subject, look in (("requests that are not legal", refusals), ("files with a changed byte", damaged_files)):
        count, wrong = look(bundle)
        for line in wrong:
            say(f"not refused: {line}")
        rows += _counts(subject, "refused", count - len(wrong), count, "; ".join(wrong)[:300])
    faults = survived(bundle)
    for fault, (fine, reason, seconds) in faults.items():
        say(f"{fault}: {'survived' if fine else 'NOT SURVIVED'} in {seconds:.2f} s: {reason}")
    lost = ", ".join(fault for fault, (fine, _, _) in faults.items() if not fine)
    rows += _counts("faults of the cloud", "survived", sum(fine for fine, _, _ in faults.values()), len(faults), lost)
    slowest = max(seconds for _, _, seconds in faults.values())
    where = {"deadline_seconds": DEADLINE}
    return [*rows, Row(SUITE, "faults of the cloud", "slowest_seconds", slowest, "s", kind="load", conditions=where)]


def _counts(subject: str, metric: str, good: int, tried: int, reason: str) -> list[Row]:
    status = "ok" if good == tried else "failed"
    return [
        Row(SUITE, subject, metric, float(good), "count", status, kind="load", n=tried, reason=reason),
        Row(SUITE, subject, "tried", float(tried), "count", kind="load"),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=named_bundle, help="what is served (emoji, made)")
    add_work(parser)
    words = parser.parse_args(argv)
    rows = run(words.bundle or bundle("emoji", words.work), lambda text: print(text, file=sys.stderr, flush=True))
    if words.out:
        command = "python -m diffship.benchmarks reliability"
        command += f" --bundle {words.bundle.name}" if words.bundle else ""
        write_result(words.out, SUITE, command, rows, {"title": "What goes wrong, on purpose", "faults": list(FAULTS)})
    for row in rows:
        print(f"{row.subject:32} {row.metric:16} {row.value:g} {row.unit} {row.reason}")
    return 1 if any(row.status == "failed" for row in rows) else 0


if __name__ == "__main__":
    enter(main)
