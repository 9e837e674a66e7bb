"""A simulation of devices by events, which knows nothing of diffship's timetable.

Which work the published equation asks for, who does it, and when each device is done.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, groupby

from partition_oracle import Toy

Work = tuple[int, int, bool]  # (stage, the step whose latents it takes, on the extra device of stride 2)


@dataclass(frozen=True)
class World:
    """Stages, what they cost by [device][stage], and what an exchange takes; `crowd[m - 1]` if m compute at once."""

    stages: list[Toy]
    costs: list[list[float]]
    crowd: list[float]
    wait: float
    per_byte: float
    sizes: dict[str, int]


@dataclass(frozen=True)
class Plan:
    homes: tuple[int, ...]
    stride: int
    warm_up: int
    calls: int
    parts: int = 1

    @property
    def devices(self) -> int:
        return self.homes[-1] + self.stride

    @property
    def exact(self) -> int:
        return self.calls if self.devices == 1 else min(self.warm_up, self.calls)

    def begins(self, step: int) -> int:
        """The step whose latents a prediction is made of."""
        return step if step < self.exact else step - (step - self.exact) % self.stride

    def extra(self, step: int) -> bool:
        """Whether the extra device makes the prediction of this step."""
        return self.stride == 2 and step >= self.exact and step == self.begins(step)


def asked(world: World, plan: Plan) -> set[Work]:
    """All work that some prediction needs, found from the predictions backwards."""
    owner = {name: k for k, stage in enumerate(world.stages) for name in stage.writes}
    last = plan.homes[-1]
    found: set[Work] = set()
    todo = [(len(world.stages) - 1, plan.begins(step), plan.extra(step)) for step in range(plan.calls)]
    while todo:
        work = todo.pop()
        if work in found:
            continue
        found.add(work)
        k, begin, extra = work
        for name in world.stages[k].reads:
            source = owner[name]
            fresh = begin < plan.exact or plan.homes[source] == plan.homes[k]
            earlier = begin if fresh else max(begin - plan.stride, plan.exact - 1)
            todo.append((source, earlier, extra and fresh and plan.homes[source] == last))
    return found


def picture_time(world: World, plan: Plan) -> float:
    """When the last prediction is there."""
    work, now = asked(world, plan), 0.0
    for step in range(plan.calls):
        if plan.begins(step) == step:
            now = max(played(world, plan, work, step, half, now) for half in range(plan.parts))
        now += world.wait if plan.parts > 1 else 0.0
    return now


def played(world: World, plan: Plan, work: set[Work], step: int, half: int, now: float) -> float:
    """When one half has done the work on the latents of `step`, which begins at `now`."""
    exact = step < plan.exact
    mine = sorted((k, extra) for k, begin, extra in work if begin == step)
    seats = [(plan.homes[-1] + 1 if extra else plan.homes[k], k) for k, extra in mine]
    turns = list(grouped(seats if exact else sorted(seats)))
    busy = plan.parts * (1 if exact else len(turns))
    wait = world.wait if plan.devices > 1 else 0.0
    events: list[tuple[float, int]] = []
    for device, stages in turns:
        ready = now + lasts(world, plan, device, stages, half, busy)
        heapq.heappush(events, (ready, device))
        if exact:
            now = heapq.heappop(events)[0] + wait
    while events:
        now = heapq.heappop(events)[0]
        if not events:
            now += wait
    return now


def grouped(seats: list[tuple[int, int]]) -> Iterator[tuple[int, list[int]]]:
    for device, group in groupby(seats, key=lambda seat: seat[0]):
        yield device, [k for _, k in group]


def lasts(world: World, plan: Plan, device: int, stages: list[int], half: int, busy: int) -> float:
    """Receiving and computing of one device."""
    own = plan.homes[stages[0]]
    names = {
        name
        for k in stages
        for name in world.stages[k].reads
        if all(plan.homes[j] != own for j, other in enumerate(world.stages) if name in other.writes)
    }
    received = sum(world.sizes[name] for name in names) * world.per_byte / plan.parts
    at = half * plan.devices + device
    return received + world.crowd[busy - 1] * sum(world.costs[at][k] for k in stages) / plan.parts


def joined_by_hand(homes: list[int]) -> Iterator[tuple[int, ...]]:
    """Every way of joining neighbouring devices, told by where new ones begin."""
    count = max(homes) + 1
    for size in range(count):
        for starts in combinations(range(1, count), size):
            yield tuple(sum(home >= start for start in starts) for home in homes)
