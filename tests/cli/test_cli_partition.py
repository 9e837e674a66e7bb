"""run in parts: one process, threads and torchrun draw the same; what does not fit is refused before it begins."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffship.cli.main import parse
from diffship.cli.partition import asked, device_options

Command = Callable[..., dict[str, Any]]
WORDS = ("a cat", "--steps", "6", "--size", "64")


def pixels(file: Path) -> Any:
    return np.asarray(Image.open(file))


def torchrun(words: list[object], *flags: str) -> subprocess.Popen[str]:
    head = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--monitor-interval", "0.2"]
    command = [*head, *flags, "-m", "diffship", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_one_process_threads_and_torchrun_draw_the_same(command: Command, staged_bundle: Path, tmp_path: Path) -> None:
    told: dict[str, str] = {}

    def draw(name: str, *flags: object) -> Any:
        found = command("run", staged_bundle, *WORDS, *flags, "-o", tmp_path / f"{name}.png")
        assert found["exit_code"] == 0, found["stderr"]
        told[name] = found["stderr"]
        return pixels(tmp_path / f"{name}.png")

    plain, alone = draw("plain"), draw("alone", "--warm-up", 3)
    assert np.array_equal(draw("exact", "--warm-up", 7), plain) and not np.array_equal(alone, plain)
    # PNDM makes seven calls of six steps, and a warm-up counts calls
    assert not np.array_equal(draw("steps", "--warm-up", 6), plain)
    assert (
        told["steps"].count("pndm makes 7 model calls of 6 steps") == 1 and "--warm-up 6 leaves 1 to" in told["steps"]
    )
    assert not any("model calls of" in told[name] for name in ("plain", "alone", "exact"))
    assert np.array_equal(draw("threads", "--warm-up", 3, "--devices", "cpu,cpu"), alone)
    halves = draw("halves", "--cfg-parallel", "--warm-up", 9, "--devices", "cpu,cpu,cpu,cpu")
    assert np.abs(halves.astype(int) - plain).max() <= 1
    out = tmp_path / "two.png"
    with torchrun(["run", staged_bundle, *WORDS, "--stride", 1, "--warm-up", 3, "-o", out]) as run:
        printed, errors = run.communicate(timeout=120)
    assert run.returncode == 0 and printed.split() == [str(out)], errors
    assert np.array_equal(pixels(out), alone)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rank_of(pid: int) -> str:
    entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((entry.partition(b"=")[2].decode() for entry in entries if entry.startswith(b"RANK=")), "")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are found in /proc")
def test_a_killed_rank_is_started_anew_and_the_picture_goes_on(staged_bundle: Path, tmp_path: Path) -> None:
    kept, out = tmp_path / "kept", tmp_path / "picture.png"
    words = ["run", staged_bundle, "a cat", "--steps", 80, "--size", 64, "--warm-up", 2, "--save-trajectory", kept]
    with torchrun([*words, "-o", out, "--wait", 20], "--max-restarts", "1") as run:
        deadline = time.monotonic() + 90
        while not kept.exists() and time.monotonic() < deadline and run.poll() is None:
            time.sleep(0.02)
        ranks = {rank_of(pid): pid for pid in children(run.pid)}
        os.kill(ranks["1"], signal.SIGKILL)
        _, errors = run.communicate(timeout=120)
    assert run.returncode == 0 and out.is_file(), errors
    assert f"start number 2 goes on from {kept}" in errors


@pytest.mark.slow
def test_what_does_not_fit_is_refused(
    command: Command, staged_bundle: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bundle, flags, why in (
        (tiny_bundle, ("--warm-up", 2), "holds its unet as one part"),
        (tiny_bundle, ("--cfg-parallel", "--devices", "cpu"), "take 2 devices, and --devices names 1"),
        (staged_bundle, ("--stride", 2, "--devices", "cpu,cpu"), "take 3 devices, and --devices names 2"),
        (staged_bundle, ("--stride", 3), "stride"),
        (staged_bundle, ("--stride", 0, "--devices", "cpu,cpu"), "stride is 0"),
    ):
        found = command("run", bundle, *WORDS, *flags)
        assert found["exit_code"] == 2 and why in found["stderr"]
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    found = command("run", staged_bundle, *WORDS)
    assert found["exit_code"] == 2 and "3 processes run together, and these stages take 2" in found["stderr"]


def test_a_device_with_a_number_is_two_options_of_an_engine_that_counts_its_devices() -> None:
    bundle = SimpleNamespace(manifest=SimpleNamespace(target="onnx"))
    for engine, name, expected in (
        ("onnxruntime", "cuda:1", {"device": "cuda", "device_id": 1}),
        ("onnxruntime", "cpu", {"device": "cpu"}),
        ("openvino", "gpu:1", {"device": "gpu:1"}),
    ):
        options = SimpleNamespace(engine=engine, device=None, option=[("threads", 2)])
        assert device_options(bundle, options, name) == {"threads": 2, **expected}  # type: ignore[arg-type]


def test_a_flag_of_zero_asks_for_a_partition_which_refuses_it() -> None:
    words = ["run", "out/tiny", "a cat"]
    assert not asked(parse(words))
    for flags in (["--stride", "0"], ["--warm-up", "0"], ["--fidelity", "0"], ["--wait", "0"], ["--devices", ""]):
        assert asked(parse([*words, *flags])), flags


def test_flags_that_do_not_go_together_are_refused(command: Command, tmp_path: Path) -> None:
    for flags, why in (
        (("--memory", "low"), "--memory low does not go with a partitioned run"),
        (("--large", "other", "--split", "3,3"), "--large does not go"),
        (("--device", "cpu", "--devices", "cpu,cpu"), "give one of them"),
        (("--wait", "0"), "wait is 0"),
        ((), "a partitioned run takes a bundle"),
    ):
        found = command("run", tmp_path, "a cat", "--warm-up", 2, *flags)
        assert found["exit_code"] == 2 and why in found["stderr"]
