"""Who is let in: whether the queue has room, and whether a deadline can be kept by the pace so far. No thread."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from diffship.core.errors import BusyError
from diffship.runtimes.serve.batcher import Strand
from diffship.runtimes.serve.jobs import Generation
from diffship.runtimes.serve.options import ServeOptions
from diffship.runtimes.serve.pace import Paces


class Busy(BusyError):
    """No capacity; `after` is when to ask again, in whole seconds."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.after = max(1, min(math.ceil(wait), 60))


@dataclass(frozen=True)
class Crowd:
    """What waits and what runs at one moment, in order of arrival; nothing of it has ended."""

    waiting: Sequence[Generation]
    running: Mapping[Generation, Sequence[Strand]]

    @classmethod
    def of(cls, waiting: Iterable[Generation], running: Mapping[Generation, Sequence[Strand]]) -> Crowd:
        return cls(
            [generation for generation in waiting if not generation.ended],
            {generation: strands for generation, strands in list(running.items()) if not generation.ended},
        )

    def seconds(self, paces: Paces) -> float:
        """Until all of it is done, by the pace so far; 0 while nothing is known."""
        seconds = sum(paces.seconds(generation.order) for generation in self.waiting)
        for generation, strands in self.running.items():
            calls = sum(max(strand.goal - strand.trajectory.step, 0) for strand in strands)
            seconds += paces.seconds_left(generation.order, len(strands), calls)
        return seconds

    def require_room(self, generation: Generation, paces: Paces, options: ServeOptions) -> None:
        """Raises Busy: the queue is full, or too long for the deadline.

        Alone, a request is always let in: only what is drawn can correct a pace that a stall has spoilt, and the
        deadline ends what is too slow indeed.
        """
        if not (self.waiting or self.running):
            return
        wait, own = self.seconds(paces), paces.seconds(generation.order)
        if self._without_room(generation, options.batch) > options.queue:
            raise Busy(f"the queue is full: {options.queue} requests wait", wait)
        if wait + own > generation.seconds_left():
            raise Busy(
                f"the queue needs {wait:.1f} s and this request {own:.1f} s; its deadline is in "
                f"{generation.seconds_left():.1f} s",
                wait,
            )

    def _without_room(self, last: Generation, batch: int) -> int:
        """How many wait, with `last`, once every one that a batch has room for is taken.

        As a batch holds images of one size, all sizes together get the room of one: what runs is bounded too.
        """
        room = batch - sum(generation.order.images for generation in self.running)
        queued = 0
        for generation in (*self.waiting, last):
            room -= min(generation.order.images, batch)
            queued += room < 0
        return queued
