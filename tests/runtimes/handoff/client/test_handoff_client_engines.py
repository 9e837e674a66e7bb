"""With real bundles: no torch on the device, two engines, processes that are killed, the command line."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from sampling_toy import ToyModel

from diffship.cli.main import main
from diffship.core.strict import plain
from diffship.runtimes.engines.model import open_model
from diffship.runtimes.handoff.choose import QualityCurve, QualityPoint, read_profile
from diffship.runtimes.handoff.client import HybridClient
from diffship.runtimes.handoff.profile import measure_profile
from diffship.runtimes.serve.app import application
from diffship.runtimes.serve.connections import bind
from diffship.runtimes.serve.opened import open_served
from diffship.runtimes.serve.options import ServeOptions
from diffship.runtimes.serve.server import HttpServer
from diffship.runtimes.serve.service import Service
from diffship.sampling.generate import Request, generate

jsonschema = pytest.importorskip("jsonschema")
ROOT = Path(__file__).parents[4]
SCHEMA = json.loads((ROOT / "docs" / "schema" / "run.json").read_text(encoding="utf-8"))
REQUEST = Request("a red apple", seed=1, sampler="dpmpp-2m", size=(64, 64))
TOKEN = "a-token-of-twenty-ch"


@pytest.fixture(scope="module")
def served(tiny_bundle: Path) -> Iterator[str]:
    """The tiny bundle in ONNX Runtime behind a port of this machine, with a token."""
    options = ServeOptions()
    with open_served({"large": str(tiny_bundle)}, "onnxruntime", {"threads": 1}) as models:
        service, ready = Service(models, options), threading.Event()
        service.start(ready.set)
        assert ready.wait(60)
        with bind("127.0.0.1", 0) as listener, HttpServer(listener, application(service, TOKEN), options) as server:
            yield server.url
        service.close()


@pytest.mark.slow
def test_the_same_bundle_on_both_sides_changes_no_bit(served: str, tiny_bundle: Path) -> None:
    with HybridClient(tiny_bundle, served, TOKEN, engine="onnxruntime", threads=1) as client:
        with open_model(tiny_bundle, "onnxruntime", threads=1) as model:
            for sampler in ("dpmpp-2m", "pndm", "euler-a"):
                request = Request("a red apple", seed=1, sampler=sampler, size=(64, 64))
                whole = generate(model, Request(**{**vars(request), "steps": 4}))[0]
                made = client.generate(request, (2, 2))
                assert made.report.fallback is None and made.report.cloud_calls == 2
                assert np.array_equal(made.picture.pixels, whole.pixels)


@pytest.mark.slow
def test_two_engines_agree_within_a_thousandth(served: str, tiny_bundle: Path) -> None:
    pytest.importorskip("openvino")
    steps: dict[str, list[np.ndarray]] = {"alone": [], "shared": []}
    with open_model(tiny_bundle, "onnxruntime", threads=1) as model:
        whole = Request(**{**vars(REQUEST), "steps": 4})
        generate(model, whole, on_step=lambda batch: steps["alone"].append(np.asarray(batch[0].latents)))
    with HybridClient(tiny_bundle, served, TOKEN, engine="openvino", threads=1) as client:
        made = client.generate(REQUEST, (2, 2), on_step=lambda b: steps["shared"].append(np.asarray(b[0].latents)))
    assert made.report.fallback is None and (len(steps["alone"]), len(steps["shared"])) == (4, 3)
    for ours, theirs in zip(steps["shared"], steps["alone"][1:], strict=True):
        assert np.abs(ours - theirs).max() <= 1e-3


EDGE = """
import sys

