"""Processes over gloo: the same latents as in one process, and an error that names the rank when one is lost."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from partition_oracle import placed
from partition_told import said, told
from test_partition_run import SD_KIND

from diffship.core.errors import ConfigError
from diffship.runtimes.partition.denoiser import simulate
from diffship.runtimes.partition.ranks import place_of
from diffship.runtimes.partition.timetable import Scheme
from diffship.sampling.loop import denoise

pytest.importorskip("torch")
Case = tuple[int, int, int, int, int]
CHILD = Path(__file__).with_name("distributed_child.py")


def start(rank: int, size: int, port: int, words: list[object], more: Mapping[str, str]) -> subprocess.Popen[str]:
    place = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    environ = {**os.environ, **{name: str(value) for name, value in place.items()}, **more}
    command = [sys.executable, str(CHILD), *map(str, words)]
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ended(children: list[subprocess.Popen[str]], timeout: float = 60) -> list[tuple[int, str]]:
    """(exit code, stderr) of each; one that still runs then is killed, and the test fails."""
    deadline, found = time.monotonic() + timeout, []
    try:
        for child in children:
            _, told_ = child.communicate(timeout=max(0.1, deadline - time.monotonic()))
            found.append((child.returncode, told_))
    finally:
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGCONT)
                child.kill()
                child.communicate(timeout=10)
    return found


def begun(case: Case, out: Path, **more: str) -> list[subprocess.Popen[str]]:
    devices, stride, _, _, parts = case
    size, port = parts * (devices + stride - 1), free_port()
    return [start(rank, size, port, [*case, out], more) for rank in range(size)]


def simulated(case: Case) -> list[Any]:
    devices, stride, warm_up, shift, _ = case
    denoiser = simulate(placed(devices), told(devices), Scheme(stride, warm_up, bool(shift)), kind=SD_KIND)
    starts = [said(seed, 4.0, 9) for seed in (1, 2)]
    ends = denoise(starts, denoiser)
    half = denoise(starts[:1], denoiser, until=4)
    return [each.latents for each in (*ends, *half, *denoise(half[:1], denoiser))]


@pytest.mark.slow
@pytest.mark.parametrize("case", [(2, 1, 2, 0, 1), (2, 2, 3, 1, 1), (1, 1, 1, 0, 2)], ids=str)
def test_processes_give_what_one_process_gives(case: Case, tmp_path: Path) -> None:
    """(devices, stride, warm-up, time shift, halves); two prompts, a run that ends midway, one that goes on from it."""
    for code, told_ in ended(begun(case, tmp_path / "out.npz")):
        assert code == 0, told_
    with np.load(tmp_path / "out.npz") as found:
        for name, expected in zip(found.files, simulated(case), strict=True):
            assert np.abs(found[name] - expected).max() < 1e-6


FAULTS = {
    "kill:1": r"rank 1 went away \(the prediction of step 3\)",
    "stop:1": r"rank 1 did not answer within 4 s",
    "raise:1": r"rank 1 (went away|did not answer within) .*; it said: stage toy\.1 on rank 1, step 3 of 9: no room",
    "bundle:1": r"rank 1 has another bundle than rank 0: another, not one",
    "stop:0": r"rank 0 did not answer within 4 s",
}


@pytest.mark.slow
def test_a_rank_that_is_lost_is_named_in_time_and_leaves_no_process(tmp_path: Path) -> None:
    """Killed, stopped, failing, with another bundle; all at once, because they mostly wait."""
    case = (2, 1, 1, 0, 1)
    runs = {fault: begun(case, tmp_path / "none.npz", FAULT=fault, WAIT="4") for fault in FAULTS}
    try:
        for fault, children in runs.items():
            lost = int(fault[-1])
            ((code, told_),) = ended([children[1 - lost]], 120)
            assert code == 1 and re.search(FAULTS[fault], told_), (fault, told_[-400:])
            if fault.startswith("stop"):
                children[lost].kill()
            assert ended([children[lost]])[0][0] != 0
    finally:
        for child in [child for children in runs.values() for child in children if child.stdout]:
            child.kill()
            child.communicate(timeout=10)
    assert not (tmp_path / "none.npz").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "missing"), [(0, "rank 1 of 2 did not come within 2 s"), (1, "rank 0 did not come")])
def test_a_rank_that_never_starts_is_named(rank: int, missing: str, tmp_path: Path) -> None:
    ((code, told_),) = ended([start(rank, 2, free_port(), [2, 1, 1, 0, 1, tmp_path], {"JOIN": "2"})])
    assert code == 1 and missing in told_ and "frame #" not in told_


def test_places_that_are_none() -> None:
    whole = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}
    place = place_of(whole)
    assert place is not None and (place.rank, place.size, place.port, place.own_store) == (1, 2, 29500, True)
    assert place_of({}) is None and place_of({**whole, "WORLD_SIZE": "1"}) is None
    for change, why in (
        ({"RANK": ""}, "RANK is ''"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is ''.*torchrun"),
        ({"RANK": "2"}, "RANK 2 of WORLD_SIZE 2"),
        ({"MASTER_PORT": "99999"}, "not a place"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
    ):
        with pytest.raises(ConfigError, match=why):
            place_of({**whole, **change})
