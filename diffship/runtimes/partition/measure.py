"""What stages, devices and the way between them take, measured now, and how close lagging stages come."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from diffship.core.compare import picture_psnr
from diffship.core.errors import MissingExtra
from diffship.core.job import available_memory
from diffship.core.kind import Kind
from diffship.core.lazy import lazy
from diffship.core.runner import Handle, Runner
from diffship.core.stopwatch import timed
from diffship.runtimes.partition.denoiser import TIMEOUT_SECONDS, Partitioned, simulate
from diffship.runtimes.partition.forecast import Link, PartitionProfile, Way, placed
from diffship.runtimes.partition.halves import split
from diffship.runtimes.partition.lanes import Job, ThreadEach
from diffship.runtimes.partition.placement import Placement
from diffship.runtimes.partition.timetable import Scheme
from diffship.sampling.generate import finish, start
from diffship.sampling.guidance import guided
from diffship.sampling.loop import denoise
from diffship.sampling.model import Model
from diffship.sampling.request import Request
from diffship.sampling.trajectory import Trajectory

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

ROUNDS = 3
EXCHANGES = 20
FIDELITY_STEPS = 8


class Clocked:
    """A Runner that keeps the seconds of each call of another one, and the bytes of its outputs."""

    def __init__(self, runner: Runner) -> None:
        self.inputs, self.outputs = runner.inputs, runner.outputs
        self.seconds: list[float] = []
        self.sizes: dict[str, int] = {}
        self._runner = runner

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        since = time.perf_counter()
        made = self._runner.run(feeds)
        self.seconds.append(time.perf_counter() - since)
        self.sizes = {name: int(array.nbytes) for name, array in made.items()}
        return made

    def put(self, array: Any) -> Handle:
        return self._runner.put(array)

    def close(self) -> None:
        """The runner is whoever's that opened it."""


def measure_profile(
    model: Model,
    devices: Sequence[str],
    placement: Placement,
    runners: Sequence[Sequence[Runner]],
    request: Request,
    held: Sequence[int],
    room: Mapping[str, int | None] | None = None,
    timeout: float = TIMEOUT_SECONDS,
) -> PartitionProfile:
    """A profile for pictures like that of `request`, of all devices of this process.

    model: encodes and decodes. runners: `runners[d][k]` is stage k on device d; devices of one name may have the same
    ones. held: bytes of the weights of each stage. room: free bytes by device name. timeout: seconds for each wait.

    Every figure is a median of ROUNDS calls after one that is not counted: each stage on each device with all rows and
    with those of one half of guidance, encoding, decoding, and what the sampler takes in a call; then 2, 3, ... devices
    at once, because two names may be one machine; then exchanges between threads that compute nothing. Boundary tensors
    lie in host memory, so that their way to and from a device is in the times of the stages.

    Raises:
        ConfigError: the request does not fit. RunnerError: a stage failed. DeadlineError: one did not answer in time.
    """
    kind = model.family.kind
    start(model, request)
    batch, begin = timed(lambda: start(model, request))
    positive = split(batch)[1] if all(map(guided, batch)) else []
    chains = [_Chain(placement, row, kind) for row in runners]
    whole = [chain.stages(batch) for chain in chains]
    rest = chains[0].rest
    half = [chain.stages(positive) for chain in chains] if positive else []
    finish(model, batch)
    _, end = timed(lambda: finish(model, batch))
    lanes = ThreadEach(timeout)
    try:
        crowd, link = _crowd(lanes, chains, batch), _exchange(lanes, len(devices))
    finally:
        lanes.close()
    sizes = {name: size for stage in chains[0].runners for name, size in stage.sizes.items()}
    figures = tuple(whole), tuple(half), crowd, Link(link), sizes, tuple(held), dict(room or {})
    return PartitionProfile(tuple(devices), placement, *figures, begin, rest, end)


