"""Forecast: how long a picture takes in each way of sharing it among devices, and what each of them holds. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, combinations, groupby, product
from math import comb

from diffship.core.errors import ConfigError
from diffship.runtimes.partition.denoiser import remembered, seats
from diffship.runtimes.partition.placement import Placement
from diffship.runtimes.partition.timetable import STRIDES, Round, Scheme, Task

WARM_UPS = (1, 2, 3, 5, 7, 9, 11)  # those of AsyncDiff's Table 2, and 2
MOST_JOINED = 512  # manners of joining stages that are tried; each has a timetable for every stride and warm-up


@dataclass(frozen=True)
class Link:
    """What it takes that devices wait for each other and hand tensors on: `seconds` of every exchange, and the bytes of
    boundary tensors at `bytes_per_second`; None if that time is in the stages' own (one process, host memory)."""

    seconds: float = 0.0
    bytes_per_second: float | None = None

    def moving(self, nbytes: float) -> float:
        """Seconds of sending `nbytes`."""
        return 0.0 if self.bytes_per_second is None else nbytes / self.bytes_per_second


@dataclass(frozen=True)
class PartitionProfile:
    """What was measured of one model on some devices; times in seconds, sizes in bytes.

    `placement` has as many devices as the model has stages to share. `whole[d][k]` is one call of stage k on device d
    with all rows, `half[d][k]` with the rows of one half of guidance (empty if there is no second half). `crowd[m - 1]`
    says how many times longer a stage takes if m devices compute at once. `sizes` are those of the boundary tensors
    with all rows, `held` those of the weights of each stage, `room` what is free on a device, by its name (None: that
    is not known). Encoding takes `begin`, the sampler `rest` in every call, decoding `end`.
    """

    devices: tuple[str, ...]
    placement: Placement
    whole: tuple[tuple[float, ...], ...]
    half: tuple[tuple[float, ...], ...]
    crowd: tuple[float, ...]
    link: Link
    sizes: Mapping[str, int]
    held: tuple[int, ...]
    room: Mapping[str, int | None]
    begin: float = 0.0
    rest: float = 0.0
    end: float = 0.0

    def __post_init__(self) -> None:
        count, stages = len(self.devices), len(self.placement.pieces)
        if not count or len(self.crowd) != count or len(self.whole) != count or len(self.half) not in (0, count):
            raise ConfigError(f"a profile of {count} devices has figures of {len(self.whole)}; they are one for each")
        if any(len(row) != stages for row in (*self.whole, *self.half, self.held)):
            raise ConfigError(f"a profile of {stages} stages has one figure for each of them")


@dataclass(frozen=True)
class Way:
    """One way of sharing a picture: `homes[k]` is the device of stage k within its half of guidance, `parts` is 2 if
    the halves are apart. The devices of the profile are taken in order, those of the negative half first."""

    homes: tuple[int, ...]
    scheme: Scheme = field(default_factory=Scheme)
    parts: int = 1

    @property
    def stages(self) -> int:
        """How many devices share the stages of one half."""
        return self.homes[-1] + 1

    @property
    def own(self) -> int:
        """Devices of one half."""
        return self.scheme.devices(self.stages)

    @property
    def devices(self) -> int:
        return self.parts * self.own

    @property
    def exact(self) -> bool:
        """Whether nothing is stale: the picture is the sequential one."""
        return self.own == 1

    def text(self) -> str:
        """`one device`, `2 stages, stride 1, warm-up 3`, `halves of guidance, each 2 stages, ...`."""
        plural = "s" if self.stages > 1 else ""
        lag = f"{self.stages} stage{plural}, stride {self.scheme.stride}, warm-up {self.scheme.warm_up}"
        if self.parts == 1:
            return "one device" if self.exact else lag
        return "halves of guidance" if self.exact else f"halves of guidance, each {lag}"


def ways(profile: PartitionProfile, calls: int, warm_ups: Sequence[int] = WARM_UPS) -> list[Way]:
    """Every way that the devices allow: neighbouring stages joined in all manners, strides, warm-ups, both halves.

    Devices are taken in the order in which they are named. A way of several devices in which nothing lags, because of
    its long warm-up, is one device with detours, and is left out.

    Raises:
        ConfigError: stages can be joined in more than MOST_JOINED manners.
    """
    parts = (1, 2) if profile.half else (1,)
    every = (
        Way(homes, Scheme(stride, warm_up), part)
        for part, homes, stride in product(parts, joined(profile.placement, len(profile.devices)), STRIDES)
        for warm_up in ((1,) if homes[-1] == 0 and stride == 1 else warm_ups)
    )
    return [way for way in every if way.devices <= len(profile.devices) and (way.exact or _lags(way, calls))]


