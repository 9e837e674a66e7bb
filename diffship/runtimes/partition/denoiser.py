"""Partitioned: stages over a timetable as a Denoiser, which is what the denoising loop takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from diffship.core.errors import ConfigError
from diffship.core.kind import Kind
from diffship.core.runner import Runner
from diffship.runtimes.partition.course import Course
from diffship.runtimes.partition.lanes import Lanes, OneByOne, ThreadEach
from diffship.runtimes.partition.placement import Placement
from diffship.runtimes.partition.timetable import Scheme, Task, Timetable, timetable
from diffship.sampling.guidance import FeedMaker, guide, guided, like
from diffship.sampling.sampler import times_of
from diffship.sampling.trajectory import Trajectory

TIMEOUT_SECONDS = 600.0
Array = Any
Seat = tuple[int, int]  # (device, piece)


class Partitioned:
    """A Denoiser: give it to `denoise` and `advance`. It follows one batch at a time, all at one step.

    Boundaries do not travel with a trajectory: a batch that does not follow from the last call begins with a warm-up of
    its own, wherever it stands. A context manager; not shared by threads.
    """

    def __init__(
        self, placement: Placement, scheme: Scheme, runners: Mapping[Seat, Runner], lanes: Lanes, kind: Kind
    ) -> None:
        self.placement = placement
        self.scheme = scheme
        self._runners = dict(runners)
        self._makers = {seat: FeedMaker(runner, kind) for seat, runner in self._runners.items()}
        self._inputs = {seat: {spec.name for spec in runner.inputs} for seat, runner in self._runners.items()}
        self._lanes = lanes
        self._kind = kind
        self._course: Course | None = None
        self._before: tuple[Trajectory, ...] = ()
        self._begin = 0

    def __call__(self, batch: Sequence[Trajectory]) -> list[Array]:
        """The guided output of each trajectory.

        Raises:
            ConfigError: the trajectories are not at one step.
            RunnerError, DeadlineError: as Course.prediction; the next call begins anew.
        """
        course = self._follow(batch)
        self._course = None  # unless all goes well
        rows = course.prediction(batch[0].step - self._begin, lambda task: self._feeds(batch, task))
        self._course, self._before = course, tuple(batch)
        return guide(batch, self._kind.unpack_output(rows, batch[0].latents.shape))

    def close(self) -> None:
        """End the threads; the runners are the caller's."""
        self._lanes.close()

    def __enter__(self) -> Partitioned:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _follow(self, batch: Sequence[Trajectory]) -> Course:
        at = {(trajectory.step, trajectory.calls) for trajectory in batch}
        if len(at) != 1:
            raise ConfigError(f"a partitioned batch stands at one step; these stand at (step, calls) {sorted(at)}")
        if self._course is not None and follows(self._before, batch):
            return self._course
        ((self._begin, calls),) = at
        table = remembered(self.placement, calls - self._begin, self.scheme)
        missing = [seat for seat in table.seats if seat not in self._runners]
        if missing:
            device, piece = missing[0]
            raise ConfigError(f"device {device} has no runner of stage {self.placement.pieces[piece].name}")
        return Course(table, self._run, self._lanes)

    def _run(self, device: int, piece: int, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        return self._runners[device, piece].run(feeds)

    def _feeds(self, batch: Sequence[Trajectory], task: Task) -> dict[str, Array]:
        seat = task.device, task.piece
        made = self._makers[seat](batch)
        rows = [*(trajectory for trajectory in batch if guided(trajectory)), *batch]
        # the timestep is that of the step in the table; the latents are scaled as their own step has it
        times = [times_of(trajectory.sampler, trajectory.steps)[self._begin + task.time] for trajectory in rows]
        made[self._kind.time_input] = like(np.array(times, np.float32), batch[0].latents)
        return {name: array for name, array in made.items() if name in self._inputs[seat]}


def simulate(
    placement: Placement, runners: Sequence[Runner], scheme: Scheme | None = None, *, kind: Kind
) -> Partitioned:
    """All devices in this thread, with the numbers that several would give; `runners[k]` runs stage k.

    kind: that of the model which the stages are of (`family.kind`).
    """
    scheme = scheme or Scheme()
    return Partitioned(placement, scheme, everywhere(placement, runners, scheme), OneByOne(), kind)


def threads(
    placement: Placement,
    runners: Sequence[Runner] | Mapping[Seat, Runner],
    scheme: Scheme | None = None,
    timeout: float = TIMEOUT_SECONDS,
    *,
    kind: Kind,
) -> Partitioned:
    """A thread for each device. `runners` has one for each stage, or one for each (device, stage) that is run.

    kind: that of the model which the stages are of (`family.kind`). Engines may be mixed: a runner takes and gives what
    the next one takes, numpy if nothing else is in common.
    """
    scheme = scheme or Scheme()
    seated = runners if isinstance(runners, Mapping) else everywhere(placement, runners, scheme)
    return Partitioned(placement, scheme, seated, ThreadEach(timeout), kind)


def seats(placement: Placement, scheme: Scheme) -> list[Seat]:
    """(device, stage) of everything that may run: each device has its own, extra ones have those of the last device."""
    last = placement.devices - 1
    owned = [(piece.home, i) for i, piece in enumerate(placement.pieces)]
    extra = range(placement.devices, scheme.devices(placement.devices))
    return sorted([*owned, *((device, i) for device in extra for home, i in owned if home == last)])


def everywhere(placement: Placement, runners: Sequence[Runner], scheme: Scheme) -> dict[Seat, Runner]:
    """The same runner of a stage on every device that runs it."""
    if len(runners) != len(placement.pieces):
        raise ConfigError(f"{len(placement.pieces)} stages take one runner each, and {len(runners)} were given")
    return {(device, piece): runners[piece] for device, piece in seats(placement, scheme)}


@lru_cache(maxsize=64)
def remembered(placement: Placement, calls: int, scheme: Scheme) -> Timetable:
    """The timetable of `calls` steps, made once."""
    return timetable(placement, calls, scheme)


def follows(before: Sequence[Trajectory], batch: Sequence[Trajectory]) -> bool:
    """Whether each trajectory is the earlier one after a call; a step keeps what it does not change."""
    return len(before) == len(batch) and all(
        old.step + 1 == new.step and old.facts is new.facts and old.positive is new.positive and old.size == new.size
        for old, new in zip(before, batch, strict=True)
    )
