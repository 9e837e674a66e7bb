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

from diffship.core.compare import picture_psnr
from diffship.core.job import available_memory
from diffship.models.sources.opening import open_source
from diffship.models.walks.cuts import find_cuts, partition
from diffship.runtimes.engines.model import open_model
from diffship.runtimes.partition.choose import choose
from diffship.runtimes.partition.forecast import Way
from diffship.runtimes.partition.lanes import ThreadEach
from diffship.runtimes.partition.measure import (
    Fidelity,
    _Chain,
    _crowd,
    _exchange,
    free_bytes,
    measure_profile,
)
from diffship.runtimes.partition.placement import boundary_bytes, place
from diffship.runtimes.partition.timetable import Scheme
from diffship.sampling.request import Request


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_stages_of_torch_are_measured_and_a_way_is_chosen() -> None:
    """The API on a pipeline: two stages on two names of this machine; halves of guidance are exact, lag is not."""
    pytest.importorskip("torch")
    component = open_source("arch:tiny-sd").denoiser
    cuts = find_cuts(component, 2)
    stages = partition(component, cuts)
    runners, placement = [stage.load() for stage in stages], place(stages, cuts.homes)
    request = Request("red apple", steps=3, size=(64, 64), sampler="ddim")
    with open_model("arch:tiny-sd") as model:
        held = [100, 50]
        profile = measure_profile(model, ["cpu", "cpu:1"], placement, [runners, runners], request, held, timeout=60)
        fidelity = Fidelity(model, placement, runners, [request], 3)
        assert fidelity(Way((0, 0))) == math.inf and 0 < fidelity(Way((0, 1))) < 60
        assert fidelity(Way((0, 1), Scheme(1, 3))) == math.inf
        # of 30 calls 28 are exact: of the three not the first two, after which nothing lags
        assert Fidelity(model, placement, runners, [request], 30)(Way((0, 0), Scheme(2, 28))) < math.inf
    assert len(profile.whole) == len(profile.half) == 2 and profile.link.seconds > 0 and profile.crowd[0] == 1.0
    boundaries = boundary_bytes(stages, {"batch_size": 2, "height": 8, "width": 8, "sequence_length": 77}, 4)
    assert profile.sizes == boundaries
    assert choose(profile, 3, 500.0, fidelity).taken.way.exact


def test_psnr_by_its_definition() -> None:
    picture = np.full((2, 2, 3), 100, np.uint8)
    other = picture.copy()
    other[0, 0] = 130  # 30 levels in a quarter of the values: a mean squared error of 225
    assert picture_psnr(other, picture) == pytest.approx(10 * math.log10(255**2 / 225))
    assert picture_psnr(picture, picture) == math.inf
    assert picture_psnr(np.zeros((1, 1, 3), np.uint8), np.full((1, 1, 3), 255, np.uint8)) == 0.0


def test_free_memory_is_that_of_the_host_or_not_known() -> None:
    free, known = free_bytes("cpu"), available_memory()
    assert (free is None) == (known is None) and (free is None or free > 1 << 20)
    assert free_bytes("npu") is None
