"""What is measured of stages that take a known time, and of devices that are one machine."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from partition_oracle import Toy, toys
from partition_oracle import placed as toy_placement
from test_partition_run import SD_KIND, drawn

from diffship.core.job import available_memory
from diffship.runtimes.partition.lanes import ThreadEach
from diffship.runtimes.partition.measure import _Chain, _crowd, _exchange, free_bytes, psnr


@dataclass(frozen=True)
class Slow(Toy):
    """A toy stage that takes some time of its core, which it may share with others."""

    seconds: float = 0.0
    core: threading.Lock = field(default_factory=threading.Lock)

    def run(self, feeds: Any) -> dict[str, Any]:
        with self.core:
            time.sleep(self.seconds)
        return super().run(feeds)


def slow(seconds: tuple[float, ...], core: threading.Lock | None = None) -> list[Slow]:
    lock = core or threading.Lock()
    stages = toys(len(seconds))[0]
    return [
        Slow(toy.name, toy.reads, toy.writes, toy.gain, each, lock) for toy, each in zip(stages, seconds, strict=True)
    ]


def test_a_stage_takes_what_it_takes_and_its_boundaries_are_weighed() -> None:
    chain = _Chain(toy_placement(2), slow((0.01, 0.03)), SD_KIND)
    first, last = chain.stages([drawn(5), drawn(5)])
    assert 0.01 <= first < last and 0.03 <= last and chain.rest < 0.03
    assert chain.runners[0].sizes == dict.fromkeys(("hidden.0", "skip.0"), 2 * 4 * 4 * 4 * 4)


@pytest.mark.parametrize("shared", [False, True])
def test_devices_that_are_one_core_are_found_out(shared: bool) -> None:
    core = threading.Lock() if shared else None
    chains = [_Chain(toy_placement(1), slow((0.02,), core), SD_KIND) for _ in range(3)]
    lanes = ThreadEach(20)
    try:
        found = _crowd(lanes, chains, [drawn(5)])
        assert 0 < _exchange(lanes, 3) < 0.02 and _exchange(lanes, 1) == 0.0
    finally:
        lanes.close()
    assert found[0] == 1.0 and list(found) == sorted(found)
    # three sleeps of one core last three times as long, of three cores as long as one
    assert found[2] > 2.3 if shared else found[2] < 1.8


def test_psnr_by_its_definition() -> None:
    picture = np.full((2, 2, 3), 100, np.uint8)
    other = picture.copy()
    other[0, 0] = 130  # 30 levels in a quarter of the values: a mean squared error of 225
    assert psnr(other, picture) == pytest.approx(10 * math.log10(255**2 / 225))
    assert psnr(picture, picture) == math.inf
    assert psnr(np.zeros((1, 1, 3), np.uint8), np.full((1, 1, 3), 255, np.uint8)) == 0.0


def test_free_memory_is_that_of_the_host_or_not_known() -> None:
    free, known = free_bytes("cpu"), available_memory()
    assert (free is None) == (known is None) and (free is None or free > 1 << 20)
    assert free_bytes("npu") is None
