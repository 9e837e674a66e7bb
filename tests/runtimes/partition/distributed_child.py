"""One rank of a distributed run over the toy stages: `distributed_child.py DEVICES STRIDE WARM_UP SHIFT PARTS OUT`.

Rank 0 writes the last latents of some runs to OUT; FAULT in the environment makes one rank misbehave.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "sampling")]

from partition_oracle import placed  # noqa: E402
from partition_told import said, told  # noqa: E402

from diffship.core.distributed import end  # noqa: E402
from diffship.core.errors import DiffshipError  # noqa: E402
from diffship.core.registry import kind  # noqa: E402
from diffship.runtimes.partition.distributed import Distributed, Team, work  # noqa: E402
from diffship.runtimes.partition.ranks import Ranks, place_of  # noqa: E402
from diffship.runtimes.partition.timetable import Scheme  # noqa: E402
from diffship.sampling.loop import denoise  # noqa: E402

SD_KIND = kind("sd")


def misbehave(runner: Any, fault: str) -> None:
    inner, calls = runner.run, []

    def run(feeds: Any) -> Any:
        calls.append(1)
        if len(calls) == 3 and fault == "raise":
            raise MemoryError("no room")
        if len(calls) == 3:
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[fault])
        return inner(feeds)

    object.__setattr__(runner, "run", run)


def main() -> None:
    devices, stride, warm_up, shift, parts = map(int, sys.argv[1:6])
    scheme, placement, stages = Scheme(stride, warm_up, bool(shift)), placed(devices), told(devices)
    place = place_of()
    assert place is not None
    device = place.rank % scheme.devices(devices)
    mine = {i: stages[i] for i, piece in enumerate(placement.pieces) if piece.home == min(device, devices - 1)}
    fault, _, rank = os.environ.get("FAULT", "").partition(":")
    if rank == str(place.rank) and fault in ("kill", "stop", "raise"):
        misbehave(next(iter(mine.values())), fault)
    bundle = "another" if fault == "bundle" and rank == str(place.rank) else "one"
    inputs = {spec.name: spec for stage in stages for spec in stage.inputs if not spec.name.startswith(("hid", "skip"))}
    boundaries = {spec.name: spec for stage in stages for spec in stage.outputs}
    wait, join = (float(os.environ.get(name, "60")) for name in ("WAIT", "JOIN"))
    with Ranks(place, {"bundle": bundle}, wait, join) as ranks:
        team = Team(ranks, placement, scheme, tuple(inputs.values()), boundaries, mine, SD_KIND, parts)
        if place.rank:
            work(team)
            return
        denoiser = Distributed(team)
        starts = [said(seed, 4.0, 9) for seed in (1, 2)]
        ends = denoise(starts, denoiser)
        half = denoise(starts[:1], denoiser, until=4)  # a run that ends midway, and one that goes on from elsewhere
        again = denoise(half[:1], denoiser)
        denoiser.end()
    np.savez(sys.argv[6], *[each.latents for each in (*ends, *half, *again)])


if __name__ == "__main__":
    try:
        main()
    except DiffshipError as fault:
        print(fault, file=sys.stderr)
        end(1)
    end(0)
