"""Course: one run of a timetable. It keeps the boundaries of the last round, and predictions that are not due yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from diffship.core.errors import ConfigError, RunnerError
from diffship.runtimes.partition.lanes import Job, Lanes
from diffship.runtimes.partition.timetable import Made, Task, Timetable

PREDICTION = "out_sample"
Array = Any
Run = Callable[[int, int, Mapping[str, Array]], Mapping[str, Array]]  # (device, piece, feeds) -> outputs
Feeds = Callable[[Task], Mapping[str, Array]]  # what the whole takes, at the task's timestep


class Course:
    """Steps are asked for one after another, from 0; after a fault it cannot go on."""

    def __init__(self, table: Timetable, run: Run, lanes: Lanes) -> None:
        self.table = table
        self._run = run
        self._lanes = lanes
        self._made: dict[Made, Array] = {}
        self._ready: dict[int, Array] = {}
        self._next = 0

    def prediction(self, step: int, feeds: Feeds) -> Array:
        """The output of the last stage for `step`; `feeds` are made of its latents.

        Raises:
            ConfigError: another step is due.
            RunnerError: a stage failed; the message names it.
            DeadlineError: a stage did not answer in time.
        """
        if step != self._next or step >= self.table.calls:
            raise ConfigError(f"step {step} was asked for; this run of {self.table.calls} steps is at {self._next}")
        if step not in self._ready:
            self._next = self.table.calls  # unless the round ends well
            self._play(self.table.by_step[step], feeds)
        self._next = step + 1
        return self._ready.pop(step)

    def _play(self, index: int, feeds: Feeds) -> None:
        each = self.table.rounds[index]
        if each.synchronous:
            for device, tasks in groupby(each.tasks, key=lambda task: task.device):
                self._together(index, {device: list(tasks)}, feeds)
        else:
            devices = sorted({task.device for task in each.tasks})
            self._together(
                index, {device: [task for task in each.tasks if task.device == device] for device in devices}, feeds
            )
        later = self.table.rounds[index + 1 : index + 2]
        wanted = {read for after in later for task in after.tasks for read in task.reads}
        self._made = {made: array for made, array in self._made.items() if made in wanted}

    def _together(self, index: int, work: Mapping[int, Sequence[Task]], feeds: Feeds) -> None:
        jobs = {device: self._job(index, tasks, feeds) for device, tasks in work.items()}
        for made, ready in self._lanes(jobs).values():
            self._made |= made
            self._ready |= ready

    def _job(self, index: int, tasks: Sequence[Task], feeds: Feeds) -> Job:
        names = ", ".join(self.table.placement.pieces[task.piece].name for task in tasks)
        label = f"stage {names} on device {tasks[0].device}, step {tasks[0].sample + 1} of {self.table.calls}"

        def call() -> tuple[dict[Made, Array], dict[int, Array]]:
            try:
                return self._perform(index, tasks, feeds)
            except Exception as fault:
                raise RunnerError(f"{label}: {str(fault) or type(fault).__name__}") from fault

        return Job(label, call)

    def _perform(self, index: int, tasks: Sequence[Task], feeds: Feeds) -> tuple[dict[Made, Array], dict[int, Array]]:
        own: dict[Made, Array] = {}
        ready: dict[int, Array] = {}
        for task in tasks:
            given = {read.tensor: own[read] if read in own else self._made[read] for read in task.reads}
            outputs = self._run(task.device, task.piece, {**feeds(task), **given})
            own |= {
                Made(index, task.device, name): outputs[name] for name in self.table.placement.pieces[task.piece].writes
            }
            if task.predicts is not None:
                ready[task.predicts] = outputs[PREDICTION]
        return own, ready
