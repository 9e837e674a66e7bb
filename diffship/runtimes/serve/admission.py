"""Who is let in: whether the queue has room, and whether a deadline can be kept by the pace so far. No thread."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from diffship.core.errors import BusyError
from diffship.runtimes.serve.batcher import Strand
from diffship.runtimes.serve.jobs import Generation
from diffship.runtimes.serve.options import ServeOptions
from diffship.runtimes.serve.pace import Paces, Work


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

    def seconds(self, paces: Paces, batch: int) -> float:
        """Until all of it is done, by the pace so far; 0 while nothing is known."""
        return paces.seconds(self._works(), batch)

    def require_room(self, generation: Generation, paces: Paces, options: ServeOptions) -> None:
        """Raises Busy: the queue is full, or too long for the deadline.

        Alone, a request is always let in: only what is drawn can correct a pace that a stall has spoilt, and the
        deadline ends what is too slow indeed.
        """
        if not (self.waiting or self.running):
            return
        wait, queued = self.seconds(paces, options.batch), self._without_room(generation, options.batch)
        if queued > options.queue:
            raise Busy(f"the queue is full: {options.queue} requests wait", wait)
        works, own = self._works(), Work.of(generation.order)
        if not queued:  # it joins at once, and need not see the end of those that have more calls to make
            works = [replace(work, calls=min(work.calls, own.calls)) for work in works]
        needed, left = paces.seconds([*works, own], options.batch), generation.seconds_left()
        if needed > left:
            alone = paces.seconds([own], options.batch)
            raise Busy(
                f"the queue needs {wait:.1f} s, this request {alone:.1f} s alone and {needed:.1f} s behind it; its "
                f"deadline is in {left:.1f} s",
                wait,
            )

    def _works(self) -> list[Work]:
        works = [Work.of(generation.order) for generation in self.waiting]
        for generation, strands in self.running.items():
            if strands:
                calls = max(max(strand.goal - strand.trajectory.step, 0) for strand in strands)
                works.append(Work(generation.order, len(strands), calls, encodes=False))
            else:  # its prompt is being encoded
                works.append(Work.of(generation.order))
        return works

    def _without_room(self, last: Generation, batch: int) -> int:
        """How many requests, `last` included, wait once a batch has taken all for which it has room.

        A batch holds images of one size; here all sizes together get the room of one, so that what runs is bounded,
        too.
        """
        room = batch - sum(generation.order.images for generation in self.running)
        queued = 0
        for generation in (*self.waiting, last):
            room -= min(generation.order.images, batch)
            queued += room < 0
        return queued