class Fidelity:
    """PSNR in dB of a way's pictures to the sequential ones, over the pixels of the picture that is worst; infinite if
    they are equal. Pictures are drawn in one thread, whatever the devices, once for each way that differs in them.

    `requests` have few steps: a warm-up is shortened in proportion, and rounded down, so that no more of a picture is
    exact than in the one that is asked for; but its first call always is, which is a larger share of few steps.
    """

    def __init__(
        self, model: Model, placement: Placement, runners: Sequence[Runner], requests: Sequence[Request], calls: int
    ) -> None:
        self._model, self._placement, self._runners = model, placement, runners
        self._begun = [start(model, request) for request in requests]
        self._calls = calls
        self._known: dict[tuple[tuple[int, ...], Scheme], float] = {}
        self._sequential: list[Any] = []

    def __call__(self, way: Way) -> float:
        fewer = self._begun[0][0].calls
        # where two calls or more lag, two of the few lag too: stride 2 on one stage is exact with less
        most = fewer - min(2, max(self._calls - way.scheme.warm_up, 0))
        scheme = replace(way.scheme, warm_up=max(1, min(way.scheme.warm_up * fewer // self._calls, most)))
        key = way.homes, scheme
        if key not in self._known:
            self._sequential = self._sequential or self._drawn(tuple(0 for _ in way.homes), Scheme())
            pairs = zip(self._drawn(*key), self._sequential, strict=True)
            self._known[key] = min(picture_psnr(found, expected) for found, expected in pairs)
        return self._known[key]

    def _drawn(self, homes: tuple[int, ...], scheme: Scheme) -> list[Any]:
        placement, kind = placed(self._placement, homes), self._model.family.kind
        with simulate(placement, self._runners, scheme, kind=kind) as denoiser:
            return [finish(self._model, denoise(batch, denoiser))[0].pixels for batch in self._begun]


def free_bytes(device: str) -> int | None:
    """Bytes that a device has free: host memory for `cpu`, what CUDA tells of `cuda` and `cuda:1`; else None."""
    if device.partition(":")[0] == "cpu":
        return available_memory()
    try:
        return int(torch.cuda.mem_get_info(device)[0])
    except (MissingExtra, RuntimeError, AssertionError, ValueError):  # no torch, a torch for CPUs, no such device
        return None


class _Chain:
    """All stages on one device, one after the other, clocked."""

    def __init__(self, placement: Placement, runners: Sequence[Runner], kind: Kind) -> None:
        self.runners = [Clocked(runner) for runner in runners]
        self._denoiser: Partitioned = simulate(placed(placement, [0] * len(runners)), self.runners, kind=kind)
        self.rest = 0.0  # of the last `stages`: what a call takes beside its stages

    def call(self, batch: Sequence[Trajectory]) -> None:
        """The next call of the batch; it begins anew each time."""
        denoise(batch, self._denoiser, until=batch[0].step + 1)

    def stages(self, batch: Sequence[Trajectory]) -> tuple[float, ...]:
        """Seconds of each stage in one call of the batch."""
        self.call(batch)
        for runner in self.runners:
            runner.seconds.clear()
        total = median(timed(lambda: self.call(batch))[1] for _ in range(ROUNDS))
        found = tuple(median(runner.seconds) for runner in self.runners)
        self.rest = max(total - sum(found), 0.0)
        return found


def _crowd(lanes: ThreadEach, chains: Sequence[_Chain], batch: Sequence[Trajectory]) -> tuple[float, ...]:
    """How many times longer the slowest of the first m devices takes if all m compute at once, for m = 1, 2, ...

    One device after the other and all at once are timed in turns, so that a machine that slows down slows down both.
    """
    jobs = {device: _job(device, chain, batch) for device, chain in enumerate(chains)}
    found = [1.0]
    for count in range(2, len(chains) + 1):
        some = {device: jobs[device] for device in range(count)}
        ratios = []
        for _ in range(ROUNDS):
            alone = max(timed(partial(lanes, {device: job}))[1] for device, job in some.items())
            ratios.append(timed(partial(lanes, some))[1] / alone)
        found.append(max(found[-1], median(ratios)))
    return tuple(found)


def _job(device: int, chain: _Chain, batch: Sequence[Trajectory]) -> Job:
    return Job(f"all stages on device {device}, which are timed", lambda: chain.call(batch))


def _exchange(lanes: ThreadEach, devices: int) -> float:
    """Seconds of one exchange between as many threads, which have nothing to do."""
    if devices < 2:
        return 0.0
    jobs = {device: Job(f"nothing, on device {device}", lambda: None) for device in range(devices)}
    return median(timed(lambda: lanes(jobs))[1] for _ in range(EXCHANGES))
