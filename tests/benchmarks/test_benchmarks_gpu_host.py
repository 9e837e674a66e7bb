"""The one command of a GPU host, walked without a GPU; and what it says where a step fails."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from diffship.benchmarks import gpu_host
from diffship.benchmarks.gpu_host import Plan, main, prove
from diffship.benchmarks.measure.record import read_result
from diffship.core.errors import UnsupportedError

OUTPUT = {"name": "out_sample", "passed": True, "psnr_db": 48.5, "reason": ""}
PART = {"part": "unet", "status": "passed", "report": {"outputs": [OUTPUT]}, "reason": ""}
VERIFIED: dict[str, Any] = {"engine": "onnxruntime", "version": "1", "parts": [PART], "trajectory": None}
EXPORTED = {"parts": [{"name": "unet", "export_seconds": 2.5, "bytes": 10, "proof": "proved"}]}


class Verbs:
    """Answers of the verbs in the place of processes; `words` are what was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **answers: Any) -> None:
        self.words: list[tuple[str, ...]] = []
        self.answers = {"export": EXPORTED, "verify": VERIFIED, "bench": {}, **answers}
        monkeypatch.setattr(gpu_host, "_told", self.told)
        monkeypatch.setattr(gpu_host, "_flags", lambda target: ["--sm", "89"] if target == "tensorrt" else [])

    def told(self, words: Any, timeout: float) -> Any:
        self.words.append(tuple(words))
        return self.answers[words[0]]


def test_what_is_proved_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    verbs = Verbs(monkeypatch)
    rows = prove(Plan(("toy",), tmp_path))
    assert [words[0] for words in verbs.words] == ["export", "verify", "export", "verify", "bench"]
    assert "--sm" in verbs.words[2] and verbs.words[1][-1] == "cuda"
    bench = verbs.words[4]
    assert bench[bench.index("--engines") + 1] == "onnxruntime,tensorrt,onnxruntime:graphs=true,torch"
    (failed,) = [row for row in rows if row.status != "ok"]
    assert failed.metric == "bench" and failed.reason == "it does not say why"
    psnr = [row for row in rows if row.metric == "psnr_db"]
    assert [row.value for row in psnr] == [48.5, 48.5] and psnr[0].subject == "toy / onnxruntime / unet, out_sample"


def test_what_misses_its_tolerance_is_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bad = {**OUTPUT, "name": "step.2", "passed": False, "psnr_db": 12.0, "reason": "PSNR 12.0 dB is less than 35 dB"}
    drawn = {"status": "failed", "report": {"outputs": [bad]}, "reason": ""}
    verbs = Verbs(monkeypatch, verify={**VERIFIED, "trajectory": drawn})
    rows = prove(Plan(("toy",), tmp_path, ("onnx",)))
    (row,) = [row for row in rows if row.conditions.get("part") == "trajectory"]
    assert (row.subject, row.status, row.reason) == ("toy / onnxruntime / trajectory, step.2", "failed", bad["reason"])
    assert verbs.words[-1][3] == "torch", "the peers and torch are still measured"


def test_a_trajectory_that_is_skipped_is_no_miss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn = {"status": "skipped", "report": None, "reason": "the U-Net does not fit memory whole"}
    verbs = Verbs(monkeypatch, verify={**VERIFIED, "trajectory": drawn})
    rows = prove(Plan(("toy",), tmp_path, ("onnx",)))
    (row,) = [row for row in rows if row.conditions.get("part") == "trajectory"]
    assert (row.status, row.reason) == ("skipped", drawn["reason"])
    assert "onnxruntime" in verbs.words[-1][3], "its parts are proved"


@pytest.mark.parametrize(("parts", "told"), [((), True), (("unet",), True), (("vae_decoder",), False)])
def test_without_a_unet_no_trajectory_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, parts: tuple[str, ...], told: bool
) -> None:
    verbs = Verbs(monkeypatch)
    prove(Plan(("toy",), tmp_path, ("onnx",), parts))
    assert ("--trajectory" in verbs.words[0]) is told


def test_what_cannot_be_built_here_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    verbs = Verbs(monkeypatch, export={"error": {"message": "needs 18 GB of memory"}})

    def refuse(target: str) -> list[str]:
        raise UnsupportedError("no NVIDIA GPU can be used")

    rows = prove(Plan(("toy",), tmp_path, ("onnx",)))
    assert (rows[0].status, rows[0].reason) == ("failed", "needs 18 GB of memory")
    monkeypatch.setattr(gpu_host, "_flags", refuse)
    rows = prove(Plan(("toy",), tmp_path, ("tensorrt",)))
    assert (rows[0].status, rows[0].reason) == ("unsupported", "no NVIDIA GPU can be used")
    assert [words[0] for words in verbs.words] == ["export", "bench", "bench"]


def test_damage_and_outputs_without_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Verbs(monkeypatch, verify={"parts": [], "damage": "unet/model.onnx has another hash"})
    rows = prove(Plan(("toy",), tmp_path, ("onnx",)))
    assert ("verify", "failed", "unet/model.onnx has another hash") in [(r.metric, r.status, r.reason) for r in rows]
    equal = {**PART, "report": {"outputs": [{**OUTPUT, "psnr_db": None}]}}
    Verbs(monkeypatch, verify={**VERIFIED, "parts": [equal]})
    rows = prove(Plan(("toy",), tmp_path, ("onnx",)))
    assert ("psnr_db", "ok", "equal") in [(row.metric, row.status, row.reason) for row in rows]


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import time; time.sleep(30)", "out of time after 1 s"),
        ("import sys; sys.exit('no such thing')", "exit 1: no such thing"),
        ("print('[1]')", "no document"),
    ],
)
def test_a_process_that_tells_nothing(monkeypatch: pytest.MonkeyPatch, program: str, reason: str) -> None:
    import sys

    run = subprocess.run
    monkeypatch.setattr(
        gpu_host.subprocess, "run", lambda command, **options: run([sys.executable, "-c", program], **options)
    )
    assert gpu_host._reason(gpu_host._told(["verify"], 1)) == reason


@pytest.mark.slow
def test_the_way_is_walked_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "gpu.json"
    words = ["--sources", "arch:tiny-sd", "--device", "cpu", "--precision", "fp32", "--parts", "unet", "--against", ""]
    assert main([*words, "--rounds", "1", "--work", str(tmp_path / "w"), "--out", str(out)]) == 0
    capsys.readouterr()
    rows = read_result(out).rows
    by = {(row.conditions.get("target"), row.status) for row in rows if row.metric in ("export", "psnr_db")}
    assert by == {("onnx", "ok"), ("tensorrt", "unsupported")}, "there is no GPU to build for"
    steps = [row.value for row in rows if row.conditions.get("part") == "trajectory"]
    assert len(steps) >= 4 and min(value for value in steps if value is not None) > 60
    runners = {row.conditions.get("runner") for row in rows if row.metric == "call_seconds_p50"}
    assert runners == {"onnxruntime", "torch"}
    assert json.loads(out.read_text(encoding="utf-8"))["suite"] == "gpu-host"