class Blocked:
    names = {"torch", "diffusers", "transformers", "onnx", "accelerate", "openvino", "fastapi", "uvicorn"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
import hashlib
from diffship import HybridClient, Request
with HybridClient(sys.argv[1], cloud=sys.argv[2], token=sys.argv[3], threads=1) as client:
    made = client.generate(Request("a red apple", seed=1, sampler="dpmpp-2m", size=(64, 64)), (2, 2))
assert not Blocked.names & set(sys.modules), Blocked.names & set(sys.modules)
print(made.report.fallback, made.report.cloud_calls, hashlib.sha256(made.picture.pixels.tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_a_device_without_torch_or_server_packages(served: str, tiny_bundle: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", EDGE, str(tiny_bundle), served, TOKEN]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    with open_model(tiny_bundle, "onnxruntime", threads=1) as model:
        pixels = generate(model, Request(**{**vars(REQUEST), "steps": 4}))[0].pixels
    assert done.stdout.split() == ["None", "2", hashlib.sha256(pixels.tobytes()).hexdigest()]


SMALL = ("red apple", "--sampler", "ddim", "--size", "64", "--option", "threads=1")


def valid(document: dict[str, Any]) -> dict[str, Any]:
    jsonschema.validate({k: v for k, v in document.items() if k not in ("exit_code", "stderr")}, SCHEMA)
    return document


@pytest.mark.slow
def test_the_command_line_tells_who_did_what(
    command: Any, served: str, tiny_bundle: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "token").write_text(TOKEN + "\n", encoding="ascii")
    words = ["run", tiny_bundle, *SMALL, "--no-metadata"]
    cloud = ["--cloud", served, "--token-file", tmp_path / "token", "--split", "2,1", "--images", 2]
    document = valid(command(*words, *cloud, "-o", tmp_path / "shared"))
    assert document["exit_code"] == 0, document
    first, last = document["models"]
    assert (first["name"], first["source"], first["engine"]) == ("large", served, "onnxruntime")
    assert (first["steps"], first["calls"], last["steps"], last["calls"]) == (2, 4, 1, 2)
    assert [entry["cloud_calls"] for entry in document["handoffs"]] == [2, 2] and "choice" not in document
    assert command(*words, "--steps", 3, "--images", 2, "-o", tmp_path / "alone")["exit_code"] == 0
    drawn = [sorted((tmp_path / folder).iterdir()) for folder in ("alone", "shared")]
    assert [len(files) for files in drawn] == [2, 2]
    for alone, shared in zip(*drawn, strict=True):
        assert alone.read_bytes() == shared.read_bytes()
    assert main([*map(str, [*words, *cloud[:6]]), "-o", str(tmp_path / "a.png"), "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(tmp_path / "a.png") and lines[-1].startswith("handoff: cloud large: 2 calls in ")


@pytest.mark.slow
def test_a_cloud_that_is_down_is_a_picture_and_a_reason(command: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    words = ["run", tiny_bundle, *SMALL]
    document = valid(command(*words, "--cloud", "http://127.0.0.1:9", "--split", "2,1", "-o", tmp_path / "a.png"))
    assert document["exit_code"] == 0 and (tmp_path / "a.png").is_file()
    (report,) = document["handoffs"]
    assert report["fallback"].startswith("down: ") and (report["cloud_calls"], report["edge_calls"]) == (0, 3)
    auto = ["--split", "auto", "--budget", "cloud-ms=100", "--steps", 2]
    document = valid(command(*words, "--cloud", "http://127.0.0.1:9", *auto, "-o", tmp_path / "b.png"))
    assert document["exit_code"] == 0 and [w for w in document["warnings"] if "could not be measured" in w]
    assert document["handoffs"][0]["edge_calls"] == 2


@pytest.mark.slow
def test_split_auto_measures_chooses_and_keeps(
    command: Any, served: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("DIFFSHIP_TOKEN", TOKEN)
    words = ["run", tiny_bundle, *SMALL, "--steps", 4]
    auto = ["--cloud", served, "--split", "auto", "--profile", tmp_path / "profile.json", "-o", tmp_path / "a.png"]
    auto.append("--overwrite")
    document = valid(command(*words, *auto, "--budget", "cloud-ms=100000"))
    assert document["exit_code"] == 0, document
    assert document["choice"]["split"] == [4, 0] and document["handoffs"][0]["cloud_calls"] == 4
    assert "predicted: split 4,0" in document["stderr"]
    profile = read_profile(tmp_path / "profile.json")
    assert profile.edge == profile.cloud and profile.size == (64, 64) and profile.edge_call_ms > 0
    assert document["choice"]["cloud_ms"] == pytest.approx(profile.cloud_ms(4), abs=1e-3)
    points = tuple(QualityPoint(k, 0.5 + 0.1 * k) for k in (0, 2, 4))
    curve = QualityCurve(profile.cloud, profile.edge, 4, "top1", "higher", points)
    (tmp_path / "curve.json").write_text(json.dumps(plain(curve)), encoding="utf-8")
    quality = ["--quality-curve", tmp_path / "curve.json", "--budget"]
    document = valid(command(*words, *auto, *quality, "quality=0.68"))
    assert document["choice"]["split"] == [2, 2] and document["choice"]["quality"] == 0.7
    document = valid(command(*words, *auto, *quality, "quality=2"))
    assert document["exit_code"] == 2 and "the best is split 4,0" in document["error"]["message"]
    (tmp_path / "profile.json").write_text(json.dumps({**plain(profile), "edge": "f" * 64}), encoding="utf-8")
    document = valid(command(*words, *auto, "--budget", "latency=60"))
    assert document["exit_code"] == 2 and "is of another edge" in document["error"]["message"]


@pytest.mark.slow
def test_a_profile_is_of_what_was_measured() -> None:
    """A toy whose calls take 20 ms there and 5 ms here."""
    from serve_toy import HeldModel, toy_server

    with toy_server(HeldModel(delay=0.02)) as (url, _), HybridClient(HeldModel(delay=0.005), url) as client:
        profile = measure_profile(client, Request("x"), 6)
    assert 10 <= profile.cloud_call_ms < 100 and 5 <= profile.edge_call_ms < 20 + profile.cloud_call_ms
    assert profile.round_trip_ms < 200 and profile.handoff_bytes > 4 * 4 * 8 * 8 and profile.guided
    assert profile.cloud == profile.edge == ToyModel().digest


REFUSED = {
    "no split": (["D", "x"], "--cloud needs --split"),
    "auto without a budget": (["D", "x", "--split", "auto"], "there is no budget"),
    "an unknown budget": (["D", "x", "--split", "auto", "--budget", "cloudms=1"], "did you mean 'cloud-ms'"),
    "a budget twice": (
        ["D", "x", "--split", "auto", "--budget", "quality=1", "--budget", "quality=2"],
        "given twice",
    ),
    "a budget in words": (["D", "x", "--split", "auto", "--budget", "latency=fast"], "is no number"),
    "a negative budget": (["D", "x", "--split", "auto", "--budget", "latency=-1"], "legal is"),
    "a budget without auto": (["D", "x", "--split", "1,2", "--budget", "latency=1"], "go with --split auto"),
    "three shares": (["D", "x", "--split", "1,2,3"], "3 entries for 2 models"),
    "other steps": (["D", "x", "--split", "1,2", "--steps", "4"], "makes 3 steps, asked are 4"),
    "a large model too": (["D", "x", "--split", "1,2", "--large", "L"], "--cloud goes without --large"),
    "resume": (["D", "--split", "1,2", "--resume", "F"], "--resume finishes on this device alone"),
    "no bundle": (["--split", "1,2"], "DIR is missing"),
    "no such bundle": (["./nowhere", "x", "--split", "1,2"], "'./nowhere' does not exist"),
    "a deadline of nothing": (["TINY", "x", "--split", "1,2", "--deadline", "0"], "legal is a number from 0.1"),
    "a token file that is none": (["D", "x", "--split", "1,2", "--token-file", "./none"], "cannot be read"),
    "images of one philox seed": (
        ["D", "x", "--split", "1,2", "--rng", "philox", "--images", "2"],
        "draws one image a prompt",
    ),
    "two trajectories": (
        ["D", "x", "--split", "1,2", "--save-trajectory", "F", "--images", "2"],
        "keeps one picture",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_asked(
    name: str, command: Any, tiny_bundle: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    words, message = REFUSED[name]
    given = [str(tiny_bundle) if word == "TINY" else word for word in words]
    document = valid(command("run", *given, "--cloud", "http://127.0.0.1:9"))
    assert document["exit_code"] == 2, document
    assert message in document["error"]["message"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--split", "auto"], "--split auto is for --cloud"),
        (["--deadline", "5"], "--deadline means nothing without --cloud"),
        (["--budget", "latency=1"], "--budget means nothing without --cloud"),
    ],
    ids=["auto", "deadline", "budget"],
)
def test_cloud_flags_without_a_cloud(words: list[str], message: str, command: Any) -> None:
    document = valid(command("run", "D", "x", *words))
    assert document["exit_code"] == 2 and message in document["error"]["message"]


def test_a_bad_url_is_usage(command: Any, tiny_bundle: Path) -> None:
    document = valid(command("run", tiny_bundle, "x", "--cloud", "localhost:1", "--split", "1,2"))
    assert document["exit_code"] == 2 and "is not such as https://host" in document["error"]["message"]
    document = valid(command("run", tiny_bundle, "x", "--cloud", "http://127.0.0.1:99999", "--split", "1,2"))
    assert document["exit_code"] == 2 and "port 99999; legal is 1 to 65535" in document["error"]["message"]


@contextmanager
def process(*words: str, path: tuple[Path, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *path)))}
    pipe = subprocess.PIPE
    running = subprocess.Popen([sys.executable, *words], stdout=pipe, stderr=pipe, text=True, env=environment)
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


@pytest.mark.slow
def test_an_edge_that_is_killed_goes_on_from_its_saved_trajectory(
    command: Any, served: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("DIFFSHIP_TOKEN", TOKEN)
    kept, steps = tmp_path / "kept", 140
    words = ["run", str(tiny_bundle), "red apple", "--size", "64", "--sampler", "dpmpp-2m", "--no-metadata"]
    words += ["--option", "threads=1"]
    cloud = ["--cloud", served, "--split", f"2,{steps - 2}", "--save-trajectory", str(kept)]
    with process("-m", "diffship", *words, *cloud, "-o", str(tmp_path / "killed.png")) as running:
        end = time.monotonic() + 60
        while not kept.exists():
            assert running.poll() is None and time.monotonic() < end
            time.sleep(0.005)
        running.send_signal(signal.SIGKILL)
        assert running.wait(10) == -signal.SIGKILL
    assert not (tmp_path / "killed.png").exists()
    rest = ["run", tiny_bundle, "--resume", kept, "--no-metadata", "--option", "threads=1"]
    document = valid(command(*rest, "-o", tmp_path / "rest.png"))
    assert document["exit_code"] == 0 and 0 < document["models"][0]["calls"] <= steps - 2
    assert command(*words, "--steps", steps, "-o", tmp_path / "whole.png")["exit_code"] == 0
    assert (tmp_path / "rest.png").read_bytes() == (tmp_path / "whole.png").read_bytes()


@pytest.mark.slow
def test_a_cloud_that_is_killed_in_the_middle_leaves_a_client_that_finishes_alone() -> None:
    """The server's calls take 0.2 s; it is killed a second into ten of them."""
    rooms = (ROOT / "tests" / "runtimes" / "serve", ROOT / "tests" / "sampling")
    with process(str(rooms[0] / "serve_child.py"), "0.2", "20", "1", path=rooms) as running:
        assert running.stderr is not None
        url = ""
        while not url:
            line = running.stderr.readline()
            assert line, "it ended before it was ready"
            found = re.match(r"ready on (\S+)", line)
            url = found[1] if found else ""
        with HybridClient(ToyModel(), url, deadline=30) as client:
            client.facts()
            killer = threading.Timer(1.0, running.kill)
            killer.start()
            made = client.generate(Request("cat", seed=3), (10, 10))
            killer.join()
    assert made.report.fallback is not None and made.report.fallback.startswith("down: ")  # what its retries met
    assert (made.report.requests, made.report.retries) == (3, 2) and 900 < made.report.cloud_ms < 5000
    assert np.array_equal(made.picture.pixels, generate(ToyModel(), Request("cat", seed=3, steps=20))[0].pixels)