def _lags(way: Way, calls: int) -> bool:
    """Whether some call is stale; at stride 2 a last one that is left alone is so only by what other devices made."""
    return calls - way.scheme.warm_up >= (1 if way.stages > 1 else 2)


def joined(placement: Placement, most: int) -> list[tuple[int, ...]]:
    """Homes of the pieces if neighbouring devices of `placement` are joined into `most` or fewer, in every manner.

    Raises:
        ConfigError: there are more than MOST_JOINED.
    """
    count, found = placement.devices, []
    numbers = range(min(most, count))  # of devices beside the first
    if (manners := sum(comb(count - 1, number) for number in numbers)) > MOST_JOINED:
        raise ConfigError(
            f"{count} stages are joined into {most} or fewer in {manners} manners, and at most {MOST_JOINED} are "
            "tried: name fewer devices, or cut into fewer stages"
        )
    for begins in chain.from_iterable(combinations(range(1, count), number) for number in numbers):
        device = [sum(begin <= d for begin in begins) for d in range(count)]
        found.append(tuple(device[piece.home] for piece in placement.pieces))
    return sorted(found, key=lambda homes: (homes[-1], homes))


def placed(placement: Placement, homes: Sequence[int]) -> Placement:
    """The same pieces on other devices."""
    return Placement(tuple(replace(piece, home=home) for piece, home in zip(placement.pieces, homes, strict=True)))


def seconds(profile: PartitionProfile, way: Way, calls: int) -> float:
    """Time of one picture of `calls` model calls: encoding, the timetable's rounds with their exchanges, decoding.

    Rounds are those of the executors: devices of a round start together, and the slowest ends it; in the warm-up one
    follows the other. With halves both do this at once and meet after every call.
    """
    table = remembered(placed(profile.placement, way.homes), calls, way.scheme)
    drawing = sum(_Round(profile, way, each).seconds() for each in table.rounds)
    meeting = calls * profile.link.seconds if way.parts > 1 else 0.0
    return profile.begin + drawing + meeting + calls * profile.rest + profile.end


def held(profile: PartitionProfile, way: Way) -> list[int]:
    """Bytes of weights on each device of this way."""
    one = [0] * way.own
    for device, piece in seats(placed(profile.placement, way.homes), way.scheme):
        one[device] += profile.held[piece]
    return one * way.parts


def lacking(profile: PartitionProfile, way: Way) -> str:
    """Why the weights do not fit, or nothing; devices of one name share their room."""
    total: dict[str, int] = {}
    for name, nbytes in zip(profile.devices, held(profile, way), strict=False):
        total[name] = total.get(name, 0) + nbytes
    for name, nbytes in total.items():
        room = profile.room.get(name)
        if room is not None and nbytes > room:
            return f"holds {nbytes} bytes on {name}, which has {room}"
    return ""


@dataclass(frozen=True)
class _Round:
    profile: PartitionProfile
    way: Way
    each: Round

    def seconds(self) -> float:
        return max(self._half(part * self.way.own) for part in range(self.way.parts))

    def _half(self, first: int) -> float:
        groups = list(self._groups())
        busy = self.way.parts * (1 if self.each.synchronous else len(groups))
        times = [self._work(group, first, busy) for group in groups]
        exchange = self.profile.link.seconds if self.way.own > 1 else 0.0
        if self.each.synchronous:
            return sum(times) + exchange * len(times)
        return max(times) + exchange

    def _groups(self) -> Iterator[list[Task]]:
        """Tasks that one device does without waiting for others."""
        tasks: Sequence[Task] = self.each.tasks
        if not self.each.synchronous:
            tasks = sorted(tasks, key=lambda task: task.device)
        return (list(group) for _, group in groupby(tasks, key=lambda task: task.device))

    def _work(self, tasks: Sequence[Task], first: int, busy: int) -> float:
        costs = self.profile.whole if self.way.parts == 1 else self.profile.half
        computing = sum(costs[first + task.device][task.piece] for task in tasks)
        come = {made for task in tasks for made in task.reads if made.device != task.device}
        nbytes = sum(self.profile.sizes[made.tensor] for made in come) / self.way.parts
        return self.profile.crowd[busy - 1] * computing + self.profile.link.moving(nbytes)
