"""Who shares the next model call. Pure scheduling: no thread, no clock, no model but a Denoiser."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from diffship.sampling.guidance import Key, group_key
from diffship.sampling.loop import Denoiser, advance
from diffship.sampling.trajectory import Trajectory


@dataclass(eq=False)
class Strand:
    """One image on its way: `goal` is the call that it stops before, `owner` whom it belongs to, `place` which of its
    images it is. `fault` is what a call of it alone raised."""

    trajectory: Trajectory
    goal: int
    owner: Any
    place: int = 0
    fault: Exception | None = None

    @property
    def arrived(self) -> bool:
        return self.fault is not None or self.trajectory.step >= self.goal


class Batcher:
    """Strands under way, in groups that may share a call: equal latents, equal conditioning shapes, equal ControlNets.

    Groups take turns, so that a rare size is not starved by a common one; within a group that is larger than `batch`,
    so do the strands. Every strand keeps its own step, sampler and guidance.
    """

    def __init__(self, denoiser: Denoiser, batch: int) -> None:
        self._denoiser = denoiser
        self._batch = batch
        self._groups: OrderedDict[Key, deque[Strand]] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(group) for group in self._groups.values())

    def strands(self) -> list[Strand]:
        return [strand for group in self._groups.values() for strand in group]

    def room(self, shape: tuple[int, ...]) -> int:
        """How many more strands with latents of `shape` one call of them would hold."""
        there = sum(len(group) for key, group in self._groups.items() if key[0] == shape)
        return self._batch - there

    def add(self, strands: Iterable[Strand]) -> None:
        for strand in strands:
            self._groups.setdefault(_key(strand.trajectory), deque()).append(strand)

    def remove(self, owner: object) -> None:
        """Forget every strand of `owner`."""
        for key, group in list(self._groups.items()):
            left = deque(strand for strand in group if strand.owner is not owner)
            if left:
                self._groups[key] = left
            else:
                del self._groups[key]

    def step(self) -> list[Strand]:
        """One model call for the group whose turn it is; the strands that took part, moved or with their fault.

        Those that have arrived are under way no more. A call that fails is made again one by one, so that only the
        strand at fault fails.
        """
        if not self._groups:
            return []
        key, group = next(iter(self._groups.items()))
        chosen = list(islice(group, self._batch))
        self._advance(chosen)
        rest = [*islice(group, len(chosen), None), *(strand for strand in chosen if not strand.arrived)]
        del self._groups[key]
        if rest:
            self._groups[key] = deque(rest)  # at the end: the other groups come first
        return chosen

    def _advance(self, strands: Sequence[Strand]) -> None:
        try:
            moved = advance([strand.trajectory for strand in strands], self._denoiser)
        except Exception as fault:
            if len(strands) == 1:
                strands[0].fault = fault
                return
            for strand in strands:
                self._advance([strand])
            return
        for strand, trajectory in zip(strands, moved, strict=True):
            strand.trajectory = trajectory


def _key(trajectory: Trajectory) -> Key:
    """`group_key`, and the ControlNets by name: with others the denoiser would make a call for each choice of them."""
    return (*group_key(trajectory), tuple(control.name for control in trajectory.controls))
